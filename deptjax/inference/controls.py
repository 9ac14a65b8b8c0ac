"""What a compiled decoding loop is told and gives back, and the parts of a step that all loops share.

Everything in `Controls` is traced: one program serves every limit, temperature, length penalty and set of stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.errors import UserError
from deptjax.inference.decoding import Decoding
from deptjax.inference.stop import ACCEPTING, NO_STOPS, START
from deptjax.typing import Array, Float, Int, Key

RUNNING, LENGTH, EOS, STOP = -1, 0, 1, 2  # why a text ended; RUNNING only inside the loops
WHEN_FULL, NEVER = 1, 2  # `early_stopping` as a number: True and "never"; False is 0
MAX_EOS = 4
_LEAST_ROOM = 8


class Controls(NamedTuple):
    """The settings of a batch of B rows, as arrays.

    `limits` and `minimums` (B,) int32: the most and the least new tokens of each row; a row with limit 0 stays empty.
    `eos_ids` (MAX_EOS,) int32, -1 where unused; `pad_id` () int32. `keys` (B,): the PRNG key of each row.
    `temperature`, `top_p`, `length_penalty` () float32; `top_k`, `early_stopping` () int32. `stop_table` (S, V) int32.
    """

    limits: Int[Array, "B"]
    minimums: Int[Array, "B"]
    eos_ids: Int[Array, "E"]
    pad_id: Int[Array, ""]
    keys: Key
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    length_penalty: Float[Array, ""]
    early_stopping: Int[Array, ""]
    stop_table: Int[Array, "S V"]


class Decoded(NamedTuple):
    """N texts for each of B rows, with room for G tokens.

    `tokens` (B, N, G) int32, the pad id behind a text's end. `lengths` (B, N) int32, the end token included.
    `log_probs` (B, N, G) float32: of each token in the model's own distribution, the log-softmax of its logits as they
    are, without temperature, filters or a minimum; 0 behind the end. `scores` (B, N) float32: their sum; in a beam
    search divided by `length ** length_penalty`, best first. `ended` (B, N) int8: `LENGTH`, `EOS` or `STOP`.
    """

    tokens: Int[Array, "B N G"]
    lengths: Int[Array, "B N"]
    log_probs: Float[Array, "B N G"]
    scores: Float[Array, "B N"]
    ended: Int[Array, "B N"]


def nothing_yet(rows: int, texts: int, room: int, pad_id: Array, score: float = 0.0) -> Decoded:
    """Returns empty, running texts."""
    return Decoded(
        tokens=jnp.full((rows, texts, room), pad_id, jnp.int32),
        lengths=jnp.zeros((rows, texts), jnp.int32),
        log_probs=jnp.zeros((rows, texts, room), jnp.float32),
        scores=jnp.full((rows, texts), score, jnp.float32),
        ended=jnp.full((rows, texts), RUNNING, jnp.int8),
    )


def room_for(new_tokens: int) -> int:
    """Returns G, the power of two of at least 8 that holds so many new tokens: few sizes, so few programs.

    >>> [room_for(n) for n in (1, 8, 9, 100)]
    [8, 8, 16, 128]
    """
    return max(_LEAST_ROOM, 1 << (new_tokens - 1).bit_length())


def row_keys(seed: int, numbers: Sequence[int] | np.ndarray) -> Key:
    """Returns the PRNG key of each row, (B,): of the seed and the row's own number, whatever batch it is in.

    >>> row_keys(0, [4, 7])[1] == row_keys(0, [7])[0]
    Array(True, dtype=bool)
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers, jnp.uint32))


def make_controls(
    decoding: Decoding,
    rows: int,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    stops: Int[Array, "S V"] | None = None,
    limits: Sequence[int] | np.ndarray | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> Controls:
    """Returns the settings of a batch of `rows` rows.

    Args:
      decoding: what the user chose.
      rows: B.
      eos_ids: the tokens that end a text; none, or four at most, else `UserError`.
      pad_id: what stands behind a text's end.
      stops: the table of `decoding.stop`, from `stop_table`.
      limits: the most new tokens of each row where they differ from `decoding.max_new_tokens`; 0 for filler rows.
      numbers: each row's own number, on which its samples depend; by default its place in the batch.
    """
    if len(eos_ids) > MAX_EOS:
        raise UserError(f"{len(eos_ids)} end tokens are given, expected {MAX_EOS} at most; shorten eos_ids")
    if decoding.stop and stops is None:
        raise ValueError("the settings have stop strings: give their table")
    most = np.full(rows, decoding.max_new_tokens) if limits is None else np.asarray(limits)
    early = NEVER if decoding.early_stopping == "never" else int(decoding.early_stopping)
    return Controls(
        limits=jnp.asarray(most, jnp.int32),
        minimums=jnp.full(rows, decoding.min_new_tokens, jnp.int32),
        eos_ids=jnp.asarray([*eos_ids, *[-1] * (MAX_EOS - len(eos_ids))], jnp.int32),
        pad_id=jnp.asarray(pad_id, jnp.int32),
        keys=row_keys(decoding.seed, np.arange(rows) if numbers is None else numbers),
        temperature=jnp.asarray(decoding.temperature, jnp.float32),
        top_k=jnp.asarray(decoding.top_k, jnp.int32),
        top_p=jnp.asarray(decoding.top_p, jnp.float32),
        length_penalty=jnp.asarray(decoding.length_penalty, jnp.float32),
        early_stopping=jnp.asarray(early, jnp.int32),
        stop_table=NO_STOPS if stops is None else stops,
    )


def is_eos(tokens: Int[Array, "..."], eos_ids: Int[Array, "E"]) -> Array:
    """Returns whether each token is an end token; the shape of `tokens`."""
    return jnp.any(tokens[..., None] == eos_ids.reshape((1,) * tokens.ndim + (-1,)), axis=-1)


def hold_back_eos(scores: Float[Array, "B N V"], t: Array, controls: Controls) -> Float[Array, "B N V"]:
    """Returns the scores of token `t` with minus infinity for end tokens, in rows that are still below their minimum.

    As Hugging Face's `min_new_tokens`: what is left is not normalised again.
    """
    ends = is_eos(jnp.arange(scores.shape[-1]), controls.eos_ids)
    early = t < controls.minimums
    return jnp.where(early[:, None, None] & ends[None, None], -jnp.inf, scores)


def end_reasons(tokens: Int[Array, "B N"], states: Int[Array, "B N"], t: Array, controls: Controls) -> Array:
    """Returns (B, N) int8 why a text ends with its token `t`, or `RUNNING`. `states` are those behind the token."""
    last = jnp.broadcast_to((t + 1 >= controls.limits)[:, None], tokens.shape)
    reasons = jnp.where(last, LENGTH, RUNNING)
    reasons = jnp.where(states == ACCEPTING, STOP, reasons)
    return jnp.where(is_eos(tokens, controls.eos_ids), EOS, reasons).astype(jnp.int8)


def first_states(rows: int, texts: int) -> Int[Array, "B N"]:
    """Returns the automaton's states of empty texts."""
    return jnp.full((rows, texts), START, jnp.int32)
