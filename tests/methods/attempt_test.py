"""ATTEMPT and MPT: formulas against numpy, counts, where they start, what stays as it is, and mistakes."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.inference.prompt_bank import PromptBank
from deptjax.methods import ATTEMPT, MPT, PromptTuning
from deptjax.methods.base import FIXED, Texts, input_parameters
from deptjax.prompt import Prompt
from deptjax.training.run import train
from deptjax.training.state import count_parameters, count_trained
from tests.cases import backbone_of, case_of, source_prompts
from tests.reviews import review_task

B, T, D, M, S, G = 3, 6, 11, 4, 2, 5
SMALL = {"steps": 4, "batch_size": 4, "eval_every": 2, "buckets": 1, "log_every": 2, "progress": False}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def test_the_mixture_is_the_papers() -> None:
    method = ATTEMPT(prompt_length=M, sources="a,b", bottleneck=G)
    shapes = jax.eval_shape(lambda: input_parameters(method, jax.random.key(0), D))
    params = {name: draw(*like.shape, seed=i) for i, (name, like) in enumerate(shapes.items())}
    embeds, lengths = draw(B, T, D, seed=9), (6, 2, 4)
    mask = np.arange(T)[None] < np.asarray(lengths)[:, None]
    prompt, same = method.apply({"params": params}, jnp.asarray(embeds), Texts(jnp.asarray(mask)), method="streams")
    wanted = []
    for row, length in zip(embeds, lengths, strict=True):
        hidden = row[:length].max(0) @ params["w_down"]
        hidden = hidden / (1 + np.exp(-hidden)) @ params["w_up"]
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * params["norm_scale"] + params["norm_bias"]
        prompts = np.stack([params["prompt"], *params["sources"]])
        scores = np.array([p.max(0) @ hidden for p in prompts]) / (D * math.e)
        shares = np.exp(scores) / np.exp(scores).sum()
        wanted.append(params["prompt"] + np.tensordot(shares, prompts, 1))
    np.testing.assert_allclose(prompt, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(same, embeds)


def test_parameters_are_as_many_as_published() -> None:
    """232K of ATTEMPT on T5-base, six source prompts aside; 77.6K of MPT."""
    method = ATTEMPT(sources="a,b,c,d,e,f")
    shapes = jax.eval_shape(lambda: input_parameters(method, jax.random.key(0), 768))
    assert count_trained(shapes, {name: method.group((name,)) for name in shapes}) == 231_936
    assert count_parameters(shapes) == 231_936 + 6 * 76_800
    assert count_parameters(jax.eval_shape(lambda: input_parameters(MPT(), jax.random.key(0), 768))) == 77_668


def test_a_run_keeps_its_sources_and_needs_them_no_more(tmp_path: pathlib.Path) -> None:
    backbone = backbone_of("llama")
    folders = [pathlib.Path(place) for place in source_prompts(backbone_of("llama")).split(",")]
    moved = [tmp_path / folder.name for folder in folders]
    for folder, place in zip(folders, moved, strict=True):
        Prompt.load(folder).save(place)
    method = ATTEMPT(5, ",".join(map(str, moved)), bottleneck=7)
    run = train(backbone, method, review_task(), tmp_path / "run", **SMALL)  # type: ignore[arg-type]
    assert run.trainable_parameters == 5 * 24 + 2 * 24 * 7 + 2 * 24
    saved = Prompt.load(tmp_path / "run" / "prompt")
    sources = np.stack([Prompt.load(folder).trainable["input"]["prompt"] for folder in folders])
    np.testing.assert_array_equal(saved.trainable["input"]["sources"], sources)
    for place in moved:
        place.rename(place.with_name(f"{place.name}-away"))
    assert evaluate(backbone, saved, review_task(), split="dev") == pytest.approx(saved.metrics)
    # Another run, with other sources, is another task of the same bank: no folder is asked for, and none compared.
    swapped = {"input": {**saved.trainable["input"], "sources": 2 * saved.trainable["input"]["sources"][::-1]}}
    others = ATTEMPT(5, "not/there,nor/this", bottleneck=7)
    other = dataclasses.replace(saved, method=others, trainable=swapped)
    assert PromptBank(backbone, {"a": saved}).accepts(others)
    assert not PromptBank(backbone, {"a": saved}).accepts(ATTEMPT(5, "not/there", bottleneck=7))
    texts = ["the film was good", "a bad story"]
    both = Predictor(backbone, {"a": saved, "b": other})(texts * 2, ["a", "a", "b", "b"])
    alone = [*Predictor(backbone, saved)(texts), *Predictor(backbone, other)(texts)]
    assert [a.scores for a in both] == [pytest.approx(a.scores, abs=1e-6) for a in alone]
    assert both[0].scores != pytest.approx(both[2].scores, abs=1e-4)


def test_mpt_starts_as_its_prompt_and_is_saved_as_one(tmp_path: pathlib.Path) -> None:
    run = train(backbone_of("llama"), MPT(prompt_length=5), review_task(), tmp_path / "run", **SMALL)  # type: ignore[arg-type]
    assert run.prompt is not None
    assert isinstance(run.prompt.method, PromptTuning)
    trainable = case_of("llama", "mpt").moved
    _, folded = MPT(prompt_length=5).fold(trainable)
    p = {name: np.asarray(leaf) for name, leaf in trainable["input"].items()}
    np.testing.assert_allclose(folded["input"]["prompt"], p["prompt"] * np.outer(p["u"], p["v"]), rtol=1e-6)


def test_mistakes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="sources is empty; name the folders"):
        ATTEMPT()
    assert ATTEMPT(sources=["a", pathlib.Path("b")]) == ATTEMPT(sources="a,b")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="attempt: sources is or holds a int; name folders"):
        ATTEMPT(sources=["a", 3])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"temperature is 0.0; it must be above 0"):
        ATTEMPT(sources="a", temperature=0.0)

    def told(sources: str, length: int = 5, backbone: str = "llama") -> str:
        with pytest.raises(UserError) as caught:
            train(backbone_of(backbone), ATTEMPT(length, sources), review_task(), tmp_path / "run", **SMALL)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert told("./gone") == "attempt: sources: gone is not a saved prompt: it has no prompt.json"
    assert "has 5 vectors, and prompt_length is 4; give it the length" in told(source_prompts(backbone_of("llama")), 4)
    assert "has width 24, the backbone 23; choose a prompt of this backbone" in told(
        source_prompts(backbone_of("llama")), 5, "t5"
    )
    case_of("llama", "dept").prompt().save(tmp_path / "dept")
    assert "holds 'input/lora_a' beside the soft prompt; choose a prompt of prompt_tuning" in told(
        str(tmp_path / "dept")
    )
    assert not (tmp_path / "run").exists()
    assert ATTEMPT(sources="a").group(("sources",)) == FIXED
