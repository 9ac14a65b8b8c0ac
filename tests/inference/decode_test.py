"""Greedy decoding against a loop that keeps nothing, and against torch's `generate`: the same tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.inference.controls import EOS, LENGTH, Decoded
from deptjax.inference.decode import decode
from deptjax.inference.decoding import Decoding
from deptjax.inference.rows import Rows, extend_rows, start_rows
from tests.cases import Case, case_of, padded, rows_of
from tests.inference.torch_oracle import PAD, assert_same_texts, controls_of, torch_model, torch_texts, tuned

LENGTHS, NEW, ROOM = (7, 3, 5, 1), 6, 8
ROWS = rows_of(LENGTHS)
CASES = [(f, m) for f in ("llama", "t5") for m in ("dept", "prompt_tuning", "lora", "full", "zero_shot")]
CASES += [("gpt2", "dept"), ("gpt2", "lora")]
WITH_TORCH = [(f, m) for f, m in CASES if m != "full"]


def written_by(case: Case) -> np.ndarray:
    """Returns the likeliest tokens (B, NEW), no token ending a row, all that is before computed again for each."""
    source, mask = padded(ROWS, 8)
    tokens = np.zeros((len(LENGTHS), NEW), np.int32)
    for t in range(NEW):
        # The logits at target t depend on the targets before it, whatever stands behind: one shape for all.
        batch = {"source": source, "source_mask": mask, "targets": jnp.asarray(tokens)}
        logits = case.logits(case.moved, case.frozen, batch)
        tokens[:, t] = np.argmax(np.asarray(logits)[:, t], axis=-1)
    return tokens


@functools.cache
def without_cache(family: str, method: str) -> np.ndarray:
    """Returns `written_by` of a case by its name."""
    return written_by(tuned(family, method))


def ended(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Returns the tokens of each row up to its first `eos`, then padding."""
    result = np.full_like(tokens, PAD)
    for row, out in zip(tokens, result, strict=True):
        stop = int(np.argmax(row == eos)) + 1 if (row == eos).any() else len(row)
        out[:stop] = row[:stop]
    return result


def run(case: Case, decoding: Decoding, eos: tuple[int, ...] = (), side: str = "right", **more: Any) -> Decoded:
    """Returns what is written for all rows, as numpy arrays."""
    source, mask = padded(ROWS, 8, side)
    controls = controls_of(decoding, len(ROWS), eos, **more)
    how = {"texts": decoding.num_return, "sample": decoding.sample, "max_new": ROOM}
    return jax.tree.map(np.asarray, decode(case.model, case.frozen, case.rows, source, mask, controls, **how))


def greedy(case: Case, **more: Any) -> np.ndarray:
    """Returns greedy tokens (B, NEW)."""
    return run(case, Decoding(NEW), **more).tokens[:, 0, :NEW]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_greedy_is_the_likeliest_token_again_and_again(family: str, method: str) -> None:
    case = tuned(family, method)
    got = greedy(case)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, without_cache(family, method))
    np.testing.assert_array_equal(greedy(case, side="left"), got)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_scanned_layers_decode_alike(family: str) -> None:
    case = case_of(family, "dept", True)
    np.testing.assert_array_equal(greedy(case), written_by(case))


@pytest.mark.parametrize(("family", "method"), WITH_TORCH)
def test_tokens_are_torchs(family: str, method: str) -> None:
    """Rows that end at different steps, none, and rows that may not end yet."""
    tokens = without_cache(family, method)
    ends = (int(tokens[0, 0]), int(tokens[1, 2]), int(tokens[2, 4]))
    for eos, least in ((ends[:1], 0), (ends, 0), (ends, 4), ((), 0)):
        decoding = Decoding(NEW, min_new_tokens=least)
        got = run(tuned(family, method), decoding, eos)
        assert_same_texts(got, *torch_texts(torch_model(family, method), tuned(family, method), ROWS, decoding, eos))
        assert got.lengths.min() > least or not eos


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_ends_with_its_end_token(family: str) -> None:
    """Where the end token is the first of a row, and where it stands in the middle of one."""
    case, tokens = tuned(family, "dept"), without_cache(family, "dept")
    for eos in (int(tokens[0, 0]), int(tokens[1, 2])):
        wanted = ended(tokens, eos)
        assert (wanted == PAD).any()
        got = run(case, Decoding(NEW), (eos,))
        np.testing.assert_array_equal(got.tokens[:, 0, :NEW], wanted)
        met = (tokens == eos).any(axis=1)
        np.testing.assert_array_equal(got.lengths[:, 0], np.where(met, (tokens == eos).argmax(axis=1) + 1, NEW))
        np.testing.assert_array_equal(got.ended[:, 0], np.where(met, EOS, LENGTH))


def test_a_row_has_a_limit_of_its_own_and_may_be_a_filler() -> None:
    limits = np.array([NEW, 0, 2, 100])
    got = run(tuned("llama", "dept"), Decoding(NEW), limits=limits)
    np.testing.assert_array_equal(got.lengths[:, 0], [NEW, 0, 2, ROOM])
    tokens = without_cache("llama", "dept")
    np.testing.assert_array_equal(got.tokens[0, 0, :NEW], tokens[0])
    np.testing.assert_array_equal(got.tokens[2, 0], [*tokens[2, :2], *[PAD] * (ROOM - 2)])
    assert (got.tokens[1] == PAD).all()
    assert got.scores[1] == 0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_log_probabilities_are_the_models_own(family: str) -> None:
    """Not those after a temperature, a filter or a minimum has changed them."""
    case, eos = tuned(family, "dept"), int(without_cache(family, "dept")[0, 0])
    decoding = Decoding(NEW, sample=True, temperature=0.7, top_k=9, top_p=0.9, min_new_tokens=3, num_return=2)
    got = run(case, decoding, (eos,))
    source, mask = padded(ROWS, 8)
    real = np.arange(ROOM)[None, None] < got.lengths[..., None]
    for n in range(2):
        batch = {"source": source, "source_mask": mask, "targets": got.tokens[:, n]}
        logits = case.logits(case.moved, case.frozen, batch)
        wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), got.tokens[:, n, :, None], axis=2)[..., 0]
        np.testing.assert_allclose(got.log_probs[:, n], np.where(real[:, n], wanted, 0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(got.scores, got.log_probs.sum(axis=-1), rtol=0, atol=1e-5)


def test_the_loop_stops_when_all_rows_have_ended() -> None:
    """With a bound so large that running to it would take minutes."""
    case = tuned("llama", "dept")
    source, mask = padded(ROWS[:1], 8)
    first = int(without_cache("llama", "dept")[0, 0])
    controls = controls_of(Decoding(20_000), 1, (first,))
    got = decode(case.model, case.frozen, case.rows, source, mask, controls, max_new=20_000)
    assert got.tokens.shape == (1, 1, 20_000)
    np.testing.assert_array_equal(got.tokens[0, 0, :3], [first, PAD, PAD])
    assert got.lengths[0, 0] == 1


def test_one_program_for_all_settings() -> None:
    case = tuned("llama", "dept")
    run(case, Decoding(NEW, sample=True))
    before = decode._cache_size()
    for decoding, eos in (
        (Decoding(NEW - 1, sample=True, temperature=0.3, seed=7), (3,)),
        (Decoding(NEW, sample=True, top_k=5, min_new_tokens=2), (3, 4, 5, 6)),
        (Decoding(2, sample=True, top_p=0.5), ()),
    ):
        run(case, decoding, eos, limits=[1, 2, 3, 4])
    assert decode._cache_size() == before


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_extend_takes_several_tokens_at_once(family: str) -> None:
    """As scoring does it: the logits behind each, as when the targets are known."""
    case = tuned(family, "dept")
    source, mask = padded(ROWS, 8)
    tokens = jnp.asarray(np.stack(rows_of([6] * 4, seed=5)))

    @jax.jit
    def in_two_parts(rows: Rows) -> jax.Array:
        _, cache = start_rows(case.model, case.frozen, rows, source, mask, 5)
        first, cache = extend_rows(case.model, case.frozen, rows, cache, tokens[:, None, :3], 0)
        second, _ = extend_rows(case.model, case.frozen, rows, cache, tokens[:, None, 3:5], 3)
        return jnp.concatenate([first[:, 0], second[:, 0]], axis=1)

    whole = case.logits(case.moved, case.frozen, {"source": source, "source_mask": mask, "targets": tokens})
    np.testing.assert_allclose(in_two_parts(case.rows), whole[:, 1:], rtol=1e-4, atol=1e-4)
