"""Rows of several kinds of methods in one batch: each answers as it does alone, and the backbone is run once."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from deptjax.inference import predictor
from deptjax.inference.decoding import Decoding
from deptjax.inference.predictor import Predictor
from deptjax.methods import ACCEPT, DePT, Method, PromptTuning
from deptjax.methods.zero_shot import ZeroShot
from deptjax.prompt import Prompt
from tests.cases import backbone_of, case_of, make_case, method_on
from tests.reviews import review_prompt

# Of other lengths than the cases have.
SIZES: dict[str, Method] = {
    "long": PromptTuning(prompt_length=9, prompt_init="vocab"),
    "short": DePT(prompt_length=2, rank=1, max_length=16),
    "accept": ACCEPT(4, None, 3, 13, None, 2, prompt_init="vocab"),
}
FROZEN = "frozen"  # the model as it is, without any prompt
AT_THE_INPUT = ("dept", "adept", "mpt", "lopa", "lopa, concat", "idpg", "attempt", *SIZES, FROZEN)
FILLED = {"input": "{text} . it is {mask} .", "verbalizers": {"negative": "bad", "positive": "good"}}
FREE = {"labels": (), "target": "the film is {label}", "max_target_length": 4}
TEXTS = ["the film is good", "a very dull and sad story", "bright", "the plot was that of the story", "it was happy"]


@functools.cache
def prompt_of(family: str, name: str, free: bool = False) -> Prompt:
    """Returns a prompt of a method, for a task that the family can do."""
    if name == FROZEN:
        return dataclasses.replace(prompt_of(family, "mpt", free), method=ZeroShot(), trainable={})
    backbone = backbone_of(family)
    case = make_case(backbone, SIZES[name]) if name in SIZES else case_of(family, name)
    return review_prompt(case, **FILLED if backbone.config.is_masked else FREE if free else {})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that is run."""
    rows: list[int] = []
    run = predictor.answer_batch

    def answer_batch(*args: object, **kwargs: object) -> object:
        found = run(*args, **kwargs)  # type: ignore[arg-type]
        rows.append(len(found))
        return found

    monkeypatch.setattr(predictor, "answer_batch", answer_batch)
    return rows


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_rows_of_all_kinds_share_a_batch_and_answer_as_alone(family: str, ran: list[int]) -> None:
    prompts = {name: prompt_of(family, name) for name in AT_THE_INPUT}
    places = [(name, text) for name in prompts for text in TEXTS[:4]]
    wanted = [answer for prompt in prompts.values() for answer in Predictor(backbone_of(family), prompt)(TEXTS[:4])]
    ran.clear()
    answers = Predictor(backbone_of(family), prompts, batch_size=44)([t for _, t in places], [n for n, _ in places])
    assert ran == [len(places)]
    for (name, _), answer, one in zip(places, answers, wanted, strict=True):
        assert answer.text == one.text
        assert answer.scores == pytest.approx(one.scores, abs=1e-5), name
    assert len({tuple((answer.scores or {}).values()) for answer in answers}) == len(places)


@pytest.mark.parametrize(("family", "scan"), [("llama", True), ("t5", False)])
def test_text_and_beams_are_those_of_each_prompt_alone(family: str, scan: bool) -> None:
    backbone = backbone_of(family, scan)
    prompts = {name: review_prompt(case_of(family, name, scan), **FREE) for name in ("dept", "lopa", "mpt")}
    names = [name for name in prompts for _ in TEXTS]
    mixed = Predictor(backbone, prompts, batch_size=16)
    beams = Decoding(max_new_tokens=4, num_beams=3, num_return=2)
    answers, best = mixed(TEXTS * 3, names), mixed.generate(TEXTS * 3, names, beams)
    scores = mixed.score(TEXTS * 3, ["good", "very bad story"], names)
    for at, prompt in enumerate(prompts.values()):
        alone, own = Predictor(backbone, prompt), slice(5 * at, 5 * at + 5)
        assert [a.text for a in answers[own]] == [a.text for a in alone(TEXTS)]
        wanted = alone.generate(TEXTS, decoding=beams)
        assert [[c.tokens for c in row] for row in best[own]] == [[c.tokens for c in row] for row in wanted]
        for row, one in zip(scores[own], alone.score(TEXTS, ["good", "very bad story"]), strict=True):
            assert row == pytest.approx(one, abs=1e-4)


def test_what_acts_inside_the_model_and_what_would_only_pad_has_batches_of_its_own(ran: list[int]) -> None:
    """T5 reads a prompt with each text, so one of 9 vectors is not put beside texts of a few tokens without one."""
    names = ["dept", "lora", "prefix_tuning", "mpt"]
    predict = Predictor(backbone_of("llama"), {name: prompt_of("llama", name) for name in names})
    predict(TEXTS[:2] * 4, [name for name in names for _ in range(2)])
    assert sorted(ran) == [2, 2, 4]
    ran.clear()
    prompts = {name: prompt_of("t5", name) for name in ("long", FROZEN)}
    prompts = {k: dataclasses.replace(p, task={**p.task, "input": "{text}"}) for k, p in prompts.items()}
    Predictor(backbone_of("t5"), prompts)(["good"] * 4, ["long", FROZEN, FROZEN, FROZEN])
    assert sorted(ran) == [1, 3]


def test_full_batches_are_of_one_kind(ran: list[int]) -> None:
    names = ["dept"] * 6 + ["mpt"] * 5 + ["lopa"]
    prompts = {name: prompt_of("llama", name) for name in set(names)}
    answers = Predictor(backbone_of("llama"), prompts, batch_size=4)(TEXTS[:4] * 3, names)
    assert sorted(ran) == [4, 4, 4]
    alone = {name: Predictor(backbone_of("llama"), prompt)(TEXTS[:4]) for name, prompt in prompts.items()}
    for place, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert answer.scores == pytest.approx(alone[name][place % 4].scores, abs=1e-5)


def test_every_way_of_a_method_that_fills_no_inner_site_mixes() -> None:
    """What is folded before it is served is then a soft prompt."""
    from deptjax.inference.mixed import can_mix

    kinds = {name: can_mix(method_on(backbone_of("llama"), name)) for name in (*AT_THE_INPUT[:6], "prompt_tuning")}
    assert all(kinds.values()), kinds
    inner = ("lora", "prefix_tuning", "deep_prompt_tuning, add", "full", "idpg, every")
    assert not any(can_mix(method_on(backbone_of("llama"), name)) for name in inner)
