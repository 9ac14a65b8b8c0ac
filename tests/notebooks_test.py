"""The notebooks run from their first cell to their last, on a tiny model and a few rows, and answer."""

from __future__ import annotations

import base64
import pathlib
import re
from typing import Any

import jax
import pytest

from deptjax.data.packaged_sets import MOVIE_SENTIMENT, SMS_SPAM, TREC6
from deptjax.testing import tiny_llama
from tests.tiny_folders import save_tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICKSTART, MANY_TASKS, TABLE = "01_quickstart.ipynb", "02_many_tasks.ipynb", "03_reproduce_a_table.ipynb"
OWN_METHOD = "05_add_a_method.ipynb"
COLAB = "https://colab.research.google.com/github/deptjax/deptjax/blob/main/notebooks/"
ANSWER = re.compile(r"^(.+ \?) +-> (\w+) \((\d+)%\)$", re.MULTILINE)


def read(name: str) -> Any:
    """Returns a notebook as it is committed."""
    import nbformat

    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    """Returns the cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any, stream: str = "stdout") -> str:
    """Returns what a cell wrote to a stream."""
    return "".join(out["text"] for out in cell["outputs"] if out["output_type"] == "stream" and out["name"] == stream)


def all_printed(notebook: Any, stream: str = "stdout") -> str:
    """Returns what all cells wrote to a stream."""
    return "\n".join(printed(cell, stream) for cell in code_cells(notebook))


def pictures(notebook: Any) -> list[bytes]:
    """Returns the plots, each a PNG file."""
    outputs = [out for cell in code_cells(notebook) for out in cell["outputs"] if out["output_type"] == "display_data"]
    return [base64.b64decode(out["data"]["image/png"]) for out in outputs if "image/png" in out["data"]]


def execute(name: str, work: pathlib.Path, **settings: object) -> Any:
    """Returns a notebook after it ran on a tiny model, in a kernel of its own; raises for a cell that errs."""
    from nbclient import NotebookClient

    notebook = read(name)
    words = [word for task in (TREC6, SMS_SPAM, MOVIE_SENTIMENT) for word in (*(task.labels or ()), task.input)]
    model = save_tiny(tiny_llama, work / "tiny", " ".join([*words, *(cell.source for cell in notebook.cells)]))
    settings = {"MODEL": model, "WORKDIR": work / "run", **settings}
    environment = {f"DEPTJAX_{field}": str(value) for field, value in settings.items()}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    environment["PYTHONPATH"] = str(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        for field, value in environment.items():
            patch.setenv(field, value)
        client = NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        )
        return client.execute()


@pytest.mark.parametrize("name", [QUICKSTART, MANY_TASKS, TABLE, OWN_METHOD])
def test_it_begins_with_the_badge(name: str) -> None:
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("[![Open in Colab]")
    assert COLAB + name in first.source


@pytest.mark.parametrize("name", [QUICKSTART, TABLE, OWN_METHOD])
def test_it_is_committed_without_outputs(name: str) -> None:
    code = code_cells(read(name))
    assert len(code) > 5
    for cell in code:
        assert not cell.outputs
        assert cell.execution_count is None


def test_many_tasks_is_committed_with_the_outputs_of_one_run() -> None:
    notebook = read(MANY_TASKS)
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(pictures(notebook)) == 1
    stored = all_printed(notebook) + all_printed(notebook, "stderr")
    assert "training: 100%" in stored
    assert "packaged:smollm2-135m-instruct" in stored
    assert not re.search(r"/(home|root|tmp|work)/", stored)  # of the machine it ran on


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(QUICKSTART, tmp_path_factory.mktemp("quickstart"), STEPS=8, HELD_OUT=24)


@pytest.fixture(scope="module")
def many_tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(MANY_TASKS, tmp_path_factory.mktemp("many_tasks"), STEPS=4, HELD_OUT=16, REPEATS=2)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(TABLE, tmp_path_factory.mktemp("table"), STEPS=3, HELD_OUT=16, TASKS="trec6")


def test_every_cell_runs_and_the_last_ones_answer(quickstart: Any) -> None:
    code = code_cells(quickstart)
    assert all(cell.execution_count for cell in code)
    answers = next(found for cell in code if len(found := ANSWER.findall(printed(cell))) > 1)
    assert len(answers) == 4
    for question, label, percent in answers:
        assert question.endswith("?")
        assert label in TREC6.labels
        assert 0 < int(percent) <= 100
    assert '"prediction": ' in printed(code[-1])


def test_training_is_shown_and_compared_with_the_frozen_model(quickstart: Any) -> None:
    text = all_printed(quickstart)
    assert re.search(r"^\d[\d,]* tuned numbers; dev accuracy \d+\.\d%$", text, re.MULTILINE)
    for name in ("majority class", "zero-shot, frozen", "DePT"):
        assert re.search(rf"^{name} +\d+\.\d% +[\d,]+$", text, re.MULTILINE), text
    progress = all_printed(quickstart, "stderr")
    assert "training" in progress
    assert "8/8" in progress


def test_a_table_is_made_and_rates_are_searched(table: Any) -> None:
    text = all_printed(table)
    assert "6 runs, the first is trec6/dept/seed-0, the last trec6/lora/seed-1" in text
    shown = "".join(
        out["data"]["text/markdown"]
        for cell in code_cells(table)
        for out in cell["outputs"]
        if out["output_type"] == "display_data" and "text/markdown" in out["data"]
    )
    for method in ("dept", "prompt_tuning", "lora"):
        assert re.search(rf"^\| {method} \| \**\d+\.\d+ ± \d+\.\d+", shown, re.MULTILINE), shown
    members = re.findall(r"^\| .*\d\.\d{4}.*[ *]finished\** \|$", text, re.MULTILINE)
    assert len(members) == 9
    assert len(re.findall(r": \w+ \(right: \w+\)$", text, re.MULTILINE)) == 5


def test_there_are_plots(quickstart: Any, many_tasks: Any, table: Any) -> None:
    for notebook, count in ((quickstart, 2), (many_tasks, 1), (table, 2)):
        drawn = pictures(notebook)
        assert len(drawn) == count
        for picture in drawn:
            assert picture.startswith(b"\x89PNG")
            assert len(picture) > 5000


def test_three_tasks_are_tuned_and_answered_in_one_batch(many_tasks: Any) -> None:
    text = all_printed(many_tasks)
    assert all_printed(many_tasks, "stderr").count("step 4: dev/accuracy") == 3
    for name in ("questions", "messages", "films"):
        assert re.search(rf"^{name}( +\d+){{3}}( +\d+\.\d%){{2}}$", text, re.MULTILINE), text
    rows = re.findall(r"^\S.+?  +(questions|messages|films) +(\w+) +\d+\.\d%$", text, re.MULTILINE)
    assert len(rows) == 12
    labels = {"questions": TREC6.labels, "messages": SMS_SPAM.labels, "films": MOVIE_SENTIMENT.labels}
    assert all(label in (labels[task] or ()) for task, label in rows)
    assert re.search(r"^12 rows, the same labels; largest difference of a probability: ", text, re.MULTILINE)


def test_tasks_come_and_go_under_threads(many_tasks: Any) -> None:
    text = all_printed(many_tasks)
    assert "tasks: questions, messages, films, reviews\n" in text
    assert re.search(r"^reviews: (negative|positive)$", text, re.MULTILINE)
    counted = re.search(r"^(\d+) mixed batches were answered meanwhile, all as before$", text, re.MULTILINE)
    assert counted is not None
    assert int(counted[1]) >= 6
    assert "UserError: no prompt is loaded for task 'reviews'" in text


def test_a_prompt_that_is_computed_once_is_timed(many_tasks: Any) -> None:
    text = all_printed(many_tasks)
    for way in ("in the text of each row", "as a prompt, computed once"):
        assert re.search(rf"^{way} +\d+ ms$", text, re.MULTILINE), text


def test_text_is_written_and_scored(many_tasks: Any) -> None:
    text = all_printed(many_tasks)
    sampled = re.findall(r"^seed (\d): (.+)$", text, re.MULTILINE)
    assert [seed for seed, _ in sampled] == ["1", "2", "1"]
    assert sampled[0] == sampled[2]
    scored = re.findall(r"^ *(-\d+\.\d\d)  The capital of Italy is (\w+)\.$", text, re.MULTILINE)
    assert [city for _, city in scored] == ["Rome", "Milan", "Paris"]
    beams = [float(score) for score in re.findall(r"^ *(-\d+\.\d{3})  ['\"]", text, re.MULTILINE)]
    assert len(beams) == 3
    assert beams == sorted(beams, reverse=True)


def test_other_formats_answer_alike(many_tasks: Any) -> None:
    text = all_printed(many_tasks)
    for name in ("deptjax", "dept", "safetensors", "npz", "peft"):
        assert re.search(rf"^{name} +.+ KiB: the same answers to 32 questions$", text, re.MULTILINE), text
    assert "UserError: peft has no method 'dept'" in text


def test_a_method_of_ones_own_is_tuned_saved_and_served_beside_dept(tmp_path: pathlib.Path) -> None:
    notebook = execute(OWN_METHOD, tmp_path, STEPS=3, HELD_OUT=16)
    (written,) = [cell.source for cell in code_cells(notebook) if "class GainTuning" in cell.source]
    own = written[written.index("def scaled") :].splitlines()
    assert len([line for line in own if line.strip()]) <= 40
    text = all_printed(notebook)
    assert "(2, 8, 7) (2, 8)" in text
    assert re.search(r"^gain +504 tuned numbers, dev accuracy \d+\.\d%$", text, re.MULTILINE), text  # 20 * 24 + 24
    assert "{'method': 'gain', 'prompt_length': 20, " in text
    for name in ("gain", "DePT"):
        assert re.search(rf"^{name} +\d+\.\d% of 16 held-out questions$", text, re.MULTILINE), text
        assert len(re.findall(rf" \? +{name} +-> \w+$", text, re.MULTILINE)) == 2
