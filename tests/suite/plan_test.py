"""Which runs a suite has, where they lie, and what is refused before anything is run."""

from __future__ import annotations

import pathlib

import pytest

from deptjax.errors import UserError
from deptjax.methods import DePT, LoRA
from deptjax.suite.plan import Cell, Plan, Recipe
from tests.reviews import review_task


def test_every_method_on_every_task_with_every_seed() -> None:
    plan = Plan.over("runs", ["trec6", "sms_spam"], ["dept", LoRA(rank=3)], (3, 1), steps=7)
    assert [str(cell) for cell in plan.cells] == [
        f"{task}/{method}/seed-{seed}"
        for task in ("trec6", "sms_spam")
        for seed in (3, 1)
        for method in ("dept", "lora")
    ]
    recipe = plan.recipe(Cell("sms_spam", "lora", 1))
    assert recipe.task.name == "sms_spam"
    assert recipe.method.rank == 3
    assert recipe.config(1).steps == 7
    assert recipe.config(1).seed == 1
    assert recipe.to_config()["method"]["rank"] == 3
    assert "seed" not in recipe.to_config()["train"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"tasks": ["trek6"]}, "Did you mean 'trec6'"),
        ({"methods": ["loora"]}, "Did you mean 'lora'"),
        ({"tasks": ["trec6", "sms_spam", "trec6"]}, "method 'dept' on task 'trec6' is named twice"),
        ({"methods": ["dept", DePT(rank=2)]}, "method 'dept' on task 'trec6' is named twice"),
        ({"seeds": [0, 1, 0]}, "seed 0 is named twice"),
        ({"seeds": [-1]}, "seed -1 must be 0 or more"),
        ({"seeds": []}, "at least one seed"),
        ({"tasks": []}, "at least one task"),
        ({"seed": 3}, "a suite gives each run its own"),
        ({"low_rank_lr": 0.1, "methods": ["prompt_tuning"]}, "trains no such parameters; it has prompt_lr"),
        ({"stepps": 3}, "Did you mean 'steps'"),
        ({"tasks": [review_task(train=4, dev=2)], "steps": 0}, "steps is 0"),
    ],
)
def test_mistakes_are_told_early(asked: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Plan.over("runs", **{"tasks": ["trec6"], "methods": ["dept"], "seeds": [0], **asked})


def test_a_task_must_be_able_to_name_a_folder() -> None:
    import dataclasses

    task = dataclasses.replace(review_task(train=4, dev=2), name="../films")
    with pytest.raises(UserError, match="cannot name a folder"):
        Plan(pathlib.Path("runs"), (Recipe(task, LoRA()),), (0,))


def test_a_cell_is_read_back_from_its_text() -> None:
    cell = Cell("films-2.1", "lora", 12)
    assert Cell.parse(str(cell)) == cell
    with pytest.raises(UserError, match="TASK/METHOD/seed-N"):
        Cell.parse("films/lora/12")
