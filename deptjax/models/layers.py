"""What backbones are made of: projections with their site, norms, activations, an MLP, embeddings and the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.methods.base import NO_SITES, SITE, AttentionSite, LinearSite, ResidualSite, Sites, StreamSite
from deptjax.models.attention import KV, Segment, heads_in_front
from deptjax.quantization import with_kernel
from deptjax.typing import Array, Bool, Float, Int

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
}


class Linear(nn.Module):
    """A projection, `x @ kernel` or `x @ kernel + bias`, and its `linear` site.

    The kernel in the tree may be a quantised one (`deptjax.quantization`): a node of arrays, the first of which has the
    kernel's shape, which is all that Linen looks at.

    Attributes:
      features: O, width of the result.
      place: the path of its site.
      sites: what fills the sites.
      bias: whether there is one.
    """

    features: int
    place: str
    sites: Sites = NO_SITES
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = with_kernel(jnp.matmul, x, kernel)
        if self.bias:
            y = y + _wide(self.param("bias", nn.initializers.zeros, (self.features,)), y)
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
        return wide.astype(x.dtype) * _wide(scale, x)


class LayerNorm(nn.Module):
    """`scale * (x - mean(x)) / sqrt(var(x) + eps) + bias`, mean and variance in float32. Ba et al. 2016, 1607.06450."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * _wide(scale, x) + _wide(bias, x)


def _wide(vector: Array, x: Array) -> Array:
    """Returns a vector (D,) in the shape (..., D) and the dtype of `x`."""
    return jnp.broadcast_to(vector.astype(x.dtype), x.shape)


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


class PositionEmbedding(nn.Module):
    """A learned vector for each position."""

    positions: int
    width: int

    @nn.compact
    def __call__(self, positions: Int[Array, "*S"], dtype: Any) -> Float[Array, "*S D"]:
        """Returns the vectors of positions.

        Padding may stand before the first position or behind the last: it gets a vector all the same, a finite one,
        since nothing times not-a-number is not nothing.
        """
        table = self.param("embedding", nn.initializers.normal(0.02), (self.positions, self.width))
        return jnp.take(table, positions, axis=0, mode="clip").astype(dtype)


class MLP(nn.Module):
    """`down(act(up(x)))` with biases, as the config of GPT-2 or BERT has it."""

    config: Any
    sites: Sites

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def linear(name: str, features: int) -> Linear:
            return Linear(features, f"mlp/{name}", self.sites, bias=True, name=name)

        hidden = ACTIVATIONS[self.config.activation](linear("up", self.config.mlp_dim)(x))
        return linear("down", self.config.width)(hidden)


class Head(nn.Module):
    """An output head of its own, not tied to the embedding."""

    vocab_size: int

    @nn.compact
    def __call__(self, states: Array, vocab_ids: Array | None = None) -> Array:
        """Returns float32 logits (..., V), or (..., C) for the C columns `vocab_ids`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (states.shape[-1], self.vocab_size))
        kernel = kernel if vocab_ids is None else kernel[:, vocab_ids]

        def product(states: Array, kernel: Array) -> Array:
            return jnp.einsum("...d,dv->...v", states, kernel, preferred_element_type=jnp.float32)

        return with_kernel(product, states, kernel)


def extra_segments(sites: Sites, path: str, num_heads: int, head_dim: int, dtype: jnp.dtype) -> list[Segment]:
    """Returns the segment that fills the `attention` site of a layer, if any. To be called in a compact method."""
    fill = sites.attention and sites.attention(AttentionSite(path, num_heads, head_dim), SITE)
    if not fill:
        return []
    keys, values = fill()
    return [Segment(KV(*(heads_in_front(a.astype(dtype)) for a in (keys, values))))]


def residual_fill(sites: Sites, path: str, width: int) -> Callable[[Array], Array]:
    """Returns what fills the `residual` site after a sub-layer, or the identity. To be called in a compact method."""
    fill = sites.residual and sites.residual(ResidualSite(path, width), f"{path.split('/')[-1]}_{SITE}")
    return fill or (lambda y: y)


def fill_stream(
    sites: Sites, path: str, x: Array, prompt: Array | None, columns: int, text: Callable[[], Array]
) -> tuple[Array, Array | None]:
    """Returns a block's streams with what fills the `stream` site done to the prompt. To be called in a compact method.

    The prompt is a stream of its own, (M, D), or the first `columns` of `x` (B, S, D), or there is none; `text` returns
    the states (B, D) of the rows' texts.
    """
    fill = sites.stream and sites.stream(StreamSite(path, x.shape[-1]), f"prompt_{SITE}")
    if not fill:
        return x, prompt
    if prompt is not None:
        return x, fill(prompt, None)
    if columns:
        return jnp.concatenate([fill(x[:, :columns], text), x[:, columns:]], axis=1), None
    if fill.is_initializing():
        fill(x[:, :1], lambda: x[:, 0])  # a prompt will come: its parameters are made here
    return x, None


def mean_states(x: Float[Array, "B S D"], columns: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """Returns the mean of each row's states at the columns that are true: of one column, its state."""
    counts = jnp.maximum(jnp.sum(columns, axis=1, keepdims=True), 1)
    return jnp.einsum("bs,bsd->bd", (columns / counts).astype(x.dtype), x)
