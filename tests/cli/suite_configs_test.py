"""The gin files of suites: each is a plan, and DePT spends in each what prompt tuning spends."""

from __future__ import annotations

import pathlib

import pytest

from deptjax.cli import settings
from deptjax.cli.scopes import SuiteSettings
from deptjax.data.paper_tasks import paper_settings
from deptjax.methods import MPT, DePT, method_names
from deptjax.models.sizes import SIZES
from deptjax.planning.budget import trained_parameters

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "suites"
FILES = sorted(FOLDER.glob("*.gin"))
# Of the authors' released checkpoints on T5-base: prompt length, rank, rates of the prompt and of the pair, steps.
RELEASED = {
    "cola": (80, 15, 0.3, 5e-4, 40_000),
    "mrpc": (60, 30, 0.3, 5e-3, 10_000),
    "mnli": (60, 30, 0.3, 1e-4, 250_000),
    "qnli": (60, 30, 0.4, 5e-3, 100_000),
    "qqp": (60, 30, 0.4, 5e-3, 100_000),
    "rte": (60, 30, 0.4, 1e-4, 30_000),
    "sst2": (60, 30, 0.3, 5e-4, 30_000),
    "stsb": (60, 30, 0.3, 1e-4, 30_000),
    "boolq": (40, 45, 0.3, 5e-3, 30_000),
    "cb": (60, 30, 0.4, 1e-4, 30_000),
    "multirc": (60, 30, 0.3, 5e-3, 30_000),
    "wic": (60, 30, 0.3, 1e-3, 20_000),
    "wsc": (60, 30, 0.3, 1e-4, 20_000),
    "nq": (60, 24, 0.3, 1e-4, 300_000),
    "hotpotqa": (60, 24, 0.4, 1e-4, 250_000),
    "searchqa": (60, 24, 0.3, 1e-4, 250_000),
    "newsqa": (60, 24, 0.4, 1e-4, 200_000),
}


def test_there_are_suites() -> None:
    assert {"packaged_smollm2", "table1_glue", "table1_superglue", "table2_mrqa"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_a_plan_of_three_seeds(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = SuiteSettings([str(file)], [], {})
    plan = settings.plan(str(tmp_path))
    assert plan.seeds == (0, 1, 2)
    assert len(plan.cells) == 3 * len(plan.recipes)
    assert f"configs/suites/{file.name}" in file.read_text()


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("table")], ids=lambda file: file.stem)
def test_dept_has_the_parameters_of_the_papers_prompt_tuning(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """76,800 on T5-base; MultiRC's longer texts take 79,560, as in the authors' released checkpoint."""
    settings = SuiteSettings([str(file)], [], {})
    assert settings.model()["name_or_path"] == "t5-base"
    width = SIZES["t5-base"].width
    for recipe in settings.plan(str(tmp_path)).recipes:
        if recipe.method.kind == "dept":
            method = recipe.method
            assert recipe.settings["max_length"] == method.max_length
            wanted = 79_560 if recipe.task.name == "multirc" else 100 * width
            assert method.prompt_length * width + (method.max_length + width) * method.rank == wanted


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("table")], ids=lambda file: file.stem)
def test_settings_are_those_of_the_released_checkpoints_or_of_the_paper(
    file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for recipe in SuiteSettings([str(file)], [], {}).plan(str(tmp_path)).recipes:
        name, config, paper = recipe.task.name, recipe.config(0), paper_settings(recipe.task.name)
        assert {field: getattr(config, field) for field in ("max_length", "batch_size", "accumulate")} == {
            field: paper[field] for field in ("max_length", "batch_size", "accumulate")
        }
        assert config.steps == (RELEASED[name][4] if name in RELEASED else paper["steps"])
        if name in RELEASED and isinstance(recipe.method, DePT):
            found = (recipe.method.prompt_length, recipe.method.rank, config.prompt_lr, config.low_rank_lr)
            assert found == RELEASED[name][:4]


def test_what_a_shared_prompt_is_tuned_with_is_what_its_suite_is() -> None:
    given = settings.merged([str(FOLDER.parent / "share" / "smollm2.gin")], [], {})
    shared = settings.make_config(given, MPT())
    of_suite = SuiteSettings([str(FOLDER / "methods_smollm2.gin")], [], {}).plan("unused").recipes[0].config(0)
    assert settings.model_settings(given)["name_or_path"] == "packaged:smollm2-135m-instruct"
    for field in ("batch_size", "buckets", "max_length", "eval_examples", "eval_batch_size"):
        assert getattr(shared, field) == getattr(of_suite, field)


def test_all_methods_stay_within_one_budget_and_use_most_of_it(tmp_path: pathlib.Path) -> None:
    config = SIZES["smollm2-135m"]
    recipes = SuiteSettings([str(FOLDER / "methods_smollm2.gin")], [], {}).plan(str(tmp_path)).recipes
    spent = {r.method.kind: trained_parameters(config, r.method.with_encoding_width(384)) for r in recipes}
    assert set(method_names()) - set(spent) == {"full"}
    assert all(0.85 * 57_600 < count <= 57_600 for count in spent.values()), spent
