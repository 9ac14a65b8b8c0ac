"""Two hosts do what one does: the same losses, scores and prompts, however the model and the rows are split."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from deptjax.prompt import Prompt
from tests.hosts import work
from tests.hosts.launcher import run_hosts

ONE_DEVICE = ("llama-dept-data:2", "t5-full-fsdp:2", "llama-lora-model:2")
TWO_DEVICES = ("t5-dept-data:2,fsdp:2",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    for devices, cases in ((1, ONE_DEVICE), (2, TWO_DEVICES)):
        first, second = run_hosts("tune", str(folder), *cases, devices=devices)
        assert (first.status, second.status) == (0, 0), first.err + second.err
        assert first.out.split() == ["2", str(2 * devices)]
        assert (
            first.lines[0] == f"mesh {cases[0].partition('-')[2].partition('-')[2]} ({2 * devices} devices of 2 hosts)"
        )
        assert second.lines == []  # what is alike on all is said by the first
    work.tune(str(folder), *sorted({case.rpartition("-")[0] + "-data:1" for case in ONE_DEVICE + TWO_DEVICES}))
    return folder


@pytest.mark.parametrize("case", ONE_DEVICE + TWO_DEVICES)
def test_two_hosts_are_one(runs: pathlib.Path, case: str) -> None:
    same_run(runs / case, runs / (case.rpartition("-")[0] + "-data:1"))


def test_a_population_on_two_hosts(runs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = run_hosts("tune_population", str(tmp_path), "fsdp:2")
    assert (first.status, second.status) == (0, 0), first.err + second.err
    same_run(tmp_path / "members" / "seed=42", runs / "llama-dept-data:1")
    assert (tmp_path / "members.md").exists()


def same_run(one: pathlib.Path, other: pathlib.Path, tolerance: float = 1e-5) -> None:
    """Holds that two runs logged the same numbers and left the same prompt."""
    logs = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (one, other)]
    assert len(logs[0]) == len(logs[1]) > 0
    for a, b in zip(*logs, strict=True):
        keys = [set(line) - {"examples_per_second", "data_wait_seconds"} for line in (a, b)]
        assert keys[0] == keys[1]
        for key in keys[0]:
            np.testing.assert_allclose(a[key], b[key], rtol=tolerance, atol=tolerance, err_msg=key)
    a, b = (Prompt.load(p / "prompt") for p in (one, other))

    def close(x: np.ndarray, y: np.ndarray) -> None:
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, a.trainable, b.trainable)
    assert a.fingerprint == b.fingerprint
    assert a.metrics == b.metrics
