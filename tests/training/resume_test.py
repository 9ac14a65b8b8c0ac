"""A run that is cut off, however and whenever, ends like one that never was: the same bits, each line logged once."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.methods import DePT, LoRA, Method
from deptjax.sharding import Placement
from deptjax.training.run import Run, train
from tests.cases import backbone_of
from tests.reviews import review_task

METHOD = DePT(prompt_length=6, rank=4, max_length=32)
LONG = {
    "steps": 240,
    "batch_size": 4,
    "eval_every": 40,
    "checkpoint_every": 30,
    "log_every": 7,  # divides none of the above, so that a checkpoint falls between two lines of the log
    "buckets": 1,
}
SCRIPT = """
import sys, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from tests.training import resume_test
run = resume_test.long_run(sys.argv[1])
print("finished" if run.finished else "stopped", run.step)
"""


def long_run(folder: str | pathlib.Path) -> Run:
    """Trains for a while; what the processes of these tests do."""
    return train(backbone_of("llama"), METHOD, review_task(), folder, progress=False, **LONG)


def log_of(folder: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of the log without speed and waits, which are others at each run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("examples_per_second", "data_wait_seconds")} for line in lines]


def result_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a run ends with: the bytes of its best prompt, its card, its log, and which step was best."""
    result = json.loads((folder / "result.json").read_text())
    return {
        "tensors": (folder / "prompt" / "prompt.safetensors").read_bytes(),
        "card": json.loads((folder / "prompt" / "prompt.json").read_text()),
        "log": log_of(folder),
        "best": (result["best_step"], result["metrics"]),
    }


def start(folder: pathlib.Path) -> subprocess.Popen[str]:
    root = pathlib.Path(__file__).parents[2]
    cache = jax.config.jax_compilation_cache_dir
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), cache],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_logged(folder: pathlib.Path, of: str = "loss") -> int:
    """Returns the last step in the log that has the number `of`."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("\n") and f'"{of}"' in line]
    return max(steps, default=0)


def writing(folder: pathlib.Path) -> bool:
    """Returns whether a checkpoint behind the first is being written at this moment."""
    return steps_logged(folder) > 60 and any((folder / "checkpoints").glob("*tmp*"))


MOMENTS: list[tuple[str, Callable[[pathlib.Path], bool], int]] = [
    ("before the first checkpoint", lambda folder: steps_logged(folder) >= 14, signal.SIGKILL),
    ("while a checkpoint is written", writing, signal.SIGKILL),
    ("right after an evaluation", lambda folder: steps_logged(folder, "dev/accuracy") >= 120, signal.SIGKILL),
    ("by a signal that asks", lambda folder: steps_logged(folder) >= 147, signal.SIGTERM),
    ("near the end", lambda folder: steps_logged(folder) >= 203, signal.SIGKILL),
]


def test_killed_again_and_again(tmp_path: pathlib.Path) -> None:
    long_run(tmp_path / "unbroken")
    wanted = result_of(tmp_path / "unbroken")
    assert [line["step"] for line in wanted["log"] if "loss" in line] == [*range(7, 240, 7), 240]
    folder = tmp_path / "broken"
    for name, due, number in MOMENTS:
        process = start(folder)
        try:
            deadline = time.monotonic() + 120
            while not due(folder):
                assert process.poll() is None, f"ended before it was {name}: {process.communicate()}"
                assert time.monotonic() < deadline, f"was never {name}"
                time.sleep(0.0005)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, name
        else:
            assert process.returncode == 0, err
            state, step = out.split()
            assert state == "stopped"
            # Saved at the very step, so nothing is done twice.
            assert step in {p.name for p in (folder / "checkpoints").iterdir()}
    process = start(folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ["finished", "240"]
    got = result_of(folder)
    assert got["log"] == wanted["log"]
    assert got["best"] == wanted["best"]
    assert got["card"] == wanted["card"]
    assert got["tensors"] == wanted["tensors"]
    leftovers = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert leftovers == [".lock"]


@dataclasses.dataclass(frozen=True)
class StopsAfter(Placement):
    """A placement that sends the process a signal as it places its n-th batch for training."""

    batches: int = 0
    count: list[int] = dataclasses.field(default_factory=list)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        self.count.extend([1] if "targets" in batch else [])
        if "targets" in batch and len(self.count) == self.batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().put_batch(batch)


@pytest.mark.parametrize(
    ("family", "method", "accumulate"),
    [("t5", METHOD, 2), ("llama", LoRA(rank=2), 1)],
    ids=["t5-dept-accumulated", "llama-lora"],
)
def test_stopped_by_signals_in_the_middle(tmp_path: pathlib.Path, family: str, method: Method, accumulate: int) -> None:
    """With dropout and accumulation as well: what is random depends on the step, and half an update is finished."""
    settings: dict[str, Any] = {
        **LONG,
        "steps": 12,
        "accumulate": accumulate,
        "eval_every": 6,
        "checkpoint_every": 5,
        "log_every": 2,
    }

    def go(folder: pathlib.Path, **fields: Any) -> Run:
        return train(backbone_of(family), method, review_task(), folder, progress=False, **settings, **fields)

    handler = signal.getsignal(signal.SIGTERM)
    assert go(tmp_path / "unbroken").finished
    done = []
    for batches in (1, 3, 3 * accumulate):
        run = go(tmp_path / "broken", placement=StopsAfter(Placement.over().mesh, batches=batches))
        assert not run.finished
        assert run.signal == signal.SIGTERM
        done.append(run.step)
    assert done == [1, 1 + -(-3 // accumulate), 4 + -(-3 // accumulate)]
    assert go(tmp_path / "broken").finished
    assert signal.getsignal(signal.SIGTERM) == handler
    got, wanted = (result_of(tmp_path / name) for name in ("broken", "unbroken"))
    assert got == wanted
