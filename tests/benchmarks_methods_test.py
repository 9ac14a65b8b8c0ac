"""What the methods of a suite cost is measured from the suite's own file, goes on, and is shown beside its scores."""

from __future__ import annotations

import pathlib

import pytest

from benchmarks import methods
from benchmarks.command import load
from deptjax.methods.base import method_from_config, method_to_config
from deptjax.models.sizes import SIZES
from deptjax.planning.budget import trained_parameters
from tests.benchmarks_process import run_benchmark, table_in
from tests.cli.conftest import write_rows
from tests.cli.folders import save_llama

GIN = """
load_backbone.name_or_path = "{model}"
suite.tasks = ("films",)
suite.methods = ("prompt_tuning", "lora")
films/FileSource.train = "{rows}"
films/FileSource.dev_size = 4
films/FileSource.test_size = 10
Task.input = "{{text}}\\nlabel :"
Task.labels = ("negative", "positive")
TrainConfig.batch_size = 4
TrainConfig.max_length = 24
PromptTuning.prompt_length = 3
LoRA.rank = 2
"""


# The size of each method that the suite's file leaves to the budget, and the step in which it can grow.
FREE = {
    "dept": ("rank", 1),
    "prompt_tuning": ("prompt_length", 1),
    "lopa": ("hidden", 1),
    "adept": ("rank", 1),
    "accept": ("offset_codewords", 1),
    "idpg": ("hidden", 16),  # PHM's factors
    "dpt": ("rank", 1),
    "residual_prompt_tuning": ("bottleneck", 1),
    "p_tuning": ("hidden", 1),
    "mpt": ("prompt_length", 1),
    "prefix_tuning": ("prefix_length", 1),
    "deep_prompt_tuning": ("prompt_length", 1),
    "lora": ("rank", 1),
    "attempt": ("bottleneck", 1),
}


def test_sizes_are_the_largest_within_the_budget() -> None:
    recipes = methods.suite_of(methods.parse([]), None).plan("unused").recipes
    budget, config, seen = 100 * 576, SIZES["smollm2-135m"], set()
    for method in (recipe.method for recipe in recipes if recipe.task.name == "trec6"):
        if method.encoder_choice() is not None:
            method = method.with_encoding_width(384)  # MiniLM's
        name, step = FREE[method.kind]
        fields = method_to_config(method)
        larger = method_from_config({**fields, name: fields[name] + step})
        assert trained_parameters(config, method) <= budget < trained_parameters(config, larger), method.kind
        seen.add(method.kind)
    assert seen == set(FREE)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the words of a small measurement, and where its results go."""
    folder = tmp_path_factory.mktemp("methods")
    model, rows = save_llama(folder / "tiny", seed=0), write_rows(folder / "films.jsonl", 48)
    gin = folder / "suite.gin"
    gin.write_text(GIN.format(model=model, rows=rows))
    sizes = ("--steps", "2", "--predictions", "5", "--rounds", "1")
    return ["methods", "--gin-file", str(gin), *sizes, "--output", str(folder / "methods.json")]


def test_costs_are_measured_and_go_on(asked: list[str], tmp_path: pathlib.Path) -> None:
    output = pathlib.Path(asked[-1])
    part = run_benchmark(*asked, "--only", "lora")
    assert part.returncode == 0, part.stderr
    assert list(load(output)["methods"]) == ["lora"]
    assert "prompt_tuning" not in part.stdout
    kept = load(output)["methods"]["lora"]

    pages = tmp_path / "pages"
    pages.mkdir()
    for name in ("lora", "prompt_tuning"):
        (pages / f"{name}.md").write_text("ours\n<!-- methods:begin -->\n<!-- methods:end -->\n")
    whole = run_benchmark(*asked, "--resume", "--write-pages", str(pages))
    assert whole.returncode == 0, whole.stderr
    found = load(output)
    assert found["methods"]["lora"] == kept
    for own in found["methods"].values():
        (run,) = own["runs"]
        assert min(run["step_s"], run["predict_s"], run["peak_mib"]) > 0
    assert found["methods"]["prompt_tuning"]["runs"][0]["parameters"] == 3 * 24
    for name in ("lora", "prompt_tuning"):
        assert table_in(pages / f"{name}.md", methods.METHODS) == methods.markdown(found, [name])

    other = run_benchmark(*[word if word != "2" else "3" for word in asked], "--resume")
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 1)
    assert "drop --resume" in other.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "prompt_tunin"], "Did you mean 'prompt_tuning'"),
        (["--steps", "1"], "--steps must be at least 2"),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], told: str, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert methods.main([*asked[1:-2], "--output", "unused.json", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_the_score_of_one_label_for_all_rows(asked: list[str]) -> None:
    options = methods.parse([*asked[1:]])
    rows = methods.suite_of(options, None).plan("unused").recipes[0].task.load().test
    most = max(sum(row.values["label"] == label for row in rows) for label in ("negative", "positive"))
    assert methods._one_label(options) == {"films": pytest.approx(most / len(rows))}


def test_a_table_shows_scores_beside_costs() -> None:
    def run(step: float, predict: float) -> dict[str, object]:
        costs = {"step_s": step, "predict_s": predict, "peak_mib": 1000.0, "parameters": 1200, "others": 0.01}
        return {**costs, "task": "trec6", "device": "cpu", "jax": "1.2.3"}

    def score(task: str, method: str, mean: float, sd: float | None) -> dict[str, object]:
        return {"task": task, "method": method, "n": 1, "of": 1, "score": {"mean": mean, "sd": sd, "n": 1}}

    results = {
        "settings": {"gin_file": "a.gin", "steps": 24, "predictions": 200},
        "machine": {"cpu": "a processor", "cores": 2, "date": "2030-01-02"},
        "methods": {
            "prompt_tuning": {
                "method": {"method": "prompt_tuning", "prompt_length": 100, "prompt_init": "text"},
                "runs": [run(0.4, 30.0), run(0.2, 20.0), run(0.5, 10.0)],
            },
            "lopa": {
                "method": {"rank": 4, "encoder": "packaged:minilm", "encoder_trainable": False, "alpha": 1.0},
                "runs": [run(0.1, 5.0)],
            },
        },
        "scores": [
            score("trec6", "prompt_tuning", 0.5, 0.02),
            score("sms_spam", "prompt_tuning", 0.9, None),
            score("average", "prompt_tuning", 0.7, None),
        ],
    }
    table = methods.markdown(results)
    assert "| prompt_tuning | 50.0 ± 2.0 | 90.0 | 70.0 |" in table
    assert "| prompt_tuning | prompt_length 100 | 1,200 | 400 | 1.00 | 20.0 | 1,000 |" in table
    assert "| lopa | – | – | – |" in table
    assert "| lopa | rank 4, minilm | 1,200 | 100 | 0.25 | 5.0 | 1,000 |" in table
    assert "medians of 1 to 3 round(s) of 24 steps and 200 predictions" in table
    results["one_label"] = {"trec6": 0.25, "sms_spam": 0.865, "not_run": 0.5}
    assert "| *always the same label* | 25.0 | 86.5 | 55.8 |\n\n" in methods.markdown(results)
    lines = table.splitlines()
    own = [lines[place] for place in (2, 3, 5, 6, 7, 8, 10)]
    assert methods.markdown(results, ["lopa"]).splitlines() == own
