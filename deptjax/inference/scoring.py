"""Classification by likelihood: how probable the model finds each label behind a text."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deptjax.typing import Array, Bool, Float, Int, Tokens, Tree


@functools.partial(jax.jit, static_argnums=0)
def token_scores(
    model: Any, trainable: Tree, frozen: Tree, source: Tokens, source_mask: Array, label_tokens: Int[Array, "C"]
) -> Float[Array, "B C"]:
    """Returns log-probabilities over labels that are one token each, normalised over the labels alone.

    Only the logits of the labels' tokens are computed, at one position a row.
    """
    # A text of one target: no cache is built, and on T5 the decoder runs one step.
    batch = {"source": source, "source_mask": source_mask, "targets": jnp.zeros((source.shape[0], 1), jnp.int32)}
    logits = model.target_logits(trainable, frozen, batch, vocab_ids=label_tokens)
    return jax.nn.log_softmax(logits[:, 0], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def sequence_scores(
    model: Any,
    trainable: Tree,
    frozen: Tree,
    source: Tokens,
    source_mask: Array,
    sequences: Int[Array, "C U"],
    sequence_mask: Bool[Array, "C U"],
) -> Float[Array, "B C"]:
    """Returns log p(label | text), normalised over the labels, for labels of any number of tokens.

    The source is run once; each label's tokens are then run behind its cache.
    """
    rows, length = source.shape[0], sequences.shape[1]
    logits, cache = model.start(trainable, frozen, source, source_mask, length)
    total = jax.nn.log_softmax(logits, axis=-1)[:, sequences[:, 0]]

    def rest(label: tuple[Array, Array]) -> Array:
        tokens, mask = label
        before = jnp.broadcast_to(tokens[:-1], (rows, length - 1))
        logits, _ = model.extend(trainable, frozen, cache, before, 0)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_probs, jnp.broadcast_to(tokens[1:, None], (rows, length - 1, 1)), axis=-1)
        return jnp.sum(picked[..., 0] * mask[1:][None], axis=1)

    if length > 1:
        total = total + jax.lax.map(rest, (sequences, sequence_mask)).T
    return jax.nn.log_softmax(total, axis=-1)
