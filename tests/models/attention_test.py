"""Attention over segments against its formula; the gradient written by hand must be the one that autodiff finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.models.attention import KV, Segment, attend, causal_bias
from deptjax.typing import Array

B, T, H = 2, 5, 7
HEADS = {"multi-head": (3, 3), "grouped": (6, 3), "multi-query": (5, 1)}


def formula(query: Array, segments: Sequence[Segment], scale: float, keep: Array | None = None) -> Array:
    """Returns softmax(scale * q k^T + bias) v, one array of keys a row, a copy of them for each query head."""
    batch, length, heads, _ = query.shape
    keys, values, biases = [], [], []
    for (k, v), bias, mask, causal in segments:
        copies = heads // k.shape[-3]
        spread = [jnp.broadcast_to(a, (batch, *a.shape[-3:])).repeat(copies, axis=1) for a in (k, v)]
        keys.append(spread[0])
        values.append(spread[1])
        shape = (batch, heads, length, k.shape[-2])
        added = jnp.zeros(shape) if bias is None else jnp.broadcast_to(bias, shape)
        if mask is not None:
            added = jnp.where(mask[:, None, None, :], added, -jnp.inf)
        if causal:
            added = jnp.where(jnp.arange(k.shape[-2])[None] <= jnp.arange(length)[:, None], added, -jnp.inf)
        biases.append(added)
    scores = scale * jnp.einsum("btnh,bnsh->bnts", query, jnp.concatenate(keys, axis=2)) + jnp.concatenate(biases, -1)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    weights = weights if keep is None else weights * keep
    return jnp.einsum("bnts,bnsh->btnh", weights, jnp.concatenate(values, axis=2))


def arrays(heads: tuple[int, int], length: int = T, seed: int = 0) -> dict[str, Any]:
    """Returns a query, a shared segment without bias, and one of each row's own with a bias for each head."""
    random = np.random.default_rng(seed)
    query_heads, kv_heads = heads

    def normal(*shape: int) -> Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    return {
        "query": normal(B, length, query_heads, H),
        "shared": KV(normal(kv_heads, 3, H), normal(kv_heads, 3, H)),
        "own": KV(normal(B, kv_heads, 11, H), normal(B, kv_heads, 11, H)),
        "bias": normal(1, query_heads, length, 11),
    }


def segments_of(a: dict[str, Any]) -> list[Segment]:
    """Returns the two segments."""
    return [Segment(a["shared"]), Segment(a["own"], a["bias"])]


@pytest.mark.parametrize("length", [T, 1])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_values_and_all_gradients_are_those_of_the_formula(heads: tuple[int, int], length: int) -> None:
    given = arrays(heads, length)
    toward = jnp.asarray(np.random.default_rng(1).standard_normal(given["query"].shape), jnp.float32)

    def ours(a: dict[str, Any]) -> Array:
        return attend(a["query"], segments_of(a), 0.3)

    def theirs(a: dict[str, Any]) -> Array:
        return formula(a["query"], segments_of(a), 0.3)

    np.testing.assert_allclose(ours(given), theirs(given), atol=1e-6)
    gradients = [jax.grad(lambda a, f=f: jnp.vdot(f(a), toward))(given) for f in (ours, theirs)]
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(gradients[0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), *gradients)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_masked_and_later_keys_do_not_count(heads: tuple[int, int]) -> None:
    given = arrays(heads, length=11)
    mask = jnp.arange(11)[None] < jnp.asarray([[11], [4]])

    def segments(a: dict[str, Any]) -> list[Segment]:
        return [Segment(a["shared"]), Segment(a["own"], a["bias"], mask, causal=True)]

    def ours(a: dict[str, Any]) -> Array:
        return attend(a["query"], segments(a), 0.3, implementation="xla")

    def theirs(a: dict[str, Any]) -> Array:
        return formula(a["query"], segments(a), 0.3)

    np.testing.assert_allclose(ours(given), theirs(given), atol=1e-6)
    gradients = [jax.grad(lambda a, f=f: jnp.sum(f(a) ** 2))(given) for f in (ours, theirs)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *gradients)


def test_a_causal_segment_has_a_key_for_each_query() -> None:
    given = arrays((3, 3))
    with pytest.raises(ValueError, match="11 keys for 5 queries"):
        attend(given["query"], [Segment(given["own"], causal=True)], 1.0, implementation="xla")


def test_dropped_weights_count_in_values_and_gradients() -> None:
    given, rows = arrays((4, 2)), 3 + 11
    kept = jnp.asarray(np.random.default_rng(2).random((B, 2, 2 * T, rows)) > 0.3, jnp.float32) / 0.7

    def ours(a: dict[str, Any]) -> Array:
        return attend(a["query"], segments_of(a), 0.3, dropout=lambda weights: weights * kept)

    def theirs(a: dict[str, Any]) -> Array:
        return formula(a["query"], segments_of(a), 0.3, keep=kept.reshape(B, 4, T, rows))

    np.testing.assert_allclose(ours(given), theirs(given), atol=1e-6)
    gradients = [jax.grad(lambda a, f=f: jnp.sum(f(a) ** 2))(given) for f in (ours, theirs)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *gradients)


def test_an_untrained_bias_costs_no_gradient_and_hides_what_it_masks() -> None:
    given = arrays((3, 3))
    own = KV(given["own"].keys[:, :, :T], given["own"].values[:, :, :T])
    out = attend(given["query"], [Segment(own, causal_bias(T))], 1.0)
    changed = KV(own.keys.at[:, :, -1].add(9.0), own.values.at[:, :, -1].add(9.0))
    later = attend(given["query"], [Segment(changed, causal_bias(T))], 1.0)
    np.testing.assert_array_equal(out[:, :-1], later[:, :-1])
    assert float(jnp.abs(out[:, -1] - later[:, -1]).max()) > 1.0
