"""Attention over segments.

Keys and values come as a list of *segments* rather than one array: the prompt (shared by all rows), the text (one a
row), the tokens generated so far, what fills the attention site. Each has its own batch shape, so that what is the same
for every row is neither kept nor computed more than once.

How it is computed is chosen by name (`deptjax.models.fused_attention.IMPLEMENTATIONS`). `xla` is here: products and a
softmax, which every platform has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.models.fused_attention import Problem, choose, fused
from deptjax.typing import Array, Bool, Float, Int

MASKED = -1e9  # added to scores that must not count; finite, so that a row without any key has no NaN


class KV(NamedTuple):
    """Keys and values: (B, K, S, H); (K, S, H), or a B of 1, when all rows share them.

    Heads stand in front of positions, as the products of attention want them: a cache is then never transposed.
    """

    keys: Array
    values: Array


class Segment(NamedTuple):
    """Keys and values to attend to, and which of them count.

    `bias` is added to their scores: broadcastable to (B, N, T, S). `mask` (B, S) is true on keys that count, and these
    come first. When `causal`, there are as many keys as queries, and query t sees keys 0 to t.
    """

    kv: KV
    bias: Array | None = None
    mask: Bool[Array, "B S"] | None = None
    causal: bool = False


def attend(
    query: Float[Array, "B T N H"],
    segments: Sequence[Segment],
    scale: float,
    dropout: Callable[[Array], Array] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale * q k^T + bias) v over the keys of all segments together; the softmax in float32.

    With K < N key/value heads, query head n uses key/value head n // (N / K) (grouped-query attention).
    `dropout` is applied to the attention weights. `implementation` is one of `IMPLEMENTATIONS`; what a kernel cannot
    compute (a single query, rows that share a text, dropout) is computed by `xla`.
    """
    batch, length, _, width = query.shape
    query = query * scale
    # A decoding step's scores are smaller than the cache, which joining would copy; so are those of a few rows that
    # share a text, such as the beams of one source.
    apart = length == 1 or any(s.kv.keys.ndim == 4 and len(s.kv.keys) != batch for s in segments)
    if not apart:
        keys, values = _joined(segments, batch)
        if dropout is None and not any(s.causal or s.mask is not None for s in segments[:-1]):
            last = segments[-1]
            problem = Problem(query, keys, values, None, _joined_mask(segments, batch), last.causal)
            name = choose(
                implementation, problem, max((len(s.bias) for s in segments if s.bias is not None), default=0)
            )
            if name != "xla":
                return fused(name, problem._replace(bias=_full_bias(segments, query, keys)))
    kv_heads = segments[0].kv.keys.shape[-3]
    grouped = query.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, -1, width)  # the queries of a key/value head, one behind the other
    segments = [_with_masks_as_bias(segment, length) for segment in segments]
    if apart:
        mixed = _mix_apart(grouped, segments, length, dropout)
    else:
        shape = (*grouped.shape[:3], keys.shape[2])
        bias = _joined_bias(segments)
        keep = None if dropout is None else dropout(jnp.ones(shape, query.dtype))
        mixed = _mix(grouped, keys, values, None if bias is None else _by_head(bias, shape, length), keep)
    return mixed.reshape(batch, kv_heads, -1, length, width).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _joined(segments: Sequence[Segment], batch: int) -> KV:
    """Returns the keys and values of all segments, a copy of what is shared for each row."""
    parts = zip(*(segment.kv for segment in segments), strict=True)
    return KV(*(jnp.concatenate([jnp.broadcast_to(a, (batch, *a.shape[-3:])) for a in part], axis=2) for part in parts))


def _joined_mask(segments: Sequence[Segment], batch: int) -> Bool[Array, "B S"] | None:
    """Returns which keys count, where only the last segment says so; the true ones come first."""
    mask = segments[-1].mask
    if mask is None:
        return None
    before = sum(segment.kv.keys.shape[-2] for segment in segments[:-1])
    return jnp.pad(jnp.broadcast_to(mask, (batch, mask.shape[1])), ((0, 0), (before, 0)), constant_values=True)


def _full_bias(segments: Sequence[Segment], query: Array, keys: Array) -> Float[Array, "_ N T S"] | None:
    """Returns the biases of all segments without their masks; its first axis is 1 when rows share it."""
    bias = _joined_bias(segments)
    if bias is None:
        return None
    return jnp.broadcast_to(bias, (len(bias), query.shape[2], query.shape[1], keys.shape[2])).astype(jnp.float32)


def _with_masks_as_bias(segment: Segment, length: int) -> Segment:
    """Returns the segment with its mask and its causality in its bias."""
    kv, bias, mask, causal = segment
    if causal and kv.keys.shape[-2] != length:
        raise ValueError(f"a causal segment has {kv.keys.shape[-2]} keys for {length} queries")
    parts = [bias, causal_bias(length) if causal else None, None if mask is None else mask_bias(mask)]
    given = [part for part in parts if part is not None]
    return Segment(kv, functools.reduce(jnp.add, given) if given else None)


def _by_head(bias: Array, shape: tuple[int, ...], length: int) -> Array:
    """Returns a bias that broadcasts to (B, N, T, S) in the shape (B, K, N / K * T, S) of the scores."""
    batch, kv_heads, queries, keys = shape
    return jnp.broadcast_to(bias, (batch, kv_heads * queries // length, length, keys)).reshape(shape)


@jax.custom_vjp
def _mix(q: Array, k: Array, v: Array, bias: Array | None, keep: Array | None) -> Array:
    """Returns (softmax(q k^T + bias) * keep) v for q (B, K, T, H) and k, v (B, K, S, H); bias and keep (B, K, T, S).

    Its gradient is written by hand: with W the weights, G the gradient of the result O and dW = keep * (G v^T), that of
    the scores is W * (dW - rowsum(W * dW)), and rowsum(W * dW) = rowsum(G * O): a sum over H numbers and not over S
    (the rearrangement of Dao et al. 2022, arXiv 2205.14135, appendix B.2). On CPUs it halves the time of attention.
    """
    return _mix_forward(q, k, v, bias, keep)[0]


def _mix_forward(q: Array, k: Array, v: Array, bias: Array | None, keep: Array | None) -> tuple[Array, tuple[Any, ...]]:
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkts,bksh->bkth", weights if keep is None else weights * keep, v)
    return out, (q, k, v, weights, out, keep, bias is None)


def _mix_backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array | None, ...]:
    q, k, v, weights, out, keep, no_bias = saved
    dropped = weights if keep is None else weights * keep
    grad_v = jnp.einsum("bkts,bkth->bksh", dropped, grad)
    grad_weights = jnp.einsum("bkth,bksh->bkts", grad, v, preferred_element_type=jnp.float32)
    if keep is not None:
        grad_weights = grad_weights * keep
    total = jnp.sum(grad.astype(jnp.float32) * out, axis=-1, keepdims=True)
    grad_scores = weights * (grad_weights - total)
    narrow = grad_scores.astype(q.dtype)
    grad_q = jnp.einsum("bkts,bksh->bkth", narrow, k)
    grad_k = jnp.einsum("bkts,bkth->bksh", narrow, q)
    # The bias' own is not computed unless it is trained; `keep` is random, not a parameter.
    return grad_q, grad_k, grad_v, None if no_bias else grad_scores, None if keep is None else jnp.zeros_like(keep)


_mix.defvjp(_mix_forward, _mix_backward)


def _joined_bias(segments: Sequence[Segment]) -> Array | None:
    """Returns the biases of all segments side by side, in the smallest shape that holds them, or `None`."""
    given = [segment.bias for segment in segments if segment.bias is not None]
    if not given:
        return None
    lead = jnp.broadcast_shapes(*(bias.shape[:3] for bias in given))

    def widened(kv: KV, bias: Array | None) -> Array:
        shape = (*lead, kv.keys.shape[-2])
        return jnp.zeros(shape) if bias is None else jnp.broadcast_to(bias, shape)

    return jnp.concatenate([widened(segment.kv, segment.bias) for segment in segments], axis=-1)


def _mix_apart(
    q: Float[Array, "B K T H"],
    segments: Sequence[Segment],
    length: int,
    dropout: Callable[[Array], Array] | None,
) -> Float[Array, "B K T H"]:
    """Returns what `_mix` returns, with the scores of the segments joined instead of their keys and values."""
    kvs = [_without_row(s.kv) if len(s.kv.keys) == 1 != len(q) else s.kv for s in segments]
    scores = []
    for (keys, _), bias in zip(kvs, (segment.bias for segment in segments), strict=True):
        rows = "b" if keys.ndim == 4 else ""
        score = jnp.einsum(f"bkth,{rows}ksh->bkts", q, keys, preferred_element_type=jnp.float32)
        scores.append(score if bias is None else score + _by_head(bias, score.shape, length))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    if dropout is not None:
        weights = dropout(weights)
    result, start = jnp.zeros_like(q), 0
    for _, values in kvs:
        rows, size = ("b" if values.ndim == 4 else ""), values.shape[-2]
        result += jnp.einsum(f"bkts,{rows}ksh->bkth", weights[..., start : start + size], values)
        start += size
    return result


def _without_row(kv: KV) -> KV:
    return KV(*(a[0] if a.ndim == 4 else a for a in kv))


def heads_in_front(projected: Float[Array, "*B S K H"]) -> Float[Array, "*B K S H"]:
    """Returns projected keys or values as `KV` has them."""
    return jnp.swapaxes(projected, -3, -2)


def causal_bias(length: int, dtype: jnp.dtype = jnp.float32) -> Float[Array, "1 1 T T"]:
    """Returns the bias that hides from each position what comes after it."""
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, MASKED).astype(dtype)[None, None]


def mask_bias(mask: Array) -> Float[Array, "B 1 1 S"]:
    """Returns the bias that hides the keys where `mask` (B, S) is false."""
    return jnp.where(mask, 0.0, MASKED)[:, None, None, :]


def append(buffer: KV, new: KV, t: Array | int) -> KV:
    """Returns the buffer (B, K, G, H) with new keys and values (B, K, U, H) written from slot `t` on."""
    write = jax.lax.dynamic_update_slice_in_dim
    return KV(write(buffer.keys, new.keys, t, axis=2), write(buffer.values, new.values, t, axis=2))


def front_bias(vectors: int, length: Array | int | None) -> Float[Array, "1 1 1 M"] | None:
    """Returns the bias that hides all but the last `length` of a prompt's vectors; `None` where none is hidden."""
    return None if length is None else mask_bias(jnp.arange(vectors)[None] >= vectors - length)


def select_beams(cache: Any, parents: Int[Array, "K"]) -> Any:
    """Returns a cache whose beam k goes on from what beam `parents[k]` has written.

    Only keys and values of new tokens (`new` of each layer, beams on axis -4) move: those before them are shared.
    """

    def selected(layer: Any) -> Any:
        return layer._replace(new=KV(*(jnp.take(a, parents, axis=-4) for a in layer.new)))

    return cache._replace(layers=jax.tree.map(selected, cache.layers, is_leaf=lambda node: hasattr(node, "new")))


def step_bias(length: int, slots: int, t: Array | int) -> Float[Array, "1 1 U G"]:
    """Returns the bias with which new token u, written at slot `t + u`, sees the slots up to its own."""
    seen = jnp.arange(slots)[None, :] <= t + jnp.arange(length)[:, None]
    return jnp.where(seen, 0.0, MASKED)[None, None]
