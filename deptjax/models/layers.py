"""What both backbones are made of: projections with their site, the RMS norm, the embedding, attention over segments.

Attention here is over a list of *segments* rather than one key/value array: the prompt (shared by all rows), the text
(one a row), the tokens generated so far. Each has its own batch shape, so that what is the same for every row is
neither copied nor computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.methods.base import NO_SITES, SITE, AttentionSite, LinearSite, ResidualSite, Sites
from deptjax.typing import Array, Float

MASKED = -1e9  # added to scores that must not count; finite, so that a row without any key has no NaN


class KV(NamedTuple):
    """Keys and values: (B, S, K, H), or (S, K, H) when all rows share them."""

    keys: Array
    values: Array


class Segment(NamedTuple):
    """Keys and values to attend to, and what is added to their scores: broadcastable to (B, N, T, S), or nothing."""

    kv: KV
    bias: Array | None = None


class Linear(nn.Module):
    """A projection without bias, `x @ kernel`, and its `linear` site.

    Attributes:
      features: O, width of the result.
      place: the path of its site.
      sites: what fills the sites.
    """

    features: int
    place: str
    sites: Sites = NO_SITES

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.sites.linear is None:
            return y
        fill = self.sites.linear(LinearSite(self.place, x.shape[-1], self.features), SITE)
        return y if fill is None else fill(x, y)


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + eps)`, the mean in float32. Zhang and Sennrich 2019, arXiv 1910.07467."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


class Embedding(nn.Module):
    """The input embedding, which can also be the output head."""

    vocab_size: int
    width: int
    dtype: str

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))

    def __call__(self, tokens: Array) -> Array:
        """Returns (..., D) for token ids (...)."""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def attend(self, states: Array, vocab_ids: Array | None = None) -> Array:
        """Returns float32 logits (..., V), or (..., C) for the C rows `vocab_ids`: nothing else is computed."""
        table = self.embedding if vocab_ids is None else self.embedding[vocab_ids]
        return jnp.einsum("...d,vd->...v", states, table.astype(states.dtype), preferred_element_type=jnp.float32)


class Head(nn.Module):
    """An output head of its own, not tied to the embedding."""

    vocab_size: int

    @nn.compact
    def __call__(self, states: Array, vocab_ids: Array | None = None) -> Array:
        """Returns float32 logits (..., V), or (..., C) for the C columns `vocab_ids`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (states.shape[-1], self.vocab_size))
        kernel = kernel if vocab_ids is None else kernel[:, vocab_ids]
        return jnp.einsum("...d,dv->...v", states, kernel.astype(states.dtype), preferred_element_type=jnp.float32)


def attend(
    query: Float[Array, "B T N H"],
    segments: Sequence[Segment],
    scale: float,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale * q k^T + bias) v over the keys of all segments together; the softmax in float32.

    With K < N key/value heads, query head n uses key/value head n // (N / K) (grouped-query attention).
    `dropout` is applied to the attention weights.
    """
    batch, length, heads, width = query.shape
    kv_heads = segments[0].kv.keys.shape[-2]
    grouped = (query * scale).reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = []
    for (keys, _), bias in segments:
        rows = "b" if keys.ndim == 4 else ""
        score = jnp.einsum(f"btkgh,{rows}skh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        if bias is not None:
            score = score.reshape(batch, heads, length, -1)
            score = (score + jnp.broadcast_to(bias, score.shape)).reshape(batch, kv_heads, -1, length, score.shape[-1])
        scores.append(score)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    result, start = jnp.zeros_like(grouped), 0
    for (_, values), _ in segments:
        rows, size = ("b" if values.ndim == 4 else ""), values.shape[-3]
        result += jnp.einsum(f"bkgts,{rows}skh->btkgh", weights[..., start : start + size], values)
        start += size
    return result.reshape(query.shape)


def extra_segments(sites: Sites, path: str, num_heads: int, head_dim: int, dtype: jnp.dtype) -> list[Segment]:
    """Returns the segment that fills the `attention` site of a layer, if any. To be called in a compact method."""
    fill = sites.attention and sites.attention(AttentionSite(path, num_heads, head_dim), SITE)
    if not fill:
        return []
    keys, values = fill()
    return [Segment(KV(keys.astype(dtype), values.astype(dtype)))]


def residual_fill(sites: Sites, path: str, width: int) -> Callable[[Array], Array]:
    """Returns what fills the `residual` site after a sub-layer, or the identity. To be called in a compact method."""
    fill = sites.residual and sites.residual(ResidualSite(path, width), f"{path.split('/')[-1]}_{SITE}")
    return fill or (lambda y: y)


def causal_bias(length: int, dtype: jnp.dtype = jnp.float32) -> Float[Array, "1 1 T T"]:
    """Returns the bias that hides from each position what comes after it."""
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, MASKED).astype(dtype)[None, None]


def mask_bias(mask: Array) -> Float[Array, "B 1 1 S"]:
    """Returns the bias that hides the keys where `mask` (B, S) is false."""
    return jnp.where(mask, 0.0, MASKED)[:, None, None, :]


def append(buffer: KV, new: KV, t: Array | int) -> KV:
    """Returns the buffer (B, G, K, H) with new keys and values (B, U, K, H) written from slot `t` on."""
    write = jax.lax.dynamic_update_slice_in_dim
    return KV(write(buffer.keys, new.keys, t, axis=1), write(buffer.values, new.values, t, axis=1))


def step_bias(length: int, slots: int, t: Array | int) -> Float[Array, "1 1 U G"]:
    """Returns the bias with which new token u, written at slot `t + u`, sees the slots up to its own."""
    seen = jnp.arange(slots)[None, :] <= t + jnp.arange(length)[:, None]
    return jnp.where(seen, 0.0, MASKED)[None, None]
