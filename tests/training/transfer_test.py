"""Runs that start from another task's prompt, and how alike prompts are."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import DeepPromptTuning, DePT, FullFineTuning, LoRA, Method, PrefixTuning, PromptTuning
from deptjax.methods.base import Texts, method_to_config
from deptjax.prompt import Prompt
from deptjax.testing import tiny_llama
from deptjax.training.config import TrainConfig
from deptjax.training.run import train
from deptjax.training.transfer import similar_prompts
from deptjax.training.tuning import Tuning
from deptjax.typing import Tree
from tests.cases import backbone_of, case_of, make_case
from tests.reviews import review_task

DEPT = DePT(prompt_length=6, rank=4, max_length=32)
METHODS: dict[str, Method] = {
    "dept": DEPT,
    "prompt_tuning": PromptTuning(prompt_length=6),
    "prefix_tuning": PrefixTuning(prefix_length=3),
    "lora": LoRA(rank=2),
    "full": FullFineTuning(),
}


def tuned_prompt(method: Method, seed: int = 0) -> Prompt:
    """Returns a prompt whose every number is drawn anew, as none is where training starts."""
    case = make_case(backbone_of("llama"), method)
    random = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(leaf.dtype), case.trainable)
    return Prompt.build(method_to_config(case.model.method), drawn, case.backbone)


def first_parameters(method: Method, **settings: object) -> Tree:
    """Returns the parameters of a run before its first step."""
    tuning = Tuning.prepare(backbone_of("llama"), method, review_task(), TrainConfig(**settings))  # type: ignore[arg-type]
    return jax.tree.map(np.asarray, tuning.start()[0])


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_starts_from_a_prompt_of_its_own(kind: str, tmp_path: pathlib.Path) -> None:
    source = tuned_prompt(METHODS[kind])
    source.save(tmp_path / "source")
    start = first_parameters(METHODS[kind], start_from=tmp_path / "source")
    jax.tree.map(np.testing.assert_array_equal, start, source.trainable)


@pytest.mark.parametrize("parts", [("prompt",), ("lora_a",), ("lora_a", "lora_b")])
def test_a_part_is_taken_and_the_rest_starts_anew(parts: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    source = tuned_prompt(DEPT)
    source.save(tmp_path / "source")
    start = first_parameters(DEPT, start_from=str(tmp_path / "source"), start_parts=parts)["input"]
    anew = first_parameters(DEPT)["input"]
    for name, leaf in start.items():
        np.testing.assert_array_equal(leaf, (source.trainable["input"] if name in parts else anew)[name])


def test_a_soft_prompt_goes_from_one_method_to_another(tmp_path: pathlib.Path) -> None:
    source = tuned_prompt(METHODS["prompt_tuning"])
    source.save(tmp_path / "source")
    start = first_parameters(DEPT, start_from=str(tmp_path / "source"), start_parts=["prompt"])
    np.testing.assert_array_equal(start["input"]["prompt"], source.trainable["input"]["prompt"])
    tuned_prompt(DEPT).save(tmp_path / "dept")
    alone = first_parameters(METHODS["prompt_tuning"], start_from=str(tmp_path / "dept"))
    assert alone["input"].keys() == {"prompt"}


def test_another_scaling_means_the_same_offsets(tmp_path: pathlib.Path) -> None:
    source = tuned_prompt(DEPT)  # 8 / sqrt(4) = 4
    source.save(tmp_path / "source")
    plain = first_parameters(dataclasses.replace(DEPT, scaling="none"), start_from=str(tmp_path / "source"))["input"]
    own = source.trainable["input"]
    np.testing.assert_allclose(plain["lora_a"] @ plain["lora_b"], 4.0 * (own["lora_a"] @ own["lora_b"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "parts", "told"),
    [
        (
            DePT(prompt_length=5, rank=4, max_length=32),
            None,
            r"input/prompt of shape \(6, 24\), and this run's is \(5,",
        ),
        (
            DePT(prompt_length=6, rank=4, max_length=16),
            None,
            r"input/lora_a of shape \(32, 4\), .* or leave lora_a out",
        ),
        (METHODS["lora"], None, r"\(method 'dept'\) has no backbone/.*; it has .*lora_a.*: name in start_parts what"),
        (METHODS["lora"], ("prompt",), "start_parts: method 'lora' has no 'prompt'; it has lora_a, lora_b"),
        (DEPT, ("promt",), r"start_parts: method 'dept' has no 'promt'; .* Did you mean 'prompt'\?"),
    ],
)
def test_what_does_not_fit_is_told(
    method: Method, parts: tuple[str, ...] | None, told: str, tmp_path: pathlib.Path
) -> None:
    tuned_prompt(DEPT).save(tmp_path / "source")
    with pytest.raises(UserError, match=told) as caught:
        first_parameters(method, start_from=str(tmp_path / "source"), start_parts=parts)
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not a saved prompt"):
        first_parameters(DEPT, start_from=str(tmp_path))
    source = tuned_prompt(DEPT)
    dataclasses.replace(source, fingerprint={**source.fingerprint, "width": 99}).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"other was tuned on 'tiny-llama', not on 'tiny-llama': width is 24, not 99"):
        first_parameters(DEPT, start_from=str(tmp_path / "other"))
    with pytest.raises(UserError, match="start_parts is given, and no start_from"):
        TrainConfig(start_parts=("prompt",))
    with pytest.raises(UserError, match="start_parts is 'prompt'; give a list of names"):
        TrainConfig(start_from="source", start_parts="prompt")  # type: ignore[arg-type]


def test_a_prompt_in_parts_is_taken_as_a_soft_prompt(tmp_path: pathlib.Path) -> None:
    case_of("llama", "dpt").prompt().save(tmp_path / "dpt")
    told = r"prompt of 'dpt' \(prompt_u, .*its soft prompt alone is taken by prompt_init"
    with pytest.raises(UserError, match=told):
        first_parameters(PromptTuning(5), start_from=str(tmp_path / "dpt"))
    first_parameters(PromptTuning(5, prompt_init=str(tmp_path / "dpt")))


def test_a_soft_prompt_and_one_at_every_layer_begin_with_each_other(tmp_path: pathlib.Path) -> None:
    """The first layer's is the soft prompt, and lies elsewhere: `prompt_init` takes it, and `start_from` says so."""
    deep, plain = DeepPromptTuning(6), METHODS["prompt_tuning"]
    for method, other in ((deep, plain), (plain, deep)):
        source, place = tuned_prompt(method), tmp_path / method.kind
        source.save(place)
        with pytest.raises(UserError, match="its soft prompt alone is taken by prompt_init"):
            first_parameters(other, start_from=str(place))
        started = first_parameters(type(other)(6, prompt_init=str(place)))
        found = other.soft_prompt(started, 24)
        np.testing.assert_array_equal(found, source.soft_prompt())


def test_a_run_belongs_to_the_prompt_it_started_from(tmp_path: pathlib.Path) -> None:
    tuned_prompt(DEPT).save(tmp_path / "source")
    settings = {"steps": 2, "batch_size": 4, "eval_every": 0, "buckets": 1, "progress": False}
    asked = (backbone_of("llama"), DEPT, review_task(), tmp_path / "run")
    run = train(*asked, **settings, start_from=str(tmp_path / "source"))
    assert run.prompt is not None
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["start"] == Prompt.load(tmp_path / "source").run_id
    )
    again = train(*asked, **settings, start_from=str(tmp_path / "source"))
    assert again.prompt is not None
    assert again.prompt.run_id == run.prompt.run_id
    tuned_prompt(DEPT, seed=1).save(tmp_path / "source")
    with pytest.raises(UserError, match=r"another configuration \(start was \w+, is now \w+\)"):
        train(*asked, **settings, start_from=str(tmp_path / "source"))


def soft(*rows: list[float]) -> Prompt:
    """Returns a prompt of these vectors."""
    backbone = backbone_of("llama")
    vectors = np.zeros((len(rows), 24), np.float32)
    for vector, row in zip(vectors, rows, strict=True):
        vector[: len(row)] = row
    return Prompt(PromptTuning(len(rows)), {"input": {"prompt": vectors}}, backbone.name, backbone.fingerprint, {})


def test_prompts_are_as_alike_as_their_mean_vectors(tmp_path: pathlib.Path) -> None:
    target = soft([3.0, 1.0], [1.0, 3.0])  # its mean is (2, 2)
    soft([1.0]).save(tmp_path / "saved")
    bank = {
        "opposite": soft([-1.0, -1.0]),
        "saved": tmp_path / "saved",
        "same": soft([5.0], [0.0, 5.0]),
        "zero": soft([]),
    }
    ranking = similar_prompts(bank, target)
    assert [name for name, _ in ranking] == ["same", "saved", "zero", "opposite"]
    np.testing.assert_allclose([cosine for _, cosine in ranking], [1.0, np.sqrt(0.5), 0.0, -1.0], rtol=0, atol=1e-6)
    soft([3.0, 1.0], [1.0, 3.0]).save(tmp_path / "target")
    assert similar_prompts(bank, tmp_path / "target") == ranking


@pytest.mark.parametrize("name", ["accept", "dept", "dpt", "mpt", "prompt_tuning"])
def test_a_prompt_in_parts_is_the_one_that_these_make(name: str) -> None:
    """What the model puts in front of a text, whatever the method keeps."""
    case = case_of("llama", name)
    embeds = jax.numpy.zeros((1, 3, case.backbone.width))
    fill = case.model.method.sites().input
    wanted, _ = fill.apply({"params": case.moved["input"]}, embeds, Texts.whole(embeds), method="streams")
    np.testing.assert_array_equal(case.prompt().soft_prompt(), wanted)
    alike = Prompt(PromptTuning(5), {"input": {"prompt": np.array(wanted)}}, "x", case.backbone.fingerprint, {})
    assert similar_prompts({name: case.prompt()}, alike) == [(name, pytest.approx(1.0))]


@pytest.mark.parametrize("name", ["lopa", "idpg", "attempt"])
def test_there_is_no_one_prompt_where_each_text_has_its_own(name: str, tmp_path: pathlib.Path) -> None:
    told = f"of method '{name}', which makes one for each text"
    with pytest.raises(UserError, match=told):
        similar_prompts({"x": case_of("llama", name).prompt()}, soft([1.0]))
    case_of("llama", name).prompt().save(tmp_path / "source")
    with pytest.raises(UserError, match=f"^prompt_init: .*source holds no soft prompt: it is {told}"):
        first_parameters(PromptTuning(5, prompt_init=str(tmp_path / "source")))


def test_what_cannot_be_compared_is_told() -> None:
    target = soft([1.0])
    for none in ({}, ["runs/films/prompt"]):
        with pytest.raises(UserError, match="give at least one prompt, by name"):
            similar_prompts(none, target)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'lora' holds no soft prompt: it is of method 'lora', which has none"):
        similar_prompts({"lora": tuned_prompt(METHODS["lora"])}, target)
    other = dataclasses.replace(target, backbone="wide", fingerprint=tiny_llama(width=48, num_heads=6).fingerprint)
    with pytest.raises(UserError, match="'far' was tuned on 'wide', and the target on 'tiny-llama'"):
        similar_prompts({"far": other}, target)
