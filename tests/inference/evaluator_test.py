"""Answers for examples: in their order, filler rows left out, by likelihood or generated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from deptjax.data.forms import form_of
from deptjax.data.preprocess import Preprocessor
from deptjax.data.tasks import Task
from deptjax.errors import UserError
from deptjax.inference.evaluator import Evaluator
from tests.cases import case_of
from tests.reviews import review_task

TASK = review_task(dev=7)
LENGTH = 20


def evaluator(family: str, task: Task = TASK, **fields: Any) -> tuple[Evaluator, list[Any], Any]:
    case = case_of(family, "prompt_tuning")
    data = task.load()
    form = form_of(case.backbone.config)
    preprocessor = Preprocessor(case.backbone.tokenizer, data.task, form=form, max_length=LENGTH)
    made = Evaluator(case.model, preprocessor, **{"buckets": (8, LENGTH), "batch_size": 3, **fields})
    return made, preprocessor.encode_all(data.dev), case


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_come_in_the_order_given_whatever_the_batches(family: str) -> None:
    """Rows are sorted by length inside; one batch, or batches of three with two filler rows, give each row its own."""
    made, examples, case = evaluator(family)
    assert len({len(e.source) for e in examples}) > 2
    one_by_one = [made.answers(case.moved, case.frozen, [example])[0] for example in examples]
    in_threes = made.answers(case.moved, case.frozen, examples)
    backwards = made.answers(case.moved, case.frozen, examples[::-1])[::-1]
    assert len(in_threes) == 7
    for alone, some, back in zip(one_by_one, in_threes, backwards, strict=True):
        assert alone.text == some.text == back.text
        assert alone.scores is not None
        assert alone.scores == pytest.approx(some.scores, abs=1e-5)
        assert alone.scores == pytest.approx(back.scores, abs=1e-5)
    assert len({round(answer.scores["positive"], 4) for answer in in_threes if answer.scores}) > 1


def test_scores_are_probabilities_of_the_labels_and_the_text_is_the_likeliest() -> None:
    made, examples, case = evaluator("llama")
    for answer in made.answers(case.moved, case.frozen, examples):
        assert answer.scores is not None
        assert list(answer.scores) == ["negative", "positive"]
        assert sum(answer.scores.values()) == pytest.approx(1, abs=1e-5)
        assert answer.text == max(answer.scores, key=lambda label: answer.scores[label])


def test_labels_of_several_tokens_are_scored_whole() -> None:
    task = dataclasses.replace(TASK, verbalizers={"positive": "good film", "negative": "not good film"})
    made, examples, case = evaluator("llama", task)
    answers = made.answers(case.moved, case.frozen, examples)
    assert {answer.text for answer in answers} <= {"positive", "negative"}
    assert all(sum((answer.scores or {}).values()) == pytest.approx(1, abs=1e-5) for answer in answers)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_gives_text_for_each_row(family: str) -> None:
    task = review_task(dev=7, labels=(), target="the film is {label}", max_target_length=5)
    made, examples, case = evaluator(family, task)
    alone = [made.answers(case.moved, case.frozen, [example])[0] for example in examples]
    together = made.answers(case.moved, case.frozen, examples)
    assert [answer.text for answer in alone] == [answer.text for answer in together]
    for one, other in zip(alone, together, strict=True):
        assert one.candidates[0].tokens == other.candidates[0].tokens
        assert one.candidates[0].log_probs == pytest.approx(other.candidates[0].log_probs, abs=1e-4)
    assert all(answer.scores is None for answer in together)
    assert any(answer.text for answer in together)
    assert all(len(answer.text.split()) <= 5 for answer in together)


def test_on_rows_is_told_of_each_batch() -> None:
    made, examples, case = evaluator("llama")
    seen: list[int] = []
    made.answers(case.moved, case.frozen, examples, on_rows=seen.append)
    assert seen == [3, 3, 1]


def test_no_examples_no_answers() -> None:
    made, _, case = evaluator("llama")
    assert made.answers(case.moved, case.frozen, []) == []


def test_scoring_labels_needs_labels() -> None:
    with pytest.raises(
        UserError, match="evaluation 'labels' needs labels, and task 'reviews' has none; use 'generate'"
    ):
        evaluator("llama", review_task(labels=(), target="the film is {label}"), mode="labels")


def test_generated_text_that_is_the_text_of_a_label_is_that_label() -> None:
    """What this model writes for a row is made the text of a label: then the answer is the label."""
    free = review_task(dev=7, labels=(), target="the film is {label}", max_target_length=2)
    made, examples, case = evaluator("llama", free)
    written = made.answers(case.moved, case.frozen, examples[:1])[0].text
    assert written
    task = dataclasses.replace(TASK, verbalizers={"positive": written, "negative": "bad"}, max_target_length=2)
    generating, _, _ = evaluator("llama", task, mode="generate")
    assert [a.text for a in generating.answers(case.moved, case.frozen, examples[:1])] == ["positive"]
