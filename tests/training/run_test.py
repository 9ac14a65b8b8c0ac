"""`train` from end to end on tiny backbones: it learns, writes what it says, compiles little, refuses with a reason."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.data.sources import MemorySource
from deptjax.data.tasks import Task
from deptjax.errors import UserError
from deptjax.inference.predictor import evaluate
from deptjax.methods import DePT, FullFineTuning, LoRA, PromptTuning, ZeroShot
from deptjax.prompt import Prompt
from deptjax.testing import tiny_llama
from deptjax.training.folder import differences
from deptjax.training.run import Run, train
from tests.cases import backbone_of
from tests.reviews import review_rows, review_task

METHOD = DePT(prompt_length=6, rank=4, max_length=32)
SMALL: dict[str, Any] = {"steps": 6, "batch_size": 4, "eval_every": 3, "buckets": 1, "log_every": 2, "progress": False}


def lines(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: pathlib.Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.parametrize(("family", "steps"), [("llama", 150), ("t5", 300)])
def test_default_settings_learn(tmp_path: pathlib.Path, family: str, steps: int) -> None:
    """Eight texts by heart, on a backbone of random weights: rates, schedule and batch size are the defaults."""
    task = review_task(train=8)
    train(backbone_of(family), METHOD, task, tmp_path, steps=steps, buckets=1, eval_every=0, progress=False)
    found = losses(tmp_path)
    assert found[0] > 0.55
    assert np.mean(found[-3:]) < 0.7 * found[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(backbone_of("llama"), METHOD, review_task(), tmp_path_factory.mktemp("run") / "deep" / "er", **SMALL)


def test_what_a_run_leaves_behind(finished: Run) -> None:
    folder = finished.workdir
    assert finished.finished
    assert finished.trainable_parameters == 6 * 24 + (32 + 24) * 4
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "result.json", "prompt", "checkpoints", "tensorboard"} <= names
    steps = [(line["step"], "loss" in line, "dev/accuracy" in line) for line in lines(folder)]
    wanted = [(2, True, False), (3, False, True), (4, True, False), (6, True, False), (6, False, True)]
    assert steps == wanted
    for line in lines(folder):
        if "loss" in line:
            assert {"grad_norm", "examples_per_second", "lr/prompt", "lr/low_rank"} <= set(line)
    result = json.loads((folder / "result.json").read_text())
    prompt = Prompt.load(folder / "prompt")
    assert result["best_step"] in (3, 6)
    assert result["metrics"] == prompt.metrics
    assert prompt.method == METHOD
    assert prompt.backbone == "tiny-llama"
    assert prompt.settings["max_length"] == 32


def test_the_best_prompt_is_kept(finished: Run) -> None:
    """Of the evaluations, the first of the highest; and its metrics are those of the prompt in the folder."""
    scores = {line["step"]: line["dev/accuracy"] for line in lines(finished.workdir) if "dev/accuracy" in line}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert json.loads((finished.workdir / "result.json").read_text())["best_step"] == best
    assert finished.prompt is not None
    again = evaluate(backbone_of("llama"), finished.prompt, review_task(), split="dev")
    assert again == {"dev/accuracy": scores[best]}


def test_a_finished_run_is_returned_as_it_is(finished: Run, caplog: pytest.LogCaptureFixture) -> None:
    before = {p: p.read_bytes() for p in finished.workdir.rglob("*.json*")}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        again = train(backbone_of("llama"), METHOD, review_task(), finished.workdir, **SMALL)
    assert compiled(caplog, "step") == 0
    assert again.finished
    assert again.prompt is not None
    assert finished.prompt is not None
    assert again.prompt.run_id == finished.prompt.run_id
    assert again.seconds_per_step == finished.seconds_per_step
    assert {p: p.read_bytes() for p in finished.workdir.rglob("*.json*")} == before


def test_another_configuration_is_refused_with_its_fields(finished: Run) -> None:
    def refused(method: Any = METHOD, task: Task | None = None, backbone: Any = None, **settings: Any) -> str:
        with pytest.raises(UserError, match="holds a run with another configuration") as caught:
            train(
                backbone or backbone_of("llama"),
                method,
                task or review_task(),
                finished.workdir,
                **{**SMALL, **settings},
            )
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "train.steps was 6, is now 7" in refused(steps=7)
    told = refused(seed=3, prompt_lr=0.5)
    assert "train.seed was 42, is now 3" in told
    assert "learning_rates.prompt was" in told
    assert "method.rank was 4, is now 5" in refused(dataclasses.replace(METHOD, rank=5))
    told = refused(PromptTuning(prompt_length=6))
    assert "method.method was dept, is now prompt_tuning" in told
    assert "method.rank was 4, is now nothing" in told
    assert "task.input was" in refused(task=review_task(input="{text} :"))
    assert "data.train was 48 rows" in refused(task=review_task(train=47))
    assert "backbone.embedding was" in refused(backbone=tiny_llama(seed=1))


def test_a_folder_of_something_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no run of deptjax; choose another workdir"):
        train(backbone_of("llama"), METHOD, review_task(), tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def compiled(caplog: pytest.LogCaptureFixture, name: str) -> int:
    """Returns how many programs of this name were compiled while `jax.log_compiles` was on."""
    return sum(bool(re.match(rf"Compiling (jit\()?{name}\b", r.getMessage())) for r in caplog.records)


def test_the_step_compiles_once_a_shape(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Over three epochs with evaluations and checkpoints between, and over the resumed rest: one program a bucket."""
    rows = [
        {"text": " ".join(["film"] * (2 if i % 2 else 9)), "label": ("positive", "negative")[i % 3 > 0]}
        for i in range(16)
    ]
    task = dataclasses.replace(review_task(), source=MemorySource(rows, rows[:3], rows[:3]))
    settings = {**SMALL, "steps": 12, "buckets": 2, "eval_every": 4, "checkpoint_every": 2}
    method = DePT(prompt_length=7, rank=2, max_length=32)  # of no other test, so that nothing is compiled already
    with jax.log_compiles(), caplog.at_level(logging.WARNING), caplog.at_level(logging.WARNING, logger="jax"):
        train(backbone_of("llama"), method, task, tmp_path, **settings)
    assert compiled(caplog, "step") == 2
    assert compiled(caplog, "token_scores") == 1  # the dev rows are one batch


def test_free_text_is_generated_and_scored(tmp_path: pathlib.Path) -> None:
    task = review_task(labels=(), target="the film is {label}", max_target_length=6, dev=3)
    run = train(backbone_of("t5"), PromptTuning(prompt_length=6), task, tmp_path, **{**SMALL, "steps": 3})
    assert run.prompt is not None
    assert set(run.prompt.metrics) == {"dev/exact_match"}


def test_without_dev_rows_the_last_prompt_is_kept(tmp_path: pathlib.Path) -> None:
    run = train(backbone_of("llama"), LoRA(rank=2), review_task(), tmp_path, **{**SMALL, "eval_every": 0})
    assert run.finished
    assert run.prompt is not None
    assert run.prompt.metrics == {}
    assert json.loads((tmp_path / "result.json").read_text())["best_step"] == 6
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


def test_full_fine_tuning_leaves_the_callers_backbone_as_it_was(tmp_path: pathlib.Path) -> None:
    backbone = backbone_of("llama")
    before = jax.tree.map(np.array, backbone.params)
    run = train(backbone, FullFineTuning(), review_task(), tmp_path, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, backbone.params), before)
    assert run.prompt is not None
    tuned = run.prompt.trainable["backbone"]
    assert jax.tree.structure(tuned) == jax.tree.structure(before)
    assert np.any(tuned["final_norm"]["scale"] != before["final_norm"]["scale"])


def test_dev_texts_of_the_methods_full_length(tmp_path: pathlib.Path) -> None:
    """A dev text is cut to the method's limit and padded no further, also where no bucket would end there."""
    rows = review_rows(8)
    long = [{"text": " ".join(["film"] * 30), "label": "positive"}, *review_rows(3)]
    task = dataclasses.replace(review_task(), source=MemorySource(rows, long, long))
    run = train(backbone_of("llama"), DePT(prompt_length=6, rank=4, max_length=17), task, tmp_path, **SMALL)
    assert run.prompt is not None
    assert evaluate(backbone_of("llama"), run.prompt, task).keys() == {"test/accuracy"}


def test_same_seed_same_bits_other_seed_others(tmp_path: pathlib.Path) -> None:
    method = DePT(prompt_length=6, rank=4, max_length=32, prompt_init="random")
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        run = train(backbone_of("llama"), method, review_task(), tmp_path / str(i), **SMALL, seed=seed)
        assert run.prompt is not None
        runs.append((run.prompt.trainable, losses(run.workdir)))
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert runs[0][1] != runs[2][1]


def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"the loss is not a finite number at step \d .*prompt_lr 3e\+38") as caught:
        train(
            backbone_of("llama"),
            METHOD,
            review_task(),
            tmp_path,
            **{**SMALL, "eval_every": 0, "warmup_steps": 0, "schedule": "constant"},
            prompt_lr=3e38,
        )
    assert "lower the learning rates" in str(caught.value)
    assert "\n" not in str(caught.value)
    for saved in (tmp_path / "prompt").glob("*.safetensors"):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(Prompt.load(saved.parent).trainable))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"few_shot": 16}, "'few_shot' is a field of the task; give the task with it: get_task"),
        ({"batch_sise": 3}, r"there is no setting 'batch_sise'. Did you mean 'batch_size'\?"),
        ({"max_length": 33}, "max_length 33 is more than the 32 of the method; raise the method's max_length"),
        ({"loss": "labels"}, "is 2 tokens"),
        ({"evaluation": "labels"}, "evaluation 'labels' needs labels, and task 'reviews' has none"),
    ],
)
def test_mistakes_leave_no_folder(tmp_path: pathlib.Path, settings: dict[str, Any], told: str) -> None:
    fields: dict[str, Any] = {}
    if "loss" in settings:
        fields = {"verbalizers": {"positive": "good film"}}
    if "evaluation" in settings:
        fields = {"labels": (), "target": "the film is {label}"}
    with pytest.raises(UserError, match=told):
        train(backbone_of("llama"), METHOD, review_task(**fields), tmp_path / "run", **{**SMALL, **settings})
    assert not (tmp_path / "run").exists()


def test_of_another_model_the_first_fields_are_told() -> None:
    old = {"encoder": {"name": "a", "fingerprint": {f"field{i}": 0 for i in range(9)}}, "steps": 1}
    new = {"encoder": {"name": "b", "fingerprint": {f"field{i}": 1 for i in range(9)}}, "steps": 1}
    told = differences(old, new)
    assert told.startswith("encoder.name was a, is now b; encoder.fingerprint.field0 was 0, is now 1; ")
    assert told.endswith("encoder.fingerprint.field4 was 0, is now 1; and 4 more")


@pytest.mark.parametrize(
    ("backbone", "method", "told"),
    [
        ("t5-base", METHOD, "backbone is a str; load one first"),
        (None, "lopa", "method is a str; give one with its sizes"),
        (None, type(METHOD), "method is a type; give one with its sizes"),
    ],
)
def test_names_are_no_models_and_no_methods(tmp_path: pathlib.Path, backbone: Any, method: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        train(backbone or backbone_of("llama"), method, review_task(), tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_nothing_to_train_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="zero_shot has no parameters to train"):
        train(backbone_of("llama"), ZeroShot(), review_task(), tmp_path / "run", **SMALL)
    with pytest.raises(UserError, match="method 'lora' fills no site of this backbone: check its targets, where"):
        train(backbone_of("llama"), LoRA(targets="decoder"), review_task(), tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_rates_in_the_log_follow_the_schedule(tmp_path: pathlib.Path) -> None:
    rates = {"prompt_lr": 0.2, "low_rank_lr": 0.01, "warmup_steps": 2, "low_rank_schedule": "constant"}
    train(backbone_of("llama"), METHOD, review_task(), tmp_path, **{**SMALL, "eval_every": 0, **rates})
    logged = [line for line in lines(tmp_path) if "loss" in line]
    np.testing.assert_allclose([line["lr/prompt"] for line in logged], [0.2, 0.15, 0.05], atol=1e-6)
    np.testing.assert_allclose([line["lr/low_rank"] for line in logged], [0.01, 0.01, 0.01], atol=1e-6)
