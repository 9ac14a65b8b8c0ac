"""Which settings each run of a suite has: flags before bindings before files, more scopes before fewer."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from deptjax.cli.fields import FLAG, Given
from deptjax.cli.scopes import SuiteSettings
from deptjax.errors import UserError
from deptjax.suite.plan import Cell, Plan

GIN = """
suite.name = "packaged"
load_backbone.name_or_path = "t5-base"
TrainConfig.steps = 10
TrainConfig.prompt_lr = 0.3
TrainConfig.backbone_lr = 0.1      # of a method that is not chosen below
lora/TrainConfig.steps = 20
trec6/lora/TrainConfig.steps = 30
trec6/LoRA.rank = 2
trec6/Task.input = "{question}"
LoRA.rank = 3
"""


def plan_of(tmp_path: pathlib.Path, *bindings: str, gin: str = GIN, **flags: str) -> Plan:
    """Returns the plan of DePT and LoRA on two tasks, unless flags or bindings say otherwise."""
    (tmp_path / "suite.gin").write_text(gin)
    flags = {"suite.tasks": "trec6,sms_spam", "suite.methods": "dept,lora", **flags}
    given = {tuple(name.split(".")): Given(value, f"--{name.split('.')[1]}", FLAG) for name, value in flags.items()}
    return SuiteSettings([str(tmp_path / "suite.gin")], list(bindings), given).plan("runs")  # type: ignore[arg-type]


def of(plan: Plan, task: str, method: str) -> tuple[Any, Any, Any]:
    """Returns method, configuration and task of a recipe."""
    recipe = plan.recipe(Cell(task, method, plan.seeds[0]))
    return recipe.method, recipe.config(plan.seeds[0]), recipe.task


def test_more_scopes_go_before_fewer(tmp_path: pathlib.Path) -> None:
    plan = plan_of(tmp_path)
    steps = {pair: of(plan, *pair)[1].steps for pair in [("trec6", "lora"), ("sms_spam", "lora"), ("trec6", "dept")]}
    assert steps == {("trec6", "lora"): 30, ("sms_spam", "lora"): 20, ("trec6", "dept"): 10}
    assert [of(plan, task, "lora")[0].rank for task in ("trec6", "sms_spam")] == [2, 3]
    assert of(plan, "trec6", "dept")[2].input == "{question}"
    assert of(plan, "trec6", "dept")[2].labels[0] == "description"
    assert of(plan, "sms_spam", "dept")[2].input == "{text}\nLabel:"
    assert plan.seeds == (0, 1, 2)
    assert plan.name is None  # the tasks that are named go before the suite of the file


def test_a_suite_by_its_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "suite.gin").write_text(GIN)
    methods = {("suite", "methods"): Given("lora", "--methods", FLAG)}
    plan = SuiteSettings([str(tmp_path / "suite.gin")], [], methods).plan("runs")
    assert plan.name == "packaged"
    assert plan.cells[0] == Cell("trec6", "lora", 0)
    assert len(plan.cells) % 3 == 0


def test_a_learning_rate_is_for_the_methods_that_have_it(tmp_path: pathlib.Path) -> None:
    plan = plan_of(tmp_path)
    assert of(plan, "sms_spam", "dept")[1].prompt_lr == 0.3
    assert of(plan, "sms_spam", "lora")[1].prompt_lr is None
    assert of(plan, "sms_spam", "dept")[1].backbone_lr is None
    with pytest.raises(UserError, match="trains no such parameters"):
        plan_of(tmp_path, "TrainConfig.backbone_lr=0.1")  # asked for just now, and of no use
    with pytest.raises(UserError, match="trains no such parameters"):
        plan_of(tmp_path, "lora/TrainConfig.prompt_lr=0.1")


def test_a_flag_goes_before_a_binding_and_that_before_a_file(tmp_path: pathlib.Path) -> None:
    plan = plan_of(tmp_path, "TrainConfig.steps=40", "LoRA.rank=5")
    assert of(plan, "trec6", "lora")[1].steps == 40
    assert of(plan, "trec6", "lora")[0].rank == 5
    plan = plan_of(tmp_path, "TrainConfig.steps=40", **{"TrainConfig.steps": "50", "method.rank": "6"})
    assert of(plan, "trec6", "lora")[1].steps == 50
    assert [of(plan, "trec6", kind)[0].rank for kind in ("dept", "lora")] == [6, 6]


def test_a_flag_of_one_method_leaves_the_others_alone(tmp_path: pathlib.Path) -> None:
    plan = plan_of(tmp_path, **{"method.prompt_length": "7", "method.max_length": "64"})
    assert of(plan, "trec6", "dept")[0].prompt_length == 7
    assert of(plan, "trec6", "dept")[0].max_length == 64
    assert of(plan, "trec6", "lora")[1].max_length == 64  # where the method has none, it is the run's


@pytest.mark.parametrize(("seeds", "found"), [("(4, 2)", (4, 2)), ("3", (3,)), ('"5, 6"', (5, 6))])
def test_seeds_in_a_file(tmp_path: pathlib.Path, seeds: str, found: tuple[int, ...]) -> None:
    assert plan_of(tmp_path, gin=f"suite.seeds = {seeds}\n").seeds == found


def test_a_macro_has_no_scope(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="line 1: 'lora/rate' has a scope"):
        plan_of(tmp_path, gin="lora/rate = 3\n")
