"""The comparison with torch + peft: it runs, resumes, and says what the numbers say."""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from benchmarks import cases, collectives, decode, methods, population, quantization, report, scaling
from benchmarks.command import FORMAT, Benchmark, load, write_between
from benchmarks.compare import COMPARE
from deptjax.errors import UserError
from deptjax.methods import rank_for_budget
from tests.benchmarks_process import ROOT, run_benchmark, table_in


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """Returns the results file and the printed table of a quick run of one section."""
    pytest.importorskip("torch")  # the other side
    output = tmp_path_factory.mktemp("benchmarks") / "results.json"
    run = run_benchmark("compare", "--quick", "--sections", "shared", "--steps", "2", "--output", str(output))
    assert run.returncode == 0, run.stderr
    return output, run.stdout


def entrants(path: pathlib.Path, key: str) -> dict[str, dict[str, Any]]:
    """Returns a contest's entrants by name."""
    return {entrant["name"]: entrant for entrant in json.loads(path.read_text())["contests"][key]["entrants"]}


def test_both_sides_do_the_same_work(measured: tuple[pathlib.Path, str]) -> None:
    found = entrants(measured[0], "shared llama-tiny pt100")
    assert set(found) == {"deptjax pt100", "deptjax pt100 copied", "torch pt100"}
    for entrant in found.values():
        assert entrant["parameters"] == 100 * 32
        assert len(entrant["seconds"]) == len(entrant["losses"]) == 2
        assert entrant["rows"] == 2 * 2
        assert min(entrant["seconds"]) > 0
        assert entrant["peak_mib"] > 50
    # A shared prompt is another way to the same numbers.
    shared, copied = found["deptjax pt100"], found["deptjax pt100 copied"]
    np.testing.assert_allclose(shared["losses"], copied["losses"], rtol=1e-4)


def test_the_table_has_every_row_and_warns_of_tiny_models(measured: tuple[pathlib.Path, str]) -> None:
    _, table = measured
    assert table.count("\n| llama-tiny, 2 x 8 | prompt tuning, 100 vectors") == 2
    assert "a copy in every row" in table
    assert "these numbers mean nothing" in table
    assert "Aims" not in table


def test_resume_keeps_what_was_measured(measured: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> None:
    output = tmp_path / "results.json"
    output.write_bytes(measured[0].read_bytes())
    options = ("--quick", "--sections", "shared,buckets", "--steps", "2", "--output", str(output))
    run = run_benchmark("compare", *options, "--resume")
    assert run.returncode == 0, run.stderr
    assert entrants(output, "shared llama-tiny pt100") == entrants(measured[0], "shared llama-tiny pt100")
    found = entrants(output, "buckets synthetic")
    bucketed, padded = found["deptjax dept40 buckets"], found["deptjax dept40 max"]
    assert bucketed["rows"] == 32 * 4  # a whole window of the pipeline
    assert padded["rows"] == 2 * 4
    assert bucketed["programs"] == 3
    assert padded["programs"] == 1

    run = run_benchmark("compare", *options, "--resume", "--scan")
    assert run.returncode == 2
    assert "drop --resume" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_a_table_without_results_is_a_mistake_in_one_line(tmp_path: pathlib.Path) -> None:
    run = run_benchmark("compare", "--table", "--output", str(tmp_path / "none.json"))
    assert run.returncode == 2
    assert run.stderr.startswith("compare: error:")
    assert len(run.stderr.strip().splitlines()) == 1


def made_up_results(prompt: float, dept: float, torch: float) -> dict[str, Any]:
    """Returns results with the shape of real ones, and these seconds."""

    def entrant(side: str, model: str, method: str, seconds: float, **spec: Any) -> dict[str, Any]:
        fields = {"share_prompt": True, "text": None, "padding": "max", "batch": 4, "source": 256, **spec}
        return {
            "spec": {"side": side, "model": model, "method": method, **fields},
            "seconds": [seconds, 2 * seconds, 9.0],
            "others": [0.0, 0.0, 0.0],
            "rows": 12,
            "parameters": 51200,
            "compile_s": 0.0,
            "programs": 1,
            "peak_mib": 1000.0,
        }

    train = [
        entrant("deptjax", "t5-small", "pt100", prompt),
        entrant("deptjax", "t5-small", "dept20", dept),
        entrant("torch", "t5-small", "pt100", torch),
        entrant("torch", "t5-small", "dept20", torch),
    ]
    return {
        "format": FORMAT,
        "settings": {"quick": False, "threads": 2, "scan": False},
        "machine": {"cpu": "a processor", "date": "2030-01-02", "python": "3.11.0"},
        "versions": {"jax": "1.2.3"},
        "contests": {
            "train t5-small": {"section": "train", "title": "t5-small", "entrants": train},
            "train t5-base": {"section": "train", "title": "t5-base", "error": "too little memory"},
        },
    }


def test_aims_are_met_or_not_by_the_numbers() -> None:
    text = "t5-small, source 256: a DePT m=20 step takes at most 0.78 of prompt tuning's"
    for dept, verdict in ((0.5, "met (0.50)."), (0.9, "**not met** (0.90).")):
        table = report.markdown(made_up_results(1.0, dept, 2.0))
        assert f"- {text}: {verdict}" in table
        assert "- t5-base, source 256" in table
        assert "3 times the examples a second of padding all to 256: not measured" in table


def test_the_table_gives_medians_of_ratios_and_names_failures() -> None:
    table = report.markdown(made_up_results(1.0, 0.5, 2.0))
    row = next(line for line in table.splitlines() if "prompt tuning, 100 vectors" in line)
    # Medians of 1, 2, 9 and of 2, 4, 9 seconds; the ratios are 0.5, 0.5 and 1.
    assert [cell.strip() for cell in row.split("|")][3:8] == ["51,200", "2.000", "4.000", "0.50", "512 (256)"]
    assert "Not measured: t5-base (too little memory)." in table


def test_a_busy_machine_is_said() -> None:
    results = made_up_results(1.0, 0.5, 2.0)
    assert "noisy" not in report.markdown(results)
    busy = copy.deepcopy(results)
    for entrant in busy["contests"]["train t5-small"]["entrants"]:
        entrant["others"] = [0.5, 0.5, 0.5]
    assert "Other work took 50% of the machine" in report.markdown(busy)


def test_the_readme_changes_between_its_markers_only(tmp_path: pathlib.Path) -> None:
    readme = tmp_path / "README.md"
    begin, end = COMPARE.markers
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    write_between(readme, "new", begin, end)
    assert readme.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    for text in ("no markers", f"{end}\n{begin}", f"{begin}\n{begin}\n{end}"):
        readme.write_text(text)
        with pytest.raises(UserError, match="once each"):
            write_between(readme, "new", begin, end)
        assert readme.read_text() == text


def test_torch_gets_the_rank_that_deptjax_chooses() -> None:
    for size in cases.SIZES.values():
        for method in ("dept20", "dept40", "dept60"):
            rank = rank_for_budget(cases.vectors(method), cases.MAX_LENGTH, size.width)
            assert cases.dept_rank(method, size.width) == rank


def test_every_row_that_is_promised_is_planned() -> None:
    planned = cases.contests(cases.SECTIONS)
    assert len({contest.key for contest in planned}) == len(planned)
    rows = {(c.section, e.model, e.method, e.side) for c in planned for e in c.entrants}
    for model in ("t5-small", "t5-base", "smollm2-135m"):
        for method in cases.TITLES:
            assert {("train", model, method, "deptjax"), ("train", model, method, "torch")} <= rows
    # An aim compares two methods: they take their steps in one contest.
    for section in ("train", "short"):
        for model in ("t5-small", "t5-base"):
            assert any(
                {e.method for e in c.entrants} == {"pt100", "dept20"}
                for c in planned
                if c.section == section and c.entrants[0].model == model
            )


def test_decoding_is_compared_in_one_run(tmp_path: pathlib.Path) -> None:
    """Both sides decode as many tokens; the table has a row for each prompt, and the aims their worst case."""
    pytest.importorskip("torch")  # the other side
    output, page = tmp_path / "decode.json", tmp_path / "page.md"
    page.write_text("before\n<!-- decode:begin -->\nold\n<!-- decode:end -->\nafter\n")
    arguments = ("--quick", "--only", "llama-tiny", "--rounds", "2", "--output", str(output))
    run = run_benchmark("decode", *arguments, "--write-page", str(page))
    assert run.returncode == 0, run.stderr
    (contest,) = json.loads(output.read_text())["contests"].values()
    assert [decoder["name"] for decoder in contest["decoders"] if "mixed" in decoder["name"]] == [
        "deptjax dept20 mixed",
        "deptjax pt100 mixed",
    ]
    assert len(contest["decoders"]) == 8
    assert all(len(decoder["seconds"]) == 2 and min(decoder["seconds"]) > 0 for decoder in contest["decoders"])
    assert page.read_text().startswith("before\n<!-- decode:begin -->\nMeasured ")
    rows = [line for line in run.stdout.splitlines() if line.startswith("| llama-tiny, 8 |")]
    assert len(rows) == 5
    assert sum("cannot" in row for row in rows) == 2
    again = run_benchmark("decode", "--table", "--output", str(output))
    assert again.stdout == run.stdout
    wrong = run_benchmark("decode", "--only", "gpt", "--output", str(output))
    assert (wrong.returncode, wrong.stderr.strip()) == (2, "decode: error: --only: no contest has 'gpt' in its name")


@pytest.mark.parametrize(
    ("benchmark", "page"),
    [
        (COMPARE, "README.md"),
        (decode.DECODE, "README.md"),
        (population.POPULATION, "benchmarks/README.md"),
        (quantization.QUANTIZATION, "benchmarks/README.md"),
        (scaling.SCALING, "docs/scaling.md"),
        (methods.METHODS, "docs/methods.md"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_table_is_of_the_stored_run(benchmark: Benchmark, page: str) -> None:
    assert table_in(ROOT / page, benchmark) == benchmark.markdown(load(benchmark.output))


def test_each_methods_page_has_its_line_of_the_table() -> None:
    results = load(methods.METHODS.output)
    for kind in results["methods"]:
        page = ROOT / "docs" / "methods" / f"{kind}.md"
        assert table_in(page, methods.METHODS) == methods.markdown(results, [kind])


def test_every_way_of_quantising_was_measured() -> None:
    results = load(quantization.QUANTIZATION.output)
    measured = [(row["dtype"], row["quantize"], row["head"]) for row in results["rows"]]
    assert measured == [(way.dtype, way.quantize, way.head) for way in quantization.WAYS]


def test_a_population_is_compared_with_at_least_three_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert population.main(["--steps", "2"]) == 2
    assert capsys.readouterr().err == "population: error: --steps is 2; it must be at least 3\n"


def test_devices_send_each_other_what_is_expected_and_no_more(tmp_path: pathlib.Path) -> None:
    """Compiled for eight devices: all-gathers of weights only where they are split, sums of activations likewise."""
    output = tmp_path / "results.json"
    run = run_benchmark("compare", "--sections", "collectives", "--output", str(output))
    assert run.returncode == 0, run.stderr
    records = json.loads(output.read_text())["collectives"]
    assert len(records) == 2 * 3 * 3
    for record in records:
        assert not collectives.excess(record), (record["model"], record["method"], record["mesh"])
        # What is expected is near what is there, and not a bound that holds whatever is sent.
        largest = max(record["expected"], key=record["expected"].__getitem__)
        assert record["bytes"][largest] > 0.8 * record["expected"][largest], record
    assert run.stdout.count("| yes |") == len(records)
    more = {**records[0], "bytes": {**records[0]["bytes"], "all-gather": 1e6}}
    assert collectives.excess(more) == ["all-gather of 1,000 kB, expected 0"]
