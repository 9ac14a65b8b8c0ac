"""`deptjax search`: what is varied, the table, the best prompt, and mistakes in one line."""

from __future__ import annotations

import json
import pathlib

import pytest

from deptjax.prompt import Prompt
from tests.cli.conftest import Command


def test_a_search_keeps_the_best_and_tells_of_all(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path
) -> None:
    words = ["search", *asked[1:], "--vary", "prompt_lr=0.01,0.1", "--vary", "seed=[0, 1]", "--halving", 2]
    ended = deptjax(*words)
    assert ended.status == 0, ended.err
    run = tmp_path / "run"
    assert f"{run / 'prompt'}: the best of 4 on " in ended.out
    table = [line for line in ended.out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    members = json.loads((run / "members.json").read_text())
    assert [member["varied"] for member in members] == [
        {"prompt_lr": 0.01, "seed": 0},
        {"prompt_lr": 0.01, "seed": 1},
        {"prompt_lr": 0.1, "seed": 0},
        {"prompt_lr": 0.1, "seed": 1},
    ]
    best = max(members, key=lambda member: member["metrics"].get("dev/accuracy", 0))
    assert Prompt.load(run / "prompt").metrics == best["metrics"]
    assert (run / "config.gin").exists()
    assert deptjax(*words).out == ended.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--vary", "prompt_lr"], "--vary prompt_lr: no values"),
        (["--vary", "promt_lr=0.1"], "Did you mean 'prompt_lr'?"),
        (["--vary", "seed=a"], "--vary seed: seed 'a' is not a whole number"),
        (["--vary", "seed=[1,"], "--vary seed: broken JSON"),
        (["--vary", "task=trec7"], "no task is named 'trec7'"),
        (["--vary", "seed=0", "--vary", "seed=1"], "--vary seed is given twice; write all of its values behind one"),
        (["--vary", "prompt_lr=0.1,-0.1"], "prompt_lr is -0.1; it must be above 0"),
        (["--vary", "seed=1,1"], "two members are both 'seed=1'"),
        (["--eval-every", "0"], "--eval-every is 0, and a search chooses by scores on the dev split"),
        (["--gin.FileSource.dev_size=0"], "has no dev rows to choose by"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path, flags: list[str], told: str
) -> None:
    assert told in deptjax("search", *asked[1:], "--model", tmp_path / "none", *flags).error


def test_without_vary_the_rates_around_those_that_are_given(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path
) -> None:
    words = ["search", *asked[1:], "--steps", 1, "--prompt-lr", 0.03, "--low-rank-lr", 0.01]
    assert deptjax(*words).status == 0
    members = json.loads((tmp_path / "run" / "members.json").read_text())
    assert {member["varied"]["prompt_lr"] for member in members} == {0.01, 0.03, 0.09}
    assert {member["varied"]["low_rank_lr"] for member in members} == {0.00333, 0.01, 0.03}
    assert len(members) == 9


def test_halving_by_one_is_refused(deptjax: Command, asked: list[object]) -> None:
    assert "halving is 1; it must be 2 or more" in deptjax("search", *asked[1:], "--halving", "1").error
