"""Cells in one process: what they have in common is loaded once."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from deptjax.interop import load
from deptjax.methods import IDPG, LoPA
from deptjax.suite.folder import SuiteFolder
from deptjax.suite.plan import Plan
from deptjax.suite.run import InProcess
from deptjax.suite.together import Together
from deptjax.testing import save_hf_folder, tiny_t5
from tests.cases import backbone_of
from tests.reviews import review_task

SMALL: dict[str, Any] = {"steps": 1, "batch_size": 4, "eval_every": 0, "buckets": 1, "max_length": 24}


@pytest.mark.parametrize("trainer", [InProcess, Together])
def test_an_encoder_is_loaded_once_a_suite(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, trainer: type[InProcess]
) -> None:
    folder = str(tmp_path / "reader")
    save_hf_folder(tiny_t5(), folder)
    loaded: list[str] = []
    run = load.load_backbone
    monkeypatch.setattr(load, "load_backbone", lambda name, **how: (loaded.append(name), run(name, **how))[1])
    methods = [
        LoPA(prompt_length=2, rank=1, hidden=4, encoder=folder),
        IDPG(prompt_length=2, hidden=4, generator="dense", encoder=folder),
    ]
    plan = Plan.over(tmp_path / "suite", [review_task(8, 4)], methods, (0, 1), test_examples=4, **SMALL)
    train_cells = trainer(plan, lambda: backbone_of("llama"), progress=False)
    for cells in train_cells.groups(plan.cells):
        assert train_cells(cells) is None
    suite = SuiteFolder(plan.workdir)
    assert [(suite.record(cell) or {})["status"] for cell in plan.cells] == ["done"] * 4
    assert loaded == [folder]
