"""Members of a population: what they may vary, who goes on, and the table of all."""

from __future__ import annotations

import dataclasses

import pytest

from deptjax.errors import UserError
from deptjax.methods import DePT
from deptjax.training.members import (
    MemberResult,
    default_grid,
    grid,
    make_members,
    markdown_table,
    member_name,
    rungs,
    survivors,
    winners,
)
from tests.reviews import review_task


def result(name: str, score: float | None, task: str = "t", ended: str = "finished", step: int = 9) -> MemberResult:
    metrics = {} if score is None else {"dev/accuracy": score}
    return MemberResult(name, task, {"prompt_lr": float(len(name)), "init": name}, ended, step, 5, metrics)


def test_the_papers_grid_has_a_member_for_each_pair() -> None:
    pairs = grid(prompt_lr=[0.3, 0.4, 0.5], low_rank_lr=[1e-4, 5e-4, 1e-3])
    assert len(pairs) == 9
    assert len({tuple(pair.values()) for pair in pairs}) == 9
    assert [pair["prompt_lr"] for pair in pairs] == [0.3] * 3 + [0.4] * 3 + [0.5] * 3


def test_default_grid_surrounds_each_rate() -> None:
    members = default_grid({"prompt": 0.3, "low_rank": 0.005})
    assert len(members) == 9
    assert {member["low_rank_lr"] for member in members} == {0.00167, 0.005, 0.015}
    assert {"prompt_lr": 0.3, "low_rank_lr": 0.005} in members


def test_a_name_is_a_folders_name() -> None:
    assert member_name({"task": review_task(), "prompt_text": "a/b: c?"}) == "task=reviews,prompt_text=a-b--c-"
    assert member_name({}) == "default"
    assert member_name({"prompt_lr": 0.3000001}) == "prompt_lr=0.3000001"


def test_what_varies_goes_where_it_belongs() -> None:
    varied = [{"seed": 3, "prompt_lr": 0.1, "prompt_init": "vocab"}, {"seed": 4}]
    first, second = make_members(DePT(prompt_length=7), review_task(), varied, {"steps": 8})
    assert first.settings == {"steps": 8, "seed": 3, "prompt_lr": 0.1}
    assert first.method == DePT(prompt_length=7, prompt_init="vocab")
    assert second.method == DePT(prompt_length=7)
    assert second.settings == {"steps": 8, "seed": 4}


@pytest.mark.parametrize(
    ("varied", "told"),
    [
        ([], "no members"),
        ([{"prompt_rl": 0.1}], "cannot vary 'prompt_rl'.*prompt_lr"),
        ([{"steps": 3}], "cannot vary 'steps'"),
        ([{"seed": 1}, {"seed": 1}], "two members are both 'seed=1'"),
        ([{"seed": 1}, {"seed": 2, "task": review_task(train=8)}], "two different tasks .* are both named 'reviews'"),
        ([{}, {"task": dataclasses.replace(review_task(), name="a/b")}], "task 'a/b' cannot name a folder"),
    ],
)
def test_members_that_cannot_be(varied: list[dict[str, object]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_members(DePT(), review_task(), varied, {})


def test_a_member_without_a_task_is_refused() -> None:
    with pytest.raises(UserError, match="has no task"):
        make_members(DePT(), None, [{"seed": 1}], {})


def test_rungs_grow_by_the_factor_and_leave_one() -> None:
    for members, factor, steps in [(9, 3, 900), (16, 2, 1600), (7, 2, 800), (5, 4, 640)]:
        places = rungs(steps, members, factor)
        left = members
        for _ in places:
            left = -(-left // factor)
        assert left == 1
        assert [b / a for a, b in zip(places, (*places[1:], steps), strict=True)] == [factor] * len(places)


def test_rungs_of_very_few_steps_stand_once_each() -> None:
    assert rungs(4, 16, 2) == (1, 2)  # of 0.25, 0.5, 1 and 2, rounded
    assert rungs(100, 1, 2) == ()


def test_survivors_are_the_best() -> None:
    assert survivors([0.1, 0.3, 0.2, 0.4, 0.0], 3) == [1, 3]
    assert survivors([0.5, 0.5, 0.5, 0.5], 2) == [0, 1]
    assert survivors([None, None, 0.0], 2) == [0, 2]


def test_winners_are_of_each_task() -> None:
    results = [result("a", 0.5), result("b", 0.75), result("c", 0.75), result("d", 0.1, "u"), result("e", None, "u")]
    assert {task: found.name for task, found in winners(results).items()} == {"t": "b", "u": "d"}


def test_a_score_of_zero_is_better_than_one_below() -> None:
    """A correlation may be negative."""
    for scores, best in [((0.0, -0.5), "a"), ((-0.5, 0.0), "b"), ((0.0, 0.0), "a"), ((-0.5, -0.25), "b")]:
        results = [result(name, score) for name, score in zip("ab", scores, strict=True)]
        assert winners(results)["t"].name == best


def test_without_scores_only_the_only_member_of_a_task_is_its_best() -> None:
    several = [result("a", None), result("b", None), result("c", None, "u")]
    assert {task: found.name for task, found in winners(several).items()} == {"u": "c"}
    without_a_prompt = dataclasses.replace(result("d", None), best_step=0)
    assert winners([without_a_prompt]) == {}


def test_table_has_all_members_the_best_first_and_bold() -> None:
    results = [result("aa", 0.5), result("b|\n", 0.75, step=4, ended="cut"), result("ccc", None, ended="diverged")]
    assert markdown_table(results).splitlines() == [
        "| prompt_lr | init | dev/accuracy | best step | ended |",
        "| --- | --- | --- | --- | --- |",
        "| **3** | **b\\|** | **0.7500** | **5** | **cut at 4** |",
        "| 2 | aa | 0.5000 | 5 | finished |",
        "| 3 | ccc |  | 5 | diverged at 9 |",
    ]
