"""Beam search, compiled as one loop that ends when no row can find a better text.

Each row has K running beams and a set of the K best finished texts. A step looks at all K * V continuations, ranked by
the sum of their log-probabilities: of the best K, those that end join the finished set, and the best K that do not end
run on. Finished texts are ranked by

    sum of log-probabilities / length ** length_penalty

with the number of new tokens, the end token included, as the length: the rule of Hugging Face's `generate`, and not
that of Wu et al. 2016 (arXiv 1609.08144, equation 14), `((5 + length) / 6) ** alpha`, though it serves the same end.
A row is done when it is at its limit, or by `early_stopping` (see `Decoding`), whose default is a heuristic that may
miss a better text. At the limit the running beams count as finished.

Hugging Face keeps the best `(1 + end tokens) * K` continuations so that K of them do not end. Here the K best that do
not end are taken among all: the same beams, and no row is left without one when many tokens complete a stop string.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.inference.controls import (
    LENGTH,
    NEVER,
    RUNNING,
    WHEN_FULL,
    Controls,
    Decoded,
    end_reasons,
    first_states,
    hold_back_eos,
    is_eos,
    nothing_yet,
)
from deptjax.inference.rows import Rows, extend_rows, select_beams, start_rows
from deptjax.inference.stop import ACCEPTING, advance
from deptjax.typing import Array, Bool, Float, Int, Tokens, Tree


class _Search(NamedTuple):
    t: Array  # tokens chosen so far
    cache: Any
    parents: Int[Array, "B K"]  # the beams, before the last step, of which the running ones are continuations
    states: Int[Array, "B K"]  # of the stop strings' automaton
    running: Decoded  # its scores are plain sums
    finished: Decoded  # a score of minus infinity: not yet a text
    open: Bool[Array, "B"]


@functools.partial(jax.jit, static_argnames=("model", "max_new", "num_beams", "num_return"))
def beam_search(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Tokens,
    source_mask: Bool[Array, "B T"],
    controls: Controls,
    *,
    max_new: int,
    num_beams: int,
    num_return: int = 1,
) -> Decoded:
    """Returns the best `num_return` (N) texts of each row, best first; arguments otherwise as of `decode`.

    The source's keys and values (and on T5 the encoder) are computed and kept once a row; only those of new tokens
    follow the beams. A row with limit 0 gets empty texts with a score of minus infinity.
    """
    controls = controls._replace(limits=jnp.minimum(controls.limits, max_new))
    logits, cache = start_rows(model, frozen, rows, source, source_mask, max_new, num_beams)
    batch = source.shape[0]

    def body(search: _Search) -> _Search:
        cache = select_beams(search.cache, search.parents)
        last = jax.lax.dynamic_index_in_dim(search.running.tokens, search.t - 1, axis=-1)
        logits, cache = extend_rows(model, frozen, rows, cache, last, search.t - 1)
        return _step(search._replace(cache=cache), logits[:, :, 0], controls)

    running = nothing_yet(batch, num_beams, max_new, controls.pad_id)
    # All beams are still the same, empty one: only the first may be continued.
    only_first = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)
    running = running._replace(scores=jnp.broadcast_to(only_first, (batch, num_beams)))
    finished = nothing_yet(batch, num_beams, max_new, controls.pad_id, -jnp.inf)
    finished = finished._replace(ended=jnp.full_like(finished.ended, LENGTH))
    same = jnp.zeros((batch, num_beams), jnp.int32)
    zero, states = jnp.zeros((), jnp.int32), first_states(batch, num_beams)
    search = _Search(zero, cache, same, states, running, finished, controls.limits > 0)
    search = _step(search, jnp.broadcast_to(logits[:, None], (batch, num_beams, logits.shape[-1])), controls)
    search = jax.lax.while_loop(lambda search: jnp.any(search.open), body, search)
    return jax.tree.map(lambda a: a[:, :num_return], search.finished)


def _step(search: _Search, logits: Float[Array, "B K V"], controls: Controls) -> _Search:
    """Returns the search with one more token: the running beams, the finished set, and which rows go on."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    totals = search.running.scores[..., None] + hold_back_eos(log_probs, search.t, controls)
    finished = _finish(search, log_probs, totals, controls)
    going_on = jnp.where(_ends(search.states, totals.shape, controls), -jnp.inf, totals)
    parents, states, running = _continue(search, log_probs, going_on, controls)
    t = search.t + 1
    still = search.open & (t < controls.limits) & _can_improve(running.scores, finished.scores, t, controls)
    return _Search(t, search.cache, parents, states, running, finished, still)


def _ends(states: Int[Array, "B K"], shape: tuple[int, ...], controls: Controls) -> Bool[Array, "B K V"]:
    """Returns whether each continuation ends with its token, by an end token or a stop string."""
    tokens = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    ends = is_eos(jnp.arange(shape[-1]), controls.eos_ids)[None, None]
    behind = advance(controls.stop_table, jnp.broadcast_to(states[..., None], shape), tokens)
    return ends | (behind == ACCEPTING)


def _continue(
    search: _Search, log_probs: Array, totals: Float[Array, "B K V"], controls: Controls
) -> tuple[Int[Array, "B K"], Int[Array, "B K"], Decoded]:
    """Returns the best K continuations: of which beam each is, the automaton's states, and the texts."""
    batch, beams, size = totals.shape
    scores, flat = jax.lax.top_k(totals.reshape(batch, beams * size), beams)
    parents, tokens = flat // size, (flat % size).astype(jnp.int32)
    added = jnp.take_along_axis(log_probs.reshape(batch, -1), flat, axis=1)
    states = advance(controls.stop_table, jnp.take_along_axis(search.states, parents, axis=1), tokens)
    old = _take(search.running, parents)
    texts = Decoded(
        tokens=jax.lax.dynamic_update_slice_in_dim(old.tokens, tokens[..., None], search.t, axis=-1),
        lengths=old.lengths + 1,
        log_probs=jax.lax.dynamic_update_slice_in_dim(old.log_probs, added[..., None], search.t, axis=-1),
        scores=scores,
        ended=end_reasons(tokens, states, search.t, controls),
    )
    return parents, states, texts


def _finish(search: _Search, log_probs: Array, totals: Array, controls: Controls) -> Decoded:
    """Returns the finished set with those of the best K continuations that end; rows that are done keep theirs."""
    _, _, best = _continue(search, log_probs, totals, controls)
    ending = search.open[:, None] & (best.ended != RUNNING)
    ranks = best.scores / _power(best.lengths, controls)
    best = best._replace(scores=jnp.where(ending, ranks, -jnp.inf))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), search.finished, best)
    _, order = jax.lax.top_k(both.scores, totals.shape[1])  # of equal scores, the earlier
    return _take(both, order)


def _can_improve(
    running: Float[Array, "B K"], finished: Float[Array, "B K"], t: Array, controls: Controls
) -> Bool[Array, "B"]:
    """Returns whether a running beam may still become better than the worst finished text, by `early_stopping`."""
    worst = jnp.min(finished, axis=1)
    longest = (controls.early_stopping == NEVER) & (controls.length_penalty > 0)
    lengths = jnp.where(longest, controls.limits, t)
    above = running[:, 0] / _power(lengths, controls) > worst
    full = worst > -jnp.inf
    return jnp.where((controls.early_stopping == WHEN_FULL) & full, False, above)


def _power(lengths: Int[Array, "..."], controls: Controls) -> Array:
    return lengths.astype(jnp.float32) ** controls.length_penalty


def _take(texts: Decoded, order: Int[Array, "B K"]) -> Decoded:
    """Returns the texts in another order along the axis of the beams."""
    return jax.tree.map(
        lambda a: jnp.take_along_axis(a, order if a.ndim == 2 else order[..., None], axis=1),
        texts,
    )
