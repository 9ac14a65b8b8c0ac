"""Beam search against torch's `generate`: the same tokens in the same order, with the same scores."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from deptjax.inference.beam import beam_search
from deptjax.inference.controls import EOS, LENGTH, Decoded
from deptjax.inference.decode import decode
from deptjax.inference.decoding import Decoding
from tests.cases import padded, rows_of
from tests.inference.torch_oracle import assert_same_texts, controls_of, torch_model, torch_texts, tuned

LENGTHS, NEW, ROOM = (7, 3, 5), 9, 16
ROWS = rows_of(LENGTHS)
CASES = [(f, m) for f in ("llama", "t5") for m in ("zero_shot", "prompt_tuning", "dept", "lora")]

CASES.append(("gpt2", "dept"))


@functools.cache
def likely(family: str, method: str) -> tuple[int, ...]:
    """Returns tokens with which texts may end, at different steps: of the greedy text of the first row, and others."""
    case = tuned(family, method)
    source, mask = padded(ROWS, 8)
    run = decode(case.model, case.frozen, case.rows, source, mask, controls_of(Decoding(NEW), len(ROWS)), max_new=ROOM)
    tokens = np.asarray(run.tokens[:, 0, :NEW])
    return int(tokens[0, 4]), int(tokens[1, 2]), int(tokens[2, 6])


def search(family: str, method: str, decoding: Decoding, eos: tuple[int, ...], side: str = "right", **more) -> Decoded:
    case = tuned(family, method)
    source, mask = padded(ROWS, 8, side)
    controls = controls_of(decoding, len(ROWS), eos, **more)
    beams = {"num_beams": decoding.num_beams, "num_return": decoding.num_return}
    return beam_search(case.model, case.frozen, case.rows, source, mask, controls, max_new=ROOM, **beams)


def check(family: str, method: str, decoding: Decoding, eos: tuple[int, ...], side: str = "right") -> Decoded:
    got = search(family, method, decoding, eos, side)
    wanted = torch_texts(torch_model(family, method), tuned(family, method), ROWS, decoding, eos)
    assert_same_texts(got, *wanted)
    return got


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_penalty_and_way_of_stopping(family: str) -> None:
    """One program for all of them: nothing is compiled for a new setting."""
    first, *others = likely(family, "zero_shot")
    programs, lengths = set(), {}
    for penalty, early, eos in itertools.product(
        (0.6, 1.0, 2.0, -0.5), (False, True, "never"), ((), (first,), (first, *others))
    ):
        decoding = Decoding(NEW, num_beams=3, num_return=3, length_penalty=penalty, early_stopping=early)
        lengths.setdefault(early, []).append(check(family, "zero_shot", decoding, eos).lengths.tolist())
        programs.add(beam_search._cache_size())
    assert len(programs) == 1
    assert lengths[False] != lengths["never"] != lengths[True] != lengths[False]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_every_method_on_batches_padded_on_either_side(family: str, method: str) -> None:
    eos = likely(family, method)
    for side, penalty, early in (("right", 1.0, False), ("left", 0.6, "never"), ("left", 2.0, True)):
        decoding = Decoding(NEW, num_beams=3, num_return=3, length_penalty=penalty, early_stopping=early)
        check(family, method, decoding, eos, side)


@pytest.mark.parametrize(("beams", "n"), [(2, 1), (4, 4), (5, 2)])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_numbers_of_beams_and_of_texts(family: str, beams: int, n: int) -> None:
    eos = likely(family, "dept")
    for least in (0, 5):
        decoding = Decoding(NEW, num_beams=beams, num_return=n, min_new_tokens=least)
        check(family, "dept", decoding, eos[:2])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_has_its_own_limit_and_knows_of_no_other_row(family: str) -> None:
    eos, limits = likely(family, "dept")[1:], (4, 0, 7)
    decoding = Decoding(NEW, num_beams=3, num_return=3, early_stopping="never")
    got = jax.tree.map(np.asarray, search(family, "dept", decoding, eos, limits=limits))
    case = tuned(family, "dept")
    for i in (0, 2):
        alone = Decoding(limits[i], num_beams=3, num_return=3, early_stopping="never")
        wanted = torch_texts(torch_model(family, "dept"), case, ROWS[i : i + 1], alone, eos)
        assert_same_texts(jax.tree.map(lambda a, i=i: a[i : i + 1], got), *wanted)
    assert not got.lengths[1].any()
    assert not got.log_probs[1].any()


def test_log_probabilities_and_reasons_belong_to_the_tokens() -> None:
    """The scores are made of the log-probabilities, and those are the model's own, the held-back end token counted."""
    family, method = "t5", "dept"
    case, eos = tuned(family, method), likely(family, method)
    decoding = Decoding(NEW, num_beams=3, num_return=3, length_penalty=0.6, min_new_tokens=2)
    got = jax.tree.map(np.asarray, search(family, method, decoding, eos))
    np.testing.assert_allclose(got.log_probs.sum(-1) / got.lengths**0.6, got.scores, atol=1e-5)
    ends = np.take_along_axis(got.tokens, got.lengths[..., None] - 1, axis=2)[..., 0]
    np.testing.assert_array_equal(got.ended, np.where(np.isin(ends, eos), EOS, LENGTH))
    assert {EOS, LENGTH} == set(got.ended.ravel())
    source, mask = padded(ROWS, 8)
    for n in range(3):
        batch = {"source": source, "source_mask": mask, "targets": got.tokens[:, n]}
        logits = case.logits(case.moved, case.frozen, batch)
        wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), got.tokens[:, n, :, None], axis=2)[..., 0]
        real = np.arange(ROOM)[None] < got.lengths[:, n, None]
        np.testing.assert_allclose(got.log_probs[:, n], np.where(real, wanted, 0), rtol=0, atol=1e-4)
