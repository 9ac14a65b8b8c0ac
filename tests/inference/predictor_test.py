"""`Predictor` and `evaluate`: several prompts on one frozen backbone, from memory or from a folder."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.prompt import Prompt
from deptjax.testing import tiny_llama
from tests.cases import backbone_of, case_of, padded
from tests.reviews import review_rows, review_task

TEXTS = [row["text"] for row in review_rows(9, seed=4)]


def prompt_of(method: str, family: str = "llama", **fields: object) -> Prompt:
    case = case_of(family, method)
    task = dataclasses.replace(review_task(**fields), source=None)
    return Prompt(
        method=case.model.method,
        trainable=jax.device_get(case.moved),
        backbone=case.backbone.name,
        fingerprint=case.backbone.fingerprint,
        task=task.to_config(),
        settings={"max_length": 13, "evaluation": "auto"},
    )


def test_several_prompts_on_one_backbone(tmp_path: pathlib.Path) -> None:
    """Each task's answers are those it has alone, whichever was asked before; a folder does what the object does."""
    prompts = {"a": prompt_of("dept"), "b": prompt_of("lora"), "c": prompt_of("full"), "d": prompt_of("prompt_tuning")}
    saved = prompts["a"].save(tmp_path / "prompt")
    both = Predictor(backbone_of("llama"), {**prompts, "saved": saved}, batch_size=4)
    assert both.tasks == ["a", "b", "c", "d", "saved"]
    answers = {name: both(TEXTS, name) for name in both.tasks}
    assert all(len(found) == len(TEXTS) for found in answers.values())
    assert answers["saved"] == answers["a"]
    assert answers["a"] != answers["d"]
    for name in ("a", "c"):
        alone = Predictor(backbone_of("llama"), prompts[name], batch_size=4)
        assert alone(TEXTS) == answers[name]
    assert both(TEXTS, "a") == answers["a"]


def test_answers_are_those_of_the_model_itself() -> None:
    """By hand: tokenize the filled template, take the logits at the label, softmax over the two labels."""
    case = case_of("llama", "dept")
    predict = Predictor(backbone_of("llama"), prompt_of("dept"))
    tokenizer = case.backbone.tokenizer
    tokens = [tokenizer.encode(label, add_special_tokens=False)[0] for label in ("negative", "positive")]
    texts = [text for text in TEXTS if len(text.split()) <= 8]  # none of which is cut
    assert len(texts) >= 3
    for text, answer in zip(texts, predict(texts), strict=True):
        ids = tokenizer.encode(f"text : {text}\nlabel :", add_special_tokens=False)
        source, mask = padded([np.asarray(ids)], 13)
        batch = {"source": source, "source_mask": mask, "targets": np.zeros((1, 1), np.int32)}
        logits = np.asarray(case.logits(case.moved, case.frozen, batch))[0, 0, tokens].astype(np.float64)
        wanted = np.exp(logits) / np.exp(logits).sum()
        assert answer.scores is not None
        np.testing.assert_allclose(list(answer.scores.values()), wanted, rtol=0, atol=1e-4)


def test_bare_texts_and_objects_are_alike_and_no_texts_are_none() -> None:
    predict = Predictor(backbone_of("llama"), prompt_of("dept"))
    assert predict([{"text": text} for text in TEXTS[:2]]) == predict(TEXTS[:2])
    assert predict([]) == []


def test_generation_from_a_folder_of_a_t5_prompt(tmp_path: pathlib.Path) -> None:
    prompt = prompt_of("prompt_tuning", "t5", labels=(), target="the film is {label}", max_target_length=4)
    answers = Predictor(backbone_of("t5"), prompt.save(tmp_path / "prompt"))(TEXTS)
    assert len(answers) == len(TEXTS)
    assert all(answer.scores is None for answer in answers)


def test_mistakes_are_told() -> None:
    predict = Predictor(backbone_of("llama"), {"reviews": prompt_of("dept"), "other": prompt_of("dept")})
    with pytest.raises(UserError, match=r"no prompt is loaded for task 'reveiws'; .* Did you mean 'reviews'\?"):
        predict(TEXTS, "reveiws")
    with pytest.raises(UserError, match="no prompt is loaded for task 'None'; there are: reviews, other"):
        predict(TEXTS)
    with pytest.raises(UserError, match="text 2: "):
        predict(["fine", ""], "reviews")
    with pytest.raises(UserError, match=r"text 1: .*text"):
        predict([{"txet": "fine"}], "reviews")
    with pytest.raises(UserError, match="prompt 'reviews' was tuned on 'tiny-llama', not on 'tiny-llama': embedding"):
        Predictor(tiny_llama(seed=2), {"reviews": prompt_of("dept")})


def test_evaluate_counts_the_right_answers() -> None:
    task, prompt = review_task(), prompt_of("dept")
    rows = review_rows(16, seed=2)  # the task's test split
    answers = Predictor(backbone_of("llama"), prompt)([row["text"] for row in rows])
    right = np.mean([answer.text == row["label"] for answer, row in zip(answers, rows, strict=True)])
    assert evaluate(backbone_of("llama"), prompt, task) == {"test/accuracy": pytest.approx(right)}
    assert set(evaluate(backbone_of("llama"), prompt, task, split="dev", batch_size=5)) == {"dev/accuracy"}


def test_evaluate_needs_rows() -> None:
    with pytest.raises(UserError, match="has no source"):
        evaluate(backbone_of("llama"), prompt_of("dept"))
    with pytest.raises(UserError, match="task 'reviews' has no rows in split 'validation'"):
        evaluate(backbone_of("llama"), prompt_of("dept"), review_task(), split="validation")
