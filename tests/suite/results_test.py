"""Means and deviations on numbers made by hand, and how they are written."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest

from deptjax.suite.results import AFTER_OTHERS, IN_POPULATION, WITH_OTHERS, mean_and_sd, read_curve, summarized
from deptjax.suite.table import Entry, markdown, methods_table, notes, runs_table
from tests.suite.made_up import failed, results_of, run


def test_mean_and_sample_deviation() -> None:
    found = mean_and_sd([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert found["mean"] == 5.0
    assert found["sd"] == pytest.approx(math.sqrt(32 / 7), rel=1e-12)  # 7 and not 8 below the sum of squares
    assert found["n"] == 8
    assert mean_and_sd([0.25, None, math.nan]) == {"mean": 0.25, "sd": None, "n": 1}
    assert mean_and_sd([None]) == {"mean": None, "sd": None, "n": 0}


def entry_of(runs: list[dict[str, Any]], task: str, method: str) -> dict[str, Any]:
    (found,) = [entry for entry in summarized(runs) if (entry["task"], entry["method"]) == (task, method)]
    return found


RUNS = [
    run("films", "dept", 0, 0.6, seconds_per_step=1.0, peak_mib=100.0),
    run("films", "dept", 1, 0.8, seconds_per_step=3.0, peak_mib=300.0),
    run("films", "lora", 0, 0.9),
    failed("films", "lora", 1),
    run("plays", "dept", 0, 0.4, seconds_per_step=None, peak_mib=200.0),
    run("plays", "dept", 1, 0.4, seconds_per_step=2.0, peak_mib=200.0),
    run("plays", "lora", 0, 0.5),
    run("plays", "lora", 1, 0.7),
]


def test_a_task_and_method_over_its_seeds() -> None:
    entry = entry_of(RUNS, "films", "dept")
    assert entry["score"] == entry["test"]["accuracy"]
    assert entry["score"]["mean"] == pytest.approx(0.7)
    assert entry["score"]["sd"] == pytest.approx(math.sqrt(0.02))
    assert entry["dev"]["accuracy"]["mean"] == pytest.approx(0.8)  # each a tenth above its test score
    assert (entry["n"], entry["of"]) == (2, 2)
    assert (entry["seconds_per_step"], entry["peak_mib"]) == (2.0, 300.0)
    with_a_failure = entry_of(RUNS, "films", "lora")
    assert with_a_failure["score"] == {"mean": 0.9, "sd": None, "n": 1}
    assert (with_a_failure["n"], with_a_failure["of"]) == (1, 2)


def test_the_average_is_over_seeds_that_are_done_on_all_tasks() -> None:
    dept = entry_of(RUNS, "average", "dept")
    assert dept["score"]["mean"] == pytest.approx((0.5 + 0.6) / 2)
    assert dept["score"]["sd"] == pytest.approx(math.sqrt(0.005))
    assert dept["seconds_per_step"] == 2.0  # the median of 1, 3 and 2
    assert entry_of(RUNS, "average", "lora")["score"] == {"mean": pytest.approx(0.7), "sd": None, "n": 1}


def test_one_task_has_no_average() -> None:
    assert [entry["task"] for entry in summarized(RUNS[:2])] == ["films"]


def test_the_table_of_methods() -> None:
    table = methods_table(results_of(RUNS))
    assert table.header[:4] == ("method", "films accuracy", "plays accuracy", "average")
    dept, lora = table.rows
    assert dept[1:4] == (Entry("70.0 ± 14.1"), Entry("40.0 ± 0.0"), Entry("55.0 ± 7.1"))
    assert lora[1:4] == (Entry("90.0 (1 of 2)", True), Entry("60.0 ± 14.1", True), Entry("70.0 (1 of 2)", True))
    assert [entry.text for entry in dept[4:]] == ["1,234", "2", "300"]
    assert any("1 of 8 runs are not done" in note for note in notes(results_of(RUNS)))


def test_equals_stand_out_both() -> None:
    rows = methods_table(results_of([run("films", method, 0, 0.5) for method in ("dept", "lora")])).rows
    assert [row[1] for row in rows] == [Entry("50.0", True)] * 2


def test_the_table_of_runs_has_all_metrics_and_tells_a_failure() -> None:
    rows = [[entry.text for entry in row] for row in runs_table(results_of(RUNS)).rows]
    assert rows[0][:6] == ["films", "dept", "0", "accuracy 60.0, f1 50.0", "accuracy 70.0", "20"]
    assert rows[3][3] == "failed: the loss is not finite"
    missing = runs_table(results_of([{"task": "films", "method": "dept", "seed": 0, "status": "missing"}]))
    assert missing.rows[0][3].text == "not run yet"


def test_a_peak_that_counts_earlier_runs_is_marked() -> None:
    results = results_of([run("films", "dept", 0, 0.5, peak_of=WITH_OTHERS)])
    assert runs_table(results).rows[0][8].text.endswith(" †")
    assert any("--isolate" in note for note in notes(results))
    together = results_of([run("films", "dept", 0, 0.5, peak_of=IN_POPULATION)])
    assert runs_table(together).rows[0][8].text.endswith(" ‡")
    assert any(note.startswith("‡") for note in notes(together))
    after = results_of([run("films", "dept", 0, 0.5, peak_of=AFTER_OTHERS)])
    assert "†" not in markdown(after)
    assert any("--isolate" in note for note in notes(after))
    assert not any("--isolate" in note for note in notes(results_of(RUNS)))


def test_markdown_means_what_it_says() -> None:
    text = markdown(results_of([run("films", "dept", 0, 0.5), failed("films", "lora", 0, "a|b <script> *c*\nd")]))
    assert r"failed: a\|b \<script> \*c\* d" in text
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("## All runs")]
    for lines in tables:
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


def test_a_line_of_the_log_that_was_cut_off_is_passed_over(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 0.5, "grad_norm": 1.0}, {"step": 2, "dev/f1": None}, {"step": 2, "dev/accuracy": 0.25}]
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    assert read_curve(file) == {"loss": [[1, 0.5]], "dev/accuracy": [[2, 0.25]]}
    assert read_curve(tmp_path / "none.jsonl") == {}
