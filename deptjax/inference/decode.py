"""Greedy decoding, compiled as one loop that ends when every row has ended."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.inference.rows import Rows, extend_rows, start_rows
from deptjax.typing import Array, Int, Tokens, Tree


class _Loop(NamedTuple):
    t: Array
    token: Array
    done: Array
    cache: Any
    output: Array


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new", "eos_id", "pad_id"))
def greedy(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Tokens,
    source_mask: Array,
    *,
    max_new: int,
    eos_id: int,
    pad_id: int,
) -> Int[Array, "B G"]:
    """Returns the likeliest next token again and again: (B, max_new) int32, `pad_id` behind a row's `eos_id`.

    The source's keys and values (and on T5 the encoder) are computed once; each step adds one token to a cache of
    fixed size, so the whole loop is one program for each shape of the source.
    """
    logits, cache = start_rows(model, frozen, rows, source, source_mask, max_new)
    batch = source.shape[0]

    def pick(logits: Array, done: Array) -> Array:
        return jnp.where(done, pad_id, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

    def going_on(loop: _Loop) -> Array:
        return (loop.t < max_new) & ~jnp.all(loop.done)

    def body(loop: _Loop) -> _Loop:
        output = jax.lax.dynamic_update_slice_in_dim(loop.output, loop.token[:, None], loop.t, axis=1)
        done = loop.done | (loop.token == eos_id)
        logits, cache = extend_rows(model, frozen, rows, loop.cache, loop.token[:, None, None], loop.t)
        return _Loop(loop.t + 1, pick(logits[:, 0, 0], done), done, cache, output)

    nobody = jnp.zeros((batch,), bool)
    output = jnp.full((batch, max_new), pad_id, jnp.int32)
    first = _Loop(jnp.zeros((), jnp.int32), pick(logits, nobody), nobody, cache, output)
    return jax.lax.while_loop(going_on, body, first).output
