"""The notebook runs from its first cell to its last, on a tiny model and a few questions, and answers."""

from __future__ import annotations

import base64
import pathlib
import re
from typing import Any

import jax
import pytest

from deptjax.data.packaged_sets import TREC6
from deptjax.testing import tiny_llama
from tests.tiny_folders import save_tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"
BADGE = "https://colab.research.google.com/github/deptjax/deptjax/blob/main/notebooks/01_quickstart.ipynb"
ANSWER = re.compile(r"^(.+ \?) +-> (\w+) \((\d+)%\)$", re.MULTILINE)


def read() -> Any:
    """Returns the notebook as it is committed."""
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell: Any) -> str:
    """Returns what a cell wrote to its standard output."""
    return "".join(out["text"] for out in cell["outputs"] if out["output_type"] == "stream" and out["name"] == "stdout")


def test_it_is_committed_without_outputs_and_begins_with_the_badge() -> None:
    cells = read().cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("[![Open in Colab]")
    assert BADGE in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(code) > 8
    for cell in code:
        assert not cell.outputs
        assert cell.execution_count is None


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after it ran, in a kernel of its own."""
    from nbclient import NotebookClient

    work = tmp_path_factory.mktemp("notebook")
    notebook = read()
    texts = " ".join([*TREC6.labels, TREC6.input, *(cell.source for cell in notebook.cells)])
    model = save_tiny(tiny_llama, work / "tiny", texts)
    settings = {"MODEL": model, "STEPS": 8, "HELD_OUT": 24, "WORKDIR": work / "run"}
    environment = {f"DEPTJAX_{name}": str(value) for name, value in settings.items()}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    environment["PYTHONPATH"] = str(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        )
        return client.execute()  # raises for a cell that errs


def test_every_cell_runs_and_the_last_ones_answer(executed: Any) -> None:
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    answers = next(found for cell in code if len(found := ANSWER.findall(printed(cell))) > 1)
    assert len(answers) == 4
    for question, label, percent in answers:
        assert question.endswith("?")
        assert label in TREC6.labels
        assert 0 < int(percent) <= 100
    assert '"prediction": ' in printed(code[-1])


def test_training_is_shown_and_compared_with_the_frozen_model(executed: Any) -> None:
    text = "\n".join(printed(cell) for cell in executed.cells if cell.cell_type == "code")
    assert re.search(r"^\d[\d,]* tuned numbers; dev accuracy \d+\.\d%$", text, re.MULTILINE)
    for name in ("majority class", "zero-shot, frozen", "DePT"):
        assert re.search(rf"^{name} +\d+\.\d% +[\d,]+$", text, re.MULTILINE), text
    progress = "".join(
        out["text"]
        for cell in executed.cells
        if cell.cell_type == "code"
        for out in cell["outputs"]
        if out["output_type"] == "stream" and out["name"] == "stderr"
    )
    assert "training" in progress
    assert "8/8" in progress


def test_there_are_two_plots(executed: Any) -> None:
    pictures = [
        base64.b64decode(out["data"]["image/png"])
        for cell in executed.cells
        if cell.cell_type == "code"
        for out in cell["outputs"]
        if out["output_type"] == "display_data" and "image/png" in out["data"]
    ]
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
