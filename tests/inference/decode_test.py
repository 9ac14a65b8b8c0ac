"""Greedy decoding against a loop that keeps nothing: argmax of the logits of the whole text, again for each token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.inference.decode import greedy
from deptjax.inference.rows import Rows, extend_rows, start_rows
from deptjax.methods import ZeroShot
from deptjax.models.prompted import PromptedModel
from tests.cases import Case, backbone_of, case_of, padded, rows_of

LENGTHS, NEW, PAD = (7, 3, 5, 1), 6, 0
CASES = [(f, m) for f in ("llama", "t5") for m in ("dept", "prompt_tuning", "lora", "full", "zero_shot")]


@functools.cache
def tuned(family: str, method: str, scan: bool = False) -> Case:
    if method == "zero_shot":
        backbone = backbone_of(family, scan)
        return Case(backbone, PromptedModel.build(backbone, ZeroShot()), {}, backbone.params)
    return case_of(family, method, scan)


@functools.cache
def without_cache(family: str, method: str, scan: bool = False) -> np.ndarray:
    """Returns the likeliest tokens (B, NEW), no token ending a row."""
    case = tuned(family, method, scan)
    source, mask = padded(rows_of(LENGTHS), 8)
    tokens = np.zeros((len(LENGTHS), NEW), np.int32)
    for t in range(NEW):
        # The logits at target t depend on the targets before it, whatever stands behind: one shape for all.
        batch = {"source": source, "source_mask": mask, "targets": jnp.asarray(tokens)}
        logits = case.logits(case.moved, case.frozen, batch)
        tokens[:, t] = np.argmax(np.asarray(logits)[:, t], axis=-1)
    return tokens


def ended(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Returns the tokens of each row up to its first `eos`, then padding."""
    result = np.full_like(tokens, PAD)
    for row, out in zip(tokens, result, strict=True):
        stop = int(np.argmax(row == eos)) + 1 if (row == eos).any() else len(row)
        out[:stop] = row[:stop]
    return result


def decode(case: Case, side: str = "right", length: int = 8, rows: slice = slice(None), eos: int = -1) -> np.ndarray:
    source, mask = padded(rows_of(LENGTHS)[rows], length, side)
    return np.asarray(greedy(case.model, case.frozen, case.rows, source, mask, max_new=NEW, eos_id=eos, pad_id=PAD))


@pytest.mark.parametrize(("family", "method"), CASES)
def test_greedy_is_the_likeliest_token_again_and_again(family: str, method: str) -> None:
    case = tuned(family, method)
    wanted = without_cache(family, method)
    got = decode(case)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_scanned_layers_decode_alike(family: str) -> None:
    np.testing.assert_array_equal(decode(tuned(family, "dept", True)), without_cache(family, "dept", True))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_padding_and_other_rows_do_not_matter(family: str) -> None:
    case, wanted = tuned(family, "dept"), without_cache(family, "dept")
    np.testing.assert_array_equal(decode(case, side="left"), wanted)
    np.testing.assert_array_equal(decode(case, rows=slice(1, 3), length=12), wanted[1:3])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_ends_with_its_end_token(family: str) -> None:
    """Where the end token is the first of a row, and where it stands in the middle of one."""
    case, tokens = tuned(family, "dept"), without_cache(family, "dept")
    for eos in (int(tokens[0, 0]), int(tokens[1, 2])):
        wanted = ended(tokens, eos)
        assert (wanted == PAD).any()
        np.testing.assert_array_equal(decode(case, eos=eos), wanted)


def test_the_loop_stops_when_all_rows_have_ended() -> None:
    """With a bound so large that running to it would take minutes."""
    case = tuned("llama", "dept")
    source, mask = padded(rows_of(LENGTHS)[:1], 8)
    first = int(without_cache("llama", "dept")[0, 0])
    run = greedy(case.model, case.frozen, case.rows, source, mask, max_new=20_000, eos_id=first, pad_id=PAD)
    assert run.shape == (1, 20_000)
    np.testing.assert_array_equal(run[0, :3], [first, PAD, PAD])
    assert not np.any(run[0, 1:])


def test_one_program_for_a_shape_of_the_source() -> None:
    case = tuned("llama", "dept")
    decode(case)
    before = greedy._cache_size()
    for seed in range(3):
        source, mask = padded(rows_of(LENGTHS, seed), 8)
        greedy(case.model, case.frozen, case.rows, source, mask, max_new=NEW, eos_id=-1, pad_id=PAD)
    assert greedy._cache_size() == before


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_extend_takes_several_tokens_at_once(family: str) -> None:
    """As scoring does it: the logits behind each, as when the targets are known."""
    case = tuned(family, "dept")
    source, mask = padded(rows_of(LENGTHS), 8)
    tokens = jnp.asarray(np.stack(rows_of([6] * 4, seed=5)))

    @jax.jit
    def in_two_parts(rows: Rows) -> jax.Array:
        _, cache = start_rows(case.model, case.frozen, rows, source, mask, 5)
        first, cache = extend_rows(case.model, case.frozen, rows, cache, tokens[:, None, :3], 0)
        second, _ = extend_rows(case.model, case.frozen, rows, cache, tokens[:, None, 3:5], 3)
        return jnp.concatenate([first[:, 0], second[:, 0]], axis=1)

    whole = case.logits(case.moved, case.frozen, {"source": source, "source_mask": mask, "targets": tokens})
    np.testing.assert_allclose(in_two_parts(case.rows), whole[:, 1:], rtol=1e-4, atol=1e-4)
