"""Tasks that change while calls are under way, and calls that break off: nothing is lost, and nothing is kept."""

from __future__ import annotations

import dataclasses
import linecache
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.inference.predictor import Predictor
from deptjax.inference.prompt_bank import PromptBank
from deptjax.inference.rows import start_rows
from deptjax.methods import DePT
from deptjax.prompt import Prompt
from tests.cases import backbone_of, make_case, padded, rows_of
from tests.reviews import review_prompt, review_rows

TEXTS = [row["text"] for row in review_rows(6, seed=4)]
SMALL = DePT(prompt_length=2, rank=2, max_length=13, prompt_init="vocab")
LARGE = DePT(prompt_length=4, rank=3, max_length=16, prompt_init="vocab")
MORE = {"labels": ("red film", "green film", "blue film", "red scene", "green scene")}
start = jax.jit(start_rows, static_argnums=(0, 5))


def prompt_of(method: DePT, family: str = "llama", **fields: object) -> Prompt:
    return review_prompt(make_case(backbone_of(family), method), **fields)


PROMPTS = {
    "a": prompt_of(SMALL),
    "few": prompt_of(SMALL, labels=("very good", "very bad")),
    "more": prompt_of(SMALL, **MORE),
}
NAMES = ["few", "more", "a", "few", "more", "a"]


def in_the_middle(act: Callable[[], object]) -> Callable[[int], None]:
    """Returns what acts once, after the first batch of a call."""
    done: list[int] = []

    def on_rows(rows: int) -> None:
        done.append(rows)
        if len(done) == 1:
            act()

    return on_rows


def held(predict: Predictor) -> int:
    """Returns the number of calls that tasks wait for."""
    return sum(len(served.calls) for served in predict._served.tasks.values())


def places(predict: Predictor) -> int:
    """Returns the places that are taken in banks."""
    banks = {served.bank for served in predict._served.tasks.values()}
    return sum(len(bank) for bank in banks if isinstance(bank, PromptBank))


def interrupted_at(line: int, act: Callable[[], object]) -> bool:
    """Raises `KeyboardInterrupt` in the n-th line of adding a prompt; returns whether `act` ended before."""
    functions = ("add", "_put", "_moved", "_grown", "member", "with_front", "empty")
    seen = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_name not in functions or "prompt_bank" not in frame.f_code.co_filename:
            return None
        # A tracer meets a `with` again at its end, where Python itself lets no signal in before the lock is released.
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        counts = event == "line" and not text.startswith("with ")
        seen += counts
        if counts and seen == line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return True


@pytest.mark.parametrize("change", ["remove", "replace", "grow"])
def test_a_call_ends_with_the_tasks_it_began_with(change: str) -> None:
    """Batches of two; the tasks change behind the first. The one that is removed has the most labels of all."""
    predict = Predictor(backbone_of("llama"), PROMPTS, batch_size=2)
    wanted = predict(TEXTS, NAMES)
    bank = predict._served.tasks["a"].bank
    assert isinstance(bank, PromptBank)
    taken: list[int] = []

    def act() -> None:
        if change == "remove":
            predict.remove("more")
            predict.remove("a")
        elif change == "replace":
            predict.add("more", PROMPTS["few"])
            predict.add("a", PROMPTS["more"])
        else:
            predict.add("large", prompt_of(LARGE))
            predict.remove("more")
        taken.append(len(bank))

    found = predict(TEXTS, NAMES, on_rows=in_the_middle(act))
    for answer, one in zip(found, wanted, strict=True):
        assert answer.scores == pytest.approx(one.scores, abs=1e-5)
    assert taken == [{"remove": 3, "replace": 5, "grow": 4}[change]]  # until the call ends
    assert len(bank) == {"remove": 1, "replace": 3, "grow": 3}[change]
    assert held(predict) == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_breaks_off_keeps_nothing(error: type[BaseException]) -> None:
    predict = Predictor(backbone_of("llama"), PROMPTS, batch_size=2)
    wanted = predict(TEXTS, NAMES)

    def act() -> None:
        predict.remove("more")
        assert held(predict) == 2
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)  # as the terminal does
        raise error

    with pytest.raises(error):
        predict(TEXTS, NAMES, on_rows=in_the_middle(act))
    assert (held(predict), places(predict)) == (0, 2)
    predict.add("more", PROMPTS["more"])
    assert predict(TEXTS, NAMES) == wanted
    assert (held(predict), places(predict)) == (0, 3)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_a_batch_takes_runs_on_when_the_bank_has_grown(family: str) -> None:
    bank = PromptBank(backbone_of(family), {"a": prompt_of(SMALL, family)})
    source, mask = padded(rows_of((3, 5)), 8)
    model, rows = bank.take(["a", "a"])
    before = start(model, bank.frozen, rows, source, mask, 3)[0]
    bank.add("large", prompt_of(LARGE, family))
    assert bank.model != model
    np.testing.assert_array_equal(start(model, bank.frozen, rows, source, mask, 3)[0], before)
    model, rows = bank.take(["a", "large"])
    after = start(model, bank.frozen, rows, source, mask, 3)[0]
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-5 * np.abs(before).max())


def test_a_bank_stays_whole_wherever_adding_is_interrupted() -> None:
    """At every line, while a prompt is added that makes the bank larger in both ways."""
    prompts = {"a": PROMPTS["a"], "b": PROMPTS["few"]}
    large, source, mask = prompt_of(LARGE), *padded(rows_of((3, 5)), 8)

    def logits(bank: PromptBank, *names: str) -> Any:
        model, rows = bank.take(names)
        return np.asarray(start(model, bank.frozen, rows, source, mask, 3)[0])

    wanted = logits(PromptBank(backbone_of("llama"), prompts), "a", "b")
    at = 0
    while True:
        bank, at = PromptBank(backbone_of("llama"), prompts), at + 1
        whole = interrupted_at(at, lambda bank=bank: bank.add("large", large))  # type: ignore[misc]
        np.testing.assert_allclose(logits(bank, "a", "b"), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
        if whole or at % 5 == 0:
            bank.add("large", large)
            assert len(bank) == 3
            assert bank.capacity >= 3
            assert not np.allclose(logits(bank, "large", "a")[0], wanted[0], atol=1e-3)
        if whole:
            break
    assert at > 20


def test_one_bad_prompt_of_several_leaves_no_place_taken() -> None:
    """The second is found to be wrong when the first already lies in the bank."""
    predict = Predictor(backbone_of("llama"), PROMPTS)
    bank = predict._served.tasks["a"].bank
    assert isinstance(bank, PromptBank)
    served = predict._served
    checked = {"new": served._checked("new", PROMPTS["few"]), "wrong": served._checked("wrong", PROMPTS["few"])}
    wrong = dataclasses.replace(checked["wrong"][0], trainable={"input": {}})
    with pytest.raises(ValueError, match="prompt 'wrong#5': tensor 'input/"):
        served._publish({**checked, "wrong": checked["wrong"]._replace(prompt=wrong)})
    assert (predict.tasks, len(bank)) == (["a", "few", "more"], 3)


def test_threads_ask_while_others_add_prompts_that_make_the_bank_larger() -> None:
    predict = Predictor(backbone_of("llama"), PROMPTS, batch_size=4)
    wanted = predict(TEXTS, NAMES)
    wrong: list[object] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                for answer, one in zip(predict(TEXTS, NAMES), wanted, strict=True):
                    if answer.scores != pytest.approx(one.scores, abs=1e-5):
                        wrong.append(answer)
        except BaseException as error:  # a thread's exception would go unseen
            wrong.append(error)
            raise

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for length in (4, 5):
            predict.add("large", prompt_of(LARGE.clone(prompt_length=length)))
            for number in range(4):
                predict.add(f"n{number}", PROMPTS["few"])
            for number in range(4):
                predict.remove(f"n{number}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert (held(predict), places(predict)) == (0, 4)
