"""Eight devices do what one does. The eight are made of one CPU, in a process of their own."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from deptjax.prompt import Prompt
from deptjax.sharding import Placement
from tests.sharding.process import on_eight

RUNS = ("llama-dept", "t5-dept")


def runs_on_eight_and_on_one(folder: pathlib.Path) -> None:
    """Trains the same on eight devices and on one; what the process of the test does."""
    from deptjax.training.population import train_population
    from deptjax.training.run import train
    from tests.cases import METHODS, backbone_of
    from tests.reviews import review_task

    settings = {"steps": 4, "batch_size": 16, "eval_every": 4, "buckets": 1, "log_every": 1, "max_length": 13}
    # Adam's first step is the gradient divided by its own size: of a gradient near a small epsilon, rounding is a part.
    settings["adam_eps"] = 1e-2
    for name in RUNS:
        family, method = name.split("-")
        for devices in (8, 1):
            placement = Placement.over(jax.devices()[:devices])
            place = folder / f"{name}-{devices}"
            task = review_task(dev=5)
            run = train(
                backbone_of(family), METHODS[method], task, place, placement=placement, progress=False, **settings
            )
            assert run.finished
            if name == RUNS[0]:  # and once more, from the checkpoint on
                assert train(
                    backbone_of(family), METHODS[method], task, place, placement=placement, progress=False, **settings
                ).finished
    population = train_population(
        backbone_of("llama"),
        METHODS["dept"],
        review_task(dev=5),
        folder / "population",
        [{"seed": 42}, {"seed": 1}],
        progress=False,
        **settings,
    )
    assert [member.ended for member in population.members] == ["finished", "finished"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    on_eight(runs_on_eight_and_on_one, folder)
    return folder


@pytest.mark.parametrize(
    ("eight", "one"),
    [*((f"{name}-8", f"{name}-1") for name in RUNS), ("population/members/seed=42", "llama-dept-1")],
)
def test_eight_devices_are_one(runs: pathlib.Path, eight: str, one: str) -> None:
    """The same losses, dropout included, the same parameters and the same dev scores; of a population's member, too."""
    places = (runs / eight, runs / one)
    logs = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in places]
    assert len(logs[0]) == len(logs[1]) == 5
    for a, b in zip(*logs, strict=True):
        keys = [set(line) - {"examples_per_second", "data_wait_seconds"} for line in (a, b)]
        assert keys[0] == keys[1]
        for key in keys[0]:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-5, err_msg=key)
    a, b = (Prompt.load(p / "prompt").trainable for p in places)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


def test_arrays_are_where_they_should_be() -> None:
    placement = Placement.over()
    batch = placement.put_batch({"source": np.arange(6).reshape(2, 3)})
    assert batch["source"].sharding == placement.rows
    np.testing.assert_array_equal(batch["source"], [[0, 1, 2], [3, 4, 5]])
    assert placement.put({"a": np.zeros(3)})["a"].sharding == placement.replicated
