"""The gin files of suites: each is a plan, and DePT spends in each what prompt tuning spends."""

from __future__ import annotations

import pathlib

import pytest

from deptjax.cli.scopes import SuiteSettings
from deptjax.models.sizes import SIZES

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "suites"
FILES = sorted(FOLDER.glob("*.gin"))


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
