"""Classification by likelihood: how probable the model finds each label, or any given continuation, behind a text."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deptjax.inference.rows import Rows, extend_rows, start_rows
from deptjax.typing import Array, Bool, Float, Int, Tokens, Tree


@functools.partial(jax.jit, static_argnums=0)
def token_scores(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Tokens,
    source_mask: Array,
    label_tokens: Int[Array, "*B C"],
    label_mask: Bool[Array, "*B C"],
) -> Float[Array, "B C"]:
    """Returns log-probabilities over labels that are one token each, normalised over the row's labels alone.

    Only the logits of the labels' tokens are computed, at one position a row. A label that is masked out has -inf.
    Labels (C,) are those of all rows; (B, C) gives each row its own.
    """
    # What start returns beside the logits is not asked for, so no cache is built, and on T5 the decoder runs one step.
    logits, _ = start_rows(model, frozen, rows, source, source_mask, max_new=0, vocab_ids=label_tokens)
    return jax.nn.log_softmax(jnp.where(label_mask, logits, -jnp.inf), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def sequence_scores(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Tokens,
    source_mask: Array,
    sequences: Int[Array, "*B C U"],
    sequence_mask: Bool[Array, "*B C U"],
) -> Float[Array, "B C"]:
    """Returns log p(sequence | text), the sum over its tokens, in nats; -inf for a sequence that is masked out whole.

    The source is run once; each sequence is then run behind its cache. Sequences (C, U) are those of all rows;
    (B, C, U) gives each row its own.
    """
    count, length = sequences.shape[-2:]
    shape = (source.shape[0], count, length)
    sequences, mask = jnp.broadcast_to(sequences, shape), jnp.broadcast_to(sequence_mask, shape)
    logits, cache = start_rows(model, frozen, rows, source, source_mask, length - 1)
    first = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), sequences[:, :, 0], axis=1)

    def rest(sequence: tuple[Array, Array]) -> Array:
        tokens, real = sequence
        logits, _ = extend_rows(model, frozen, rows, cache, tokens[:, None, :-1], 0)
        log_probs = jax.nn.log_softmax(logits[:, 0], axis=-1)
        picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(real[:, 1:], picked, 0.0), axis=1)

    total = first
    if length > 1:  # one after the other: the logits of all at once would be C times as large
        total = total + jax.lax.map(rest, (sequences.swapaxes(0, 1), mask.swapaxes(0, 1))).T
    return jnp.where(mask[:, :, 0], total, -jnp.inf)
