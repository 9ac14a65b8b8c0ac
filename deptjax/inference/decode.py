"""Greedy decoding and sampling, compiled as one loop that ends when every text has ended.

A token is the likeliest, or is drawn: logits are divided by the temperature, all but the `top_k` likeliest tokens are
left out (Fan et al. 2018, arXiv 1805.04833), then all but the fewest likeliest whose probability sums to `top_p`
(Holtzman et al. 2020, arXiv 1904.09751), and one of the others is drawn. Order and ties are those of Hugging Face's
`generate`: temperature, `top_k` (all that tie with the k-th stay), `top_p` (of those that tie at the edge, the higher
token ids stay).

The draw of token t of text n of a row has the key `fold_in(fold_in(row's key, t), n)`: it depends on nothing else of
the batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.inference.controls import (
    LENGTH,
    RUNNING,
    Controls,
    Decoded,
    end_reasons,
    first_states,
    hold_back_eos,
    nothing_yet,
)
from deptjax.inference.rows import Rows, extend_rows, start_rows
from deptjax.inference.stop import advance
from deptjax.typing import Array, Bool, Float, Int, Tokens, Tree


class _Loop(NamedTuple):
    t: Array  # tokens chosen so far
    cache: Any
    tokens: Int[Array, "B N"]  # the last ones
    states: Int[Array, "B N"]  # of the stop strings' automaton
    texts: Decoded


@functools.partial(jax.jit, static_argnames=("model", "max_new", "texts", "sample"))
def decode(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Tokens,
    source_mask: Bool[Array, "B T"],
    controls: Controls,
    *,
    max_new: int,
    texts: int = 1,
    sample: bool = False,
) -> Decoded:
    """Returns the likeliest next token again and again, or samples: `texts` (N) texts a row.

    Args:
      model: a `PromptedModel`; static, as are `max_new`, `texts` and `sample`.
      frozen: the backbone's parameters.
      rows: what the rows are tuned with.
      source: (B, T) int32 token ids.
      source_mask: true on real tokens.
      controls: the settings; no program is compiled for new ones.
      max_new: G, the room for new tokens; no row's limit may be above it, one that is counts as G.
      texts: N; independent samples. Greedy texts of a row would be equal: it has one.
      sample: draw tokens.

    The source's keys and values (and on T5 the encoder) are computed once a row and shared by its texts.
    """
    controls = controls._replace(limits=jnp.minimum(controls.limits, max_new))
    logits, cache = start_rows(model, frozen, rows, source, source_mask, max_new, texts)
    batch = source.shape[0]

    def step(loop: _Loop, logits: Float[Array, "B N V"]) -> _Loop:
        log_probs, t = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), loop.t
        allowed = hold_back_eos(logits.astype(jnp.float32), t, controls)
        chosen = _draw(allowed, t, controls) if sample else jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        running = loop.texts.ended == RUNNING
        tokens = jnp.where(running, chosen, controls.pad_id)
        states = jnp.where(running, advance(controls.stop_table, loop.states, tokens), loop.states)
        added = jnp.take_along_axis(log_probs, chosen[..., None], axis=-1)[..., 0]
        added = jnp.where(running, added, 0.0)
        old = loop.texts
        new = Decoded(
            tokens=_write(old.tokens, tokens, t),
            lengths=old.lengths + running,
            log_probs=_write(old.log_probs, added, t),
            scores=old.scores + added,
            ended=jnp.where(running, end_reasons(tokens, states, t, controls), old.ended),
        )
        return _Loop(t + 1, loop.cache, tokens, states, new)

    def body(loop: _Loop) -> _Loop:
        logits, cache = extend_rows(model, frozen, rows, loop.cache, loop.tokens[..., None], loop.t - 1)
        return step(loop._replace(cache=cache), logits[:, :, 0])

    empty = nothing_yet(batch, texts, max_new, controls.pad_id)
    filler = jnp.broadcast_to((controls.limits <= 0)[:, None], (batch, texts))
    empty = empty._replace(ended=jnp.where(filler, LENGTH, RUNNING).astype(jnp.int8))
    none = jnp.zeros((batch, texts), jnp.int32)
    loop = _Loop(jnp.zeros((), jnp.int32), cache, none, first_states(batch, texts), empty)
    loop = step(loop, jnp.broadcast_to(logits[:, None], (batch, texts, logits.shape[-1])))
    return jax.lax.while_loop(lambda loop: jnp.any(loop.texts.ended == RUNNING), body, loop).texts


def _write(buffer: Array, values: Array, t: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, values[..., None], t, axis=-1)


def _draw(logits: Float[Array, "B N V"], t: Array, controls: Controls) -> Int[Array, "B N"]:
    """Returns a token for each text of each row, by keys that depend on the row, the step and the text alone."""
    scores = filter_logits(logits / controls.temperature, controls.top_k, controls.top_p)
    steps = jax.vmap(jax.random.fold_in, (0, None))(controls.keys, t)
    texts = jnp.arange(logits.shape[1])
    keys = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, texts))(steps)
    return jax.vmap(jax.vmap(jax.random.categorical))(keys, scores).astype(jnp.int32)


def filter_logits(
    logits: Float[Array, "*B V"], top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Float[Array, "*B V"]:
    """Returns the logits with minus infinity for the tokens that `top_k` and then `top_p` leave out.

    Both may be traced; 0 and 1 leave out nothing, and then nothing is sorted. At least one token stays.

    >>> filter_logits(jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2])), 3, 0.5)
    Array([      -inf, -0.9162907, -1.2039728,       -inf], dtype=float32)
    """
    k, p = jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32)
    return jax.lax.cond((k == 0) & (p >= 1), lambda x: x, lambda x: _filtered(x, k, p), logits)


def _filtered(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Returns what `filter_logits` does. One sort; tokens stay in place, so no draw depends on it."""
    size = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    ascending, order = jax.lax.sort((logits, ids), num_keys=1, is_stable=True)
    k = jnp.where(top_k == 0, size, jnp.minimum(top_k, size))
    kept = ascending >= jax.lax.dynamic_index_in_dim(ascending, size - k, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(kept, ascending, -jnp.inf), axis=-1)
    # What lies below a token, with it, is more than 1 - p: without it, what lies above is less than p.
    kept &= (top_p >= 1) | (jnp.cumsum(probabilities, axis=-1) > 1 - top_p)
    edge = jnp.minimum(jnp.argmax(kept, axis=-1, keepdims=True), size - 1)
    edge = jnp.where(jnp.any(kept, axis=-1, keepdims=True), edge, size - 1)
    value, index = (jnp.take_along_axis(a, edge, axis=-1) for a in (ascending, order))
    return jnp.where((logits > value) | ((logits == value) & (ids >= index)), logits, -jnp.inf)
