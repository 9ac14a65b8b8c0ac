"""`deptjax share`: one prompt of two tasks, whose teachers say what the tasks are."""

from __future__ import annotations

import pathlib

import pytest

from deptjax.prompt import Prompt
from tests.cli.conftest import Command


@pytest.fixture
def teachers(deptjax: Command, asked: list[object], tmp_path: pathlib.Path) -> list[str]:
    """Soft prompts of three vectors, tuned on the same rows under two names."""
    found = []
    for name in ("films", "books"):
        words = [*without_method(asked), "--method", "prompt_tuning", "--prompt-length", 3, "--task-name", name]
        ended = deptjax(*words, "--workdir", tmp_path / name)
        assert ended.status == 0, ended.err
        found.append(str(tmp_path / name / "prompt"))
    return found


def without_method(asked: list[object]) -> list[object]:
    at = asked.index("--method")
    return [*asked[:at], *asked[asked.index("--buckets") :]]


def test_a_prompt_is_shared_and_a_run_starts_from_it(
    deptjax: Command, asked: list[object], teachers: list[str], tmp_path: pathlib.Path
) -> None:
    words = ["share", "--teachers", ",".join(teachers), "--workdir", tmp_path / "shared", "--steps", 4]
    words += ["--batch-size", 4, "--eval-every", 2, "--log-every", 2, "--buckets", 1]
    ended = deptjax(*words, "--quiet")
    assert ended.status == 0, ended.err
    assert ended.out.startswith(f"{tmp_path / 'shared' / 'prompt'}: dev/mean 0.")
    assert "dev/films/accuracy" in ended.out
    assert "a run of mpt starts from it with --start-from" in ended.out
    shared = Prompt.load(tmp_path / "shared" / "prompt")
    assert (shared.method.kind, shared.method.prompt_length) == ("mpt", 3)
    assert {place.name for place in (tmp_path / "shared" / "prompts").iterdir()} == {"films", "books"}
    assert deptjax(*words, "--quiet").out == ended.out  # finished: nothing is trained again
    start = ["--method", "mpt", "--prompt-length", 3, "--start-from", tmp_path / "shared" / "prompt"]
    again = deptjax(*without_method(asked), *start, "--workdir", tmp_path / "target")
    assert again.status == 0, again.err


def test_mistakes(deptjax: Command, teachers: list[str], tmp_path: pathlib.Path) -> None:
    words = ["share", "--workdir", tmp_path / "shared"]
    assert deptjax(*words).error.startswith("no --teachers; it names the saved prompts of the tasks")
    assert "it has no prompt.json" in deptjax(*words, "--teachers", tmp_path / "gone").error
    one, other = teachers
    for few in (one, ",", " "):
        assert deptjax(*words, "--teachers", few).error.startswith("--teachers names fewer than two prompts")
    told = deptjax(*words, "--teachers", f"{one},{one}").error
    assert told == f"--teachers {one}: another teacher is of task 'films'; give one for each task"
    both = [*words, "--teachers", f"{one},{other}"]
    assert deptjax(*both, "--distill", "much").error.startswith("--distill: ")
    assert deptjax(*both, "--distill", "-1").error == "distill is -1.0; it must be 0 or more, and finite"
    assert deptjax(*both, "--rank", 3).error.startswith("--rank: method 'mpt' has no such field")
    assert "has 3 vectors, and the shared prompt (prompt_length) 4" in deptjax(*both, "--prompt-length", 4).error
    assert deptjax(*both, "--loss", "labels").error.startswith("loss is 'labels'; what teachers say is of the whole")
    assert deptjax("share", "--teachers", one).error == "no workdir; name the run's folder with --workdir DIR"
    assert not (tmp_path / "shared").exists()
