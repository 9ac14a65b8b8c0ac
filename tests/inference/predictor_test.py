"""`Predictor` and `evaluate`: several prompts on one frozen backbone, from memory or from a folder."""

from __future__ import annotations

import dataclasses
import pathlib
import threading

import numpy as np
import pytest

from deptjax.data.sources import MemorySource
from deptjax.errors import UserError
from deptjax.inference.decoding import Decoding
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.inference.rows import front_of
from deptjax.inference.scoring import sequence_scores, token_scores
from deptjax.methods import DePT, ZeroShot, method_from_config
from deptjax.prompt import Prompt
from deptjax.testing import tiny_llama
from tests.cases import backbone_of, case_of, make_case, padded
from tests.reviews import review_prompt, review_rows, review_task

TEXTS = [row["text"] for row in review_rows(9, seed=4)]


def prompt_of(method: str, family: str = "llama", **fields: object) -> Prompt:
    return review_prompt(case_of(family, method), **fields)


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


def test_the_frozen_model_stands_beside_tuned_prompts() -> None:
    """It has no parameters at all, in a batch of its own or in one with others."""
    tuned = prompt_of("dept")
    frozen = dataclasses.replace(tuned, method=ZeroShot(), trainable={})
    alone, model = Predictor(backbone_of("llama"), frozen)(TEXTS), Predictor(backbone_of("llama"), tuned)(TEXTS)
    assert [answer.scores for answer in alone] != [answer.scores for answer in model]
    both = Predictor(backbone_of("llama"), {"frozen": frozen, "tuned": tuned})
    mixed = both(TEXTS, ["frozen", "tuned"] * (len(TEXTS) // 2) + ["frozen"] * (len(TEXTS) % 2))
    for row, answer in enumerate(mixed):
        wanted = (alone, model)[row % 2][row]
        assert answer.scores == pytest.approx(wanted.scores, rel=0, abs=1e-5)


def test_bare_texts_and_objects_are_alike_and_no_texts_are_none() -> None:
    predict = Predictor(backbone_of("llama"), prompt_of("dept"))
    assert predict([{"text": text} for text in TEXTS[:2]]) == predict(TEXTS[:2])
    assert predict([]) == []


def test_generation_from_a_folder_of_a_t5_prompt(tmp_path: pathlib.Path) -> None:
    prompt = prompt_of("prompt_tuning", "t5", labels=(), target="the film is {label}", max_target_length=4)
    answers = Predictor(backbone_of("t5"), prompt.save(tmp_path / "prompt"))(TEXTS)
    assert len(answers) == len(TEXTS)
    assert all(answer.scores is None for answer in answers)


SIZES = {
    "short": DePT(prompt_length=2, rank=4, max_length=13, prompt_init="vocab"),
    "long": DePT(prompt_length=7, rank=1, max_length=16, prompt_init="vocab", scaling="none"),
}
TOPICS = {"labels": ("red", "green", "blue"), "verbalizers": {"red": "red film", "green": "green", "blue": "not blue"}}


def sized(size: str, family: str, **fields: object) -> Prompt:
    return review_prompt(make_case(backbone_of(family), SIZES[size]), **fields)


def mixed_prompts(family: str) -> dict[str, Prompt]:
    """Returns prompts of several sizes, with one-token labels, with longer ones, and for free text."""
    return {
        "a": prompt_of("dept", family),
        "b": sized("short", family),
        "c": sized("long", family, **TOPICS),
        "d": sized("short", family, **TOPICS),
        "e": sized("long", family, labels=(), target="the film is {label}", max_target_length=4),
        "f": prompt_of("lora", family),
        "g": prompt_of("full", family),
    }


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_batch_of_several_tasks_answers_each_row_as_its_task_does_alone(family: str) -> None:
    prompts = mixed_prompts(family)
    predict = Predictor(backbone_of(family), prompts, batch_size=8)
    names = [name for _ in TEXTS for name in prompts]
    texts = [text for text in TEXTS for _ in prompts]
    mixed = predict(texts, names)
    for name, prompt in prompts.items():
        alone = Predictor(backbone_of(family), prompt)(TEXTS)
        for answer, one in zip(mixed[list(prompts).index(name) :: len(prompts)], alone, strict=True):
            assert answer.text == one.text
            assert (answer.scores is None) == (one.scores is None)
            assert answer.scores is None or answer.scores == pytest.approx(one.scores, abs=1e-5)
    assert len({tuple(answer.scores.values()) for answer in mixed if answer.scores}) > 40  # each row has its own


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_of_a_mixed_batch_is_bit_for_bit_what_it_is_alone(family: str) -> None:
    """In float32 and the same bucket: the other rows, and where in the batch it stands, do not change a bit."""
    prompts = mixed_prompts(family)
    predict = Predictor(backbone_of(family), prompts, batch_size=4)
    text = next(text for text in TEXTS if len(text.split()) == 8)
    same = [" ".join(reversed(text.split())), text, "the " + text.split(maxsplit=1)[1]]  # as many tokens: one bucket
    for name, others in (("a", "bab"), ("c", "dcd"), ("e", "eee")):
        # Alone, with its copies to fill the bucket of four rows.
        alone = predict([text] * 3, [name] * 3)
        for place in range(3):
            texts = [*same[:place], text, *same[place + 1 :]]
            tasks = [*others[:place], name, *others[place + 1 :]]
            assert predict(texts, tasks)[place] == alone[0], (name, place)


def test_tasks_come_and_go_without_compiling_anything() -> None:
    prompts = mixed_prompts("llama")
    predict = Predictor(backbone_of("llama"), {name: prompts[name] for name in "abc"}, batch_size=4)
    predict(TEXTS, [*"abc"] * 3)
    compiled = token_scores._cache_size(), sequence_scores._cache_size()
    first = predict(TEXTS[:4], "b")
    for number in range(5):
        predict.add(f"new{number}", prompts["b"])
    predict.add("a", prompts["b"])
    assert predict(TEXTS[:4], "a") == predict(TEXTS[:4], "new4") == first
    predict.remove("b")
    predict.remove("new1")
    assert predict.tasks == ["a", "c", "new0", "new2", "new3", "new4"]
    with pytest.raises(UserError, match="no prompt is loaded for task 'b'; there are: a, c"):
        predict(TEXTS, "b")
    assert len(predict(TEXTS, [*"aac"] * 3)) == 9
    assert (token_scores._cache_size(), sequence_scores._cache_size()) == compiled
    with pytest.raises(UserError, match="no prompt is loaded for task 'b'"):
        predict.remove("b")


def test_threads_share_a_predictor_while_tasks_change() -> None:
    """Requests under way keep the prompt they began with, also when it is removed or replaced in the middle."""
    prompts = mixed_prompts("llama")
    predict = Predictor(backbone_of("llama"), {name: prompts[name] for name in "abc"}, batch_size=2)
    names = [*"aabbaacca"]
    wanted = predict(TEXTS, names)
    stop = threading.Event()
    wrong: list[object] = []

    def ask() -> None:
        while not stop.is_set():
            found = predict(TEXTS, names)
            if found != wanted:
                wrong.append(found)

    def change() -> None:
        for _ in range(15):
            predict.add("other", prompts["b"])
            predict.add("a", prompts["a"])
            predict.remove("other")

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in askers:
        thread.start()
    change()
    stop.set()
    for thread in askers:
        thread.join()
    assert not wrong
    bank = predict._served.tasks["a"].bank
    assert len(bank) == 3  # nothing retired is kept


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_with_beams_and_scores_of_continuations_agree(family: str) -> None:
    """A beam's score is the likelihood of its own text, scored as a continuation."""
    predict = Predictor(backbone_of(family), mixed_prompts(family), batch_size=4)
    decoding = Decoding(max_new_tokens=3, num_beams=3, num_return=2, length_penalty=0.0)
    found = predict.generate(TEXTS[:3], "b", decoding)
    assert [len(candidates) for candidates in found] == [2, 2, 2]
    for text, candidates in zip(TEXTS, found, strict=False):
        assert candidates[0].score >= candidates[1].score
        for one in candidates:
            assert one.score == pytest.approx(sum(one.log_probs), abs=1e-4)
            written = predict._backbone.tokenizer.decode(one.tokens, skip_special_tokens=True)
            assert written == one.text
            if one.text and one.ended == "length":
                (scores,) = predict.score([text], [one.text, "fine"], "b", end=False)
                assert scores[one.text] == pytest.approx(one.score, abs=1e-3)
                assert set(scores) == {one.text, "fine"}


def test_what_is_sampled_for_a_text_depends_on_its_number_and_not_on_its_batch() -> None:
    prompt = prompt_of("dept", labels=(), target="the film is {label}", max_target_length=6)
    decoding = Decoding(max_new_tokens=6, sample=True, temperature=3.0, seed=5)
    predict = Predictor(backbone_of("llama"), prompt, batch_size=4, decoding=decoding)
    same = [TEXTS[0]] * 9
    whole = [answer.text for answer in predict(same)]
    assert len(set(whole)) > 5
    assert [answer.text for answer in predict(same[:4])] == whole[:4]
    assert [answer.text for answer in predict(same[:5], first=4)] == whole[4:]


def test_scores_of_continuations_are_the_labels_log_likelihoods() -> None:
    predict = Predictor(backbone_of("t5"), mixed_prompts("t5"))
    for answer, scores in zip(
        predict(TEXTS, "d"), predict.score(TEXTS, TOPICS["verbalizers"].values(), "d"), strict=True
    ):
        likely = np.asarray([scores[text] for text in TOPICS["verbalizers"].values()])
        assert answer.scores is not None
        np.testing.assert_allclose(list(answer.scores.values()), np.exp(likely) / np.exp(likely).sum(), atol=1e-5)
    one, two = predict.score(TEXTS[:2], [["red"], ["green film", "blue"]], ["a", "f"])
    assert (list(one), list(two)) == (["red"], ["green film", "blue"])
    with pytest.raises(UserError, match="there are 2 texts and 1 lists of continuations"):
        predict.score(TEXTS[:2], [["red"]], "a")
    with pytest.raises(UserError, match="text 2: there are no continuations to score"):
        predict.score(TEXTS[:2], [["red"], []], "a")


def test_mistakes_are_told() -> None:
    predict = Predictor(backbone_of("llama"), {"reviews": prompt_of("dept"), "other": prompt_of("dept")})
    with pytest.raises(UserError, match=r"no prompt is loaded for task 'reveiws'; .* Did you mean 'reviews'\?"):
        predict(TEXTS, "reveiws")
    with pytest.raises(UserError, match="name the task of the texts; there are: reviews, other"):
        predict(TEXTS)
    with pytest.raises(UserError, match="text 2: no prompt is loaded for task 'x'; there are: reviews, other"):
        predict(["fine", "dull"], ["other", "x"])
    with pytest.raises(UserError, match="there are 2 texts and 1 names of tasks; give one for each"):
        predict(["fine", "dull"], ["other"])
    with pytest.raises(UserError, match="texts must be a list of texts"):
        predict("fine", "other")
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


def test_evaluate_asks_as_the_task_that_it_is_given_does() -> None:
    """The same rows under other labels and another template: scored by those, not by the prompt's."""
    names = {"negative": "awful film", "positive": "good film"}
    other = dataclasses.replace(
        review_task(input="{text} it was"),
        labels=tuple(names.values()),
        source=MemorySource(
            *[
                [{"text": row["text"], "label": names[row["label"]]} for row in review_rows(16, seed=seed)]
                for seed in (0, 1, 2)
            ]
        ),
    )
    prompt = prompt_of("dept")
    own = dataclasses.replace(prompt, task=dataclasses.replace(other, source=None).to_config())
    rows = review_rows(16, seed=2)
    answers = Predictor(backbone_of("llama"), own)([row["text"] for row in rows])
    right = np.mean([answer.text == names[row["label"]] for answer, row in zip(answers, rows, strict=True)])
    assert right > 0
    assert evaluate(backbone_of("llama"), prompt, other) == {"test/accuracy": pytest.approx(right)}


@pytest.mark.parametrize("method", ["dept", "lora", "prefix_tuning", "deep_prompt_tuning, add", "idpg, every"])
def test_equal_methods_share_their_programs(method: str) -> None:
    """A second predictor of the same prompt, or of one that was loaded again, compiles nothing."""

    def answers() -> list[str]:
        prompt = prompt_of(method)
        again = dataclasses.replace(prompt, method=method_from_config(prompt.method_config))
        return [answer.text for answer in Predictor(backbone_of("llama"), again)(TEXTS[:3])]

    first = answers()
    compiled = token_scores._cache_size(), sequence_scores._cache_size(), front_of._cache_size()
    assert answers() == first
    assert (token_scores._cache_size(), sequence_scores._cache_size(), front_of._cache_size()) == compiled


def test_evaluate_needs_rows() -> None:
    with pytest.raises(UserError, match="has no source"):
        evaluate(backbone_of("llama"), prompt_of("dept"))
    with pytest.raises(UserError, match="task 'reviews' has no rows in split 'validation'"):
        evaluate(backbone_of("llama"), prompt_of("dept"), review_task(), split="validation")
