"""A model that fills masks, from a folder through training to answers; and what it cannot do, said early."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deptjax
from deptjax.data.sources import MemorySource
from deptjax.errors import UserError
from deptjax.inference.decoding import Decoding
from deptjax.interop.prompts import export_prompt
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt
from deptjax.testing import save_hf_folder, tiny_bert
from deptjax.training.config import TrainConfig
from deptjax.training.tuning import Tuning
from tests.cases import backbone_of, case_of
from tests.reviews import WORDS, review_prompt, review_task

ENGLISH = {"input": "{text} . it is {mask} .", "verbalizers": {"negative": "bad", "positive": "good"}}
COLOURS = {"input": "{mask} : {text}", "verbalizers": {"negative": "red", "positive": "green"}}
TEXTS = ["the plot is good", "this was a very awful ending", "bright", "a dull and sad film", "it was happy"]
METHOD = deptjax.DePT(prompt_length=4, rank=2, max_length=24)


def test_from_a_folder_to_answers(tmp_path: Path) -> None:
    roberta = tiny_bert(position_offset=1, token_types=1, has_pooler=False, scan_layers=True)
    backbone = deptjax.load_backbone(save_hf_folder(roberta, tmp_path / "model"), scan_layers=True)
    labelled = [(label, word) for label, words in WORDS.items() for word in words[:2]]
    rows = [{"text": f"the {n} is {word}", "label": label} for label, word in labelled for n in ("film", "plot")]
    task = dataclasses.replace(review_task(**ENGLISH), source=MemorySource(rows, rows, rows))
    options = {"batch_size": 8, "eval_every": 20, "buckets": 1, "prompt_lr": 0.1, "low_rank_lr": 0.05}
    run = deptjax.train(backbone, METHOD, task, workdir=tmp_path / "run", steps=60, **options)
    assert run.prompt.metrics["dev/accuracy"] == 1.0  # it has learnt these rows
    saved = Prompt.load(tmp_path / "run" / "prompt")
    assert saved.task["input"] == ENGLISH["input"]
    assert deptjax.evaluate(backbone, saved, task) == {"test/accuracy": 1.0}
    answers, again = (deptjax.Predictor(backbone, prompt)(TEXTS) for prompt in (saved, run.prompt))
    assert answers == again
    assert all(set(answer.scores or {}) == {"negative", "positive"} for answer in answers)
    assert [a.text for a in deptjax.Predictor(backbone, saved)([row["text"] for row in rows])] == [
        row["label"] for row in rows
    ]


@functools.cache
def predictor() -> deptjax.Predictor:
    """Returns a predictor of three tasks: two prompts of different sizes in one bank, and one of another template."""
    case = case_of("bert", "dept")
    small = dataclasses.replace(METHOD, prompt_length=2, rank=1, max_length=13)
    tree = jax.tree.map(np.asarray, case.moved["input"])
    cut = {"prompt": tree["prompt"][:2], "lora_a": tree["lora_a"][:, :1], "lora_b": tree["lora_b"][:1]}
    prompts = {"english": review_prompt(case, **ENGLISH), "colours": review_prompt(case, **COLOURS)}
    prompts["small"] = dataclasses.replace(prompts["english"], method=small, trainable={"input": cut})
    return deptjax.Predictor(backbone_of("bert"), prompts, batch_size=8)


def test_tasks_share_a_batch_and_answer_as_alone() -> None:
    names = ["english", "colours", "small"]
    mixed = predictor()([text for text in TEXTS for _ in names], names * len(TEXTS))
    for at, name in enumerate(names):
        alone = predictor()(TEXTS, name)
        for one, other in zip(mixed[at :: len(names)], alone, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert mixed[0].scores != pytest.approx(mixed[1].scores, rel=0.01)
    assert mixed[0].scores != pytest.approx(mixed[2].scores, rel=0.01)


def test_answers_are_those_of_the_model_at_the_mask() -> None:
    """By hand, from the formula: the scores of the labels' tokens at the mask, behind prompt and offset."""
    case = case_of("bert", "dept")
    tokenizer = case.backbone.tokenizer
    ids = jnp.asarray([tokenizer("the plot is good . it is <mask> .")["input_ids"]])
    tree, labels = case.moved["input"], tokenizer.convert_tokens_to_ids(["bad", "good"])
    scale = case.model.method.scales()["lora_b"]

    def logits(module: Any) -> jax.Array:
        offset = (tree["lora_a"] @ tree["lora_b"])[: ids.shape[1]]
        embeds = module.embed(ids) + scale * offset[None]
        states = module.encode(embeds, jnp.ones(ids.shape, bool), tree["prompt"])
        place = jnp.argmax(ids[0] == case.backbone.config.mask_token)
        return module.head(module.masked_head(states[0, place]))[jnp.asarray(labels)]

    module, params = case.backbone.module(), case.backbone.params
    wanted = jax.nn.softmax(jax.jit(lambda: module.apply({"params": params}, method=logits))())
    (answer,) = predictor()(["the plot is good"], "english")
    assert answer.scores == pytest.approx({"negative": float(wanted[0]), "positive": float(wanted[1])}, abs=1e-5)


def test_scores_of_what_may_stand_at_the_mask() -> None:
    words = ["good", "bad", "film"]
    (found,) = predictor().score(["the plot is good"], words, "english")
    (answer,) = predictor()(["the plot is good"], "english")
    share = np.exp(found["good"]) / (np.exp(found["good"]) + np.exp(found["bad"]))
    assert share == pytest.approx((answer.scores or {})["positive"], abs=1e-5)
    with pytest.raises(UserError, match="text 1: 'very good' is 2 tokens, and a masked model fills in one"):
        predictor().score(["the plot is good"], ["very good"], "english")


def test_what_it_cannot_do_is_told_early(tmp_path: Path) -> None:
    backbone, case = backbone_of("bert"), case_of("bert", "dept")
    task = review_task(**ENGLISH)

    def tuned(of: Backbone, **options: Any) -> None:
        deptjax.train(of, METHOD, options.pop("task", task), workdir=tmp_path / "run", steps=1, **options)

    with pytest.raises(UserError, match="evaluation 'generate': a masked model fills one place and writes no text"):
        tuned(backbone, evaluation="generate")
    with pytest.raises(UserError, match=r"has \{mask\} nowhere"):
        tuned(backbone, task=review_task())
    with pytest.raises(UserError, match=r"has \{mask\}, which a masked backbone"):
        tuned(backbone_of("llama"))
    with pytest.raises(UserError, match="no masked-language-modelling head and is an encoder alone"):
        tuned(tiny_bert(has_masked_head=False))
    assert not (tmp_path / "run").exists()
    prompt = review_prompt(case, **ENGLISH)
    with pytest.raises(UserError, match="decoding: a masked model fills one place and writes no text"):
        deptjax.Predictor(backbone, prompt, decoding=Decoding())
    with pytest.raises(UserError, match="a masked model fills one place and writes no text"):
        predictor().generate(TEXTS, "english")
    with pytest.raises(UserError, match="text 2: the text holds the mask token <mask>"):
        predictor()(["good", "a <mask>"], "english")
    with pytest.raises(UserError, match="format 'peft': adapters of masked backbones are not implemented"):
        export_prompt(prompt, backbone, tmp_path / "peft")


def test_prompt_and_text_may_fill_all_positions() -> None:
    """What fills the mask takes none of its own."""
    method, task, config = METHOD, review_task(**ENGLISH), TrainConfig(steps=1)
    assert Tuning.prepare(tiny_bert(max_positions=28), method, task, config).encoded.preprocessor.max_length == 24
    with pytest.raises(UserError, match="lower prompt_length or max_length"):
        Tuning.prepare(tiny_bert(max_positions=27), method, task, config)
