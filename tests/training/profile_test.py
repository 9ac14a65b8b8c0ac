"""What `profile` writes."""

from __future__ import annotations

import gzip
import json
import pathlib

import pytest

from deptjax.methods import PromptTuning
from deptjax.training.profile import Profile
from deptjax.training.run import train
from tests.cases import backbone_of
from tests.reviews import review_task


def test_a_run_leaves_a_trace_of_its_steps(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 4, "batch_size": 4, "buckets": 1, "eval_every": 0, "profile": 2}
    train(backbone_of("llama"), PromptTuning(prompt_length=4), review_task(), tmp_path, **settings)
    folder = tmp_path / "profile"
    (file,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert {str(step) for step in steps} == {"3", "4"}
    assert any("step" in event.get("name", "") and "jit" in event["name"].lower() for event in events)
    assert list(folder.rglob("*.xplane.pb"))  # TensorBoard's
    assert f"steps 3 to 4 are traced in {folder}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "done", "steps", "traced"),
    [(3, 0, 100, [11, 12, 13]), (3, 50, 100, [61, 62, 63]), (3, 0, 5, [3, 4, 5]), (9, 2, 5, [3, 4, 5]), (0, 0, 50, [])],
)
def test_which_steps_are_traced(
    count: int, done: int, steps: int, traced: list[int], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profile, found = Profile(tmp_path, count, done, steps, quiet=True), []
    for step in range(done, steps):
        profile.before(step)
        found += [step + 1] if calls == ["start"] else []
        profile.after(step + 1, None)
    assert found == traced
    assert calls == (["start", "stop"] if traced else [])
