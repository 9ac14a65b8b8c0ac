"""The LLaMA family: Llama 1, 2, 3, 3.1 and later, SmolLM2, TinyLlama, Mistral without its window.

    x = x + out(attention(rope(q), rope(k), v))      of RMSNorm(x), causal, grouped-query
    x = x + down(silu(gate(y)) * up(y))              of y = RMSNorm(x)

Touvron et al. 2023 (arXiv 2302.13971 and 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783), Su et al. 2021 for
the rotary embedding (arXiv 2104.09864).

Nothing in a prompt that comes first sees the text behind it, so when the prompt is the same for all rows it travels
through the blocks as a stream of its own, (M, D) beside (B, T, D): M positions a batch instead of M a row, exact, and
gradients included. Every row attends to its keys and values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.methods.base import NO_SITES, Sites
from deptjax.models import layers
from deptjax.models.attention import KV, Segment, append, attend, causal_bias, mask_bias, step_bias
from deptjax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context.

    `linear` divides all of them by `factor`; `llama3` divides the slow ones, keeps the fast ones, and blends between
    (the rule of Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA-family model. `dtype` is that of the computation; `scan_layers` stacks the layers."""

    family: ClassVar[str] = "llama"
    is_encoder_decoder: ClassVar[bool] = False
    prompt_lr_ratio: ClassVar[float] = 0.03  # see Backbone.prompt_lr

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    scan_layers: bool = False
    dtype: str = "float32"

    @property
    def context(self) -> int | None:
        """The positions that the model was made for: prompt, source and targets together."""
        return self.max_positions

    def make(self, sites: Sites = NO_SITES) -> Llama:
        """Returns the Linen module with these sites filled."""
        return Llama(self, sites)


def rope_frequencies(config: LlamaConfig) -> Float[Array, "half"]:
    """Returns the rotary frequencies in radians a position, (H / 2,), with the scaling of the config."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths  # of a frequency within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def rope_angles(positions: Int[Array, "*B T"], frequencies: Float[Array, "half"]) -> tuple[Array, Array]:
    """Returns cos and sin of the rotary angles, each (..., T, 1, H / 2): the same for every head."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.expand_dims(
        frequencies, tuple(range(positions.ndim + 1))
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "*B T N H"], rope: tuple[Array, Array]) -> Float[Array, "*B T N H"]:
    """Returns queries or keys turned by their position; dimension i pairs with i + H / 2."""
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    cos, sin = (jnp.broadcast_to(a.reshape((1,) * (x.ndim - a.ndim) + a.shape), shape).astype(x.dtype) for a in rope)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class LayerCache(NamedTuple):
    """Keys and values of one layer: of the shared prompt (M, K, H) if any, of the text, of the new tokens."""

    prompt: KV | None
    source: KV
    new: KV


class Cache(NamedTuple):
    """What decoding needs of the past: one `LayerCache` a layer, which source keys are real, and where rows go on."""

    layers: Any
    source_bias: Float[Array, "B 1 1 S"]
    next_position: Int[Array, "B"]


class Context(NamedTuple):
    """What is the same for all layers: the rotary angles of each stream, the biases, the step when decoding."""

    rope: tuple[Array, Array]
    bias: Array
    prompt_rope: tuple[Array, Array] | None = None
    prompt_bias: Array | None = None
    source_bias: Array | None = None
    step: Array | int = 0


class Attention(nn.Module):
    """Causal grouped-query attention of the text, of the shared prompt, or of new tokens behind a cache."""

    config: LlamaConfig
    sites: Sites

    @nn.compact
    def __call__(
        self, x: Array, prompt: Array | None, context: Context, cache: LayerCache | None
    ) -> tuple[Array, Array | None, KV, KV | None]:
        c = self.config
        heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
        project = {
            name: layers.Linear(count * c.head_dim, f"attention/{name}", self.sites, name=name)
            for name, count in heads.items()
        }
        out = layers.Linear(c.width, "attention/out", self.sites, name="out")
        extra = layers.extra_segments(self.sites, "attention", c.num_kv_heads, c.head_dim, x.dtype)

        def qkv(stream: Array, rope: tuple[Array, Array]) -> tuple[Array, KV]:
            q, k, v = (project[n](stream).reshape(*stream.shape[:-1], heads[n], c.head_dim) for n in heads)
            return rotate(q, rope), KV(rotate(k, rope), v)

        def mix(query: Array, segments: list[Segment]) -> Array:
            mixed = attend(query, extra + segments, c.head_dim**-0.5)
            return out(mixed.reshape(*mixed.shape[:-2], -1))

        query, kv = qkv(x, context.rope)
        if cache is not None:
            new = append(cache.new, kv, context.step)
            shared = [] if cache.prompt is None else [Segment(cache.prompt)]
            past = [Segment(cache.source, context.source_bias), Segment(new, context.bias)]
            return mix(query, shared + past), None, new, cache.prompt
        if prompt is None:
            return mix(query, [Segment(kv, context.bias)]), None, kv, None
        assert context.prompt_rope is not None
        prompt_query, prompt_kv = qkv(prompt, context.prompt_rope)
        prompt = mix(prompt_query[None], [Segment(prompt_kv, context.prompt_bias)])[0]
        return mix(query, [Segment(prompt_kv), Segment(kv, context.bias)]), prompt, kv, prompt_kv


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig
    sites: Sites

    @nn.compact
    def __call__(self, *streams: Array) -> tuple[Array, ...]:
        def linear(name: str, features: int) -> layers.Linear:
            return layers.Linear(features, f"mlp/{name}", self.sites, name=name)

        gate, up = linear("gate", self.config.mlp_dim), linear("up", self.config.mlp_dim)
        down = linear("down", self.config.width)
        return tuple(down(nn.silu(gate(x)) * up(x)) for x in streams)


class Block(nn.Module):
    """One layer. Streams are the text (B, T, D) and, when it is shared, the prompt (M, D)."""

    config: LlamaConfig
    sites: Sites

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array | None], context: Context, cache: LayerCache | None
    ) -> tuple[tuple[Array, Array | None], tuple[KV, KV | None]]:
        c = self.config
        norm = layers.RMSNorm(c.norm_eps, name="pre_attention_norm")
        x, prompt = streams
        mixed, mixed_prompt, kv, prompt_kv = Attention(c, self.sites, name="attention")(
            norm(x), None if prompt is None else norm(prompt), context, cache
        )
        fill = layers.residual_fill(self.sites, "attention", c.width)
        x = x + fill(mixed)
        if prompt is not None and mixed_prompt is not None:
            prompt = prompt + fill(mixed_prompt)

        norm, mlp = layers.RMSNorm(c.norm_eps, name="pre_mlp_norm"), MLP(c, self.sites, name="mlp")
        fill = layers.residual_fill(self.sites, "mlp", c.width)
        present = [s for s in (x, prompt) if s is not None]
        results = mlp(*(norm(s) for s in present))
        present = [s + fill(y) for s, y in zip(present, results, strict=True)]
        return (present[0], present[1] if len(present) > 1 else None), (kv, prompt_kv)


class Llama(nn.Module):
    """The backbone. Its methods take embedded text, so that a method can act between `embed` and the blocks."""

    config: LlamaConfig
    sites: Sites = NO_SITES

    def setup(self) -> None:
        c = self.config
        self.token_embedder = layers.Embedding(c.vocab_size, c.width, c.dtype)
        if c.scan_layers:
            self.layers: Any = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=c.num_layers,
            )(c, self.sites)
        else:
            self.layers = [Block(c, self.sites) for _ in range(c.num_layers)]
        self.final_norm = layers.RMSNorm(c.norm_eps)
        if not c.tied:
            self.logits_dense = layers.Head(c.vocab_size)

    def embed(self, tokens: Int[Array, "*S"]) -> Float[Array, "*S D"]:
        """Returns the frozen input embeddings of token ids."""
        return self.token_embedder(tokens)

    def head(self, states: Float[Array, "*S D"], vocab_ids: Int[Array, "C"] | None = None) -> Float[Array, "*S V"]:
        """Returns float32 logits over the vocabulary, or over `vocab_ids` alone."""
        return (
            self.token_embedder.attend(states, vocab_ids) if self.config.tied else self.logits_dense(states, vocab_ids)
        )

    def target_states(
        self,
        source: Float[Array, "B T D"],
        source_mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None,
        targets: Int[Array, "B U"],
        deterministic: bool = True,
    ) -> Float[Array, "B U D"]:
        """Returns the state that predicts each target token, given the source and the targets before it.

        Targets follow the last real token of their row's source: rows are joined without a gap. LLaMA models have no
        dropout, so `deterministic` changes nothing.
        """
        lengths = jnp.sum(source_mask, axis=1)
        joined = self._join(source, lengths, targets[:, :-1])
        states, offset, _ = self._run(joined, prompt)
        places = offset + (lengths - 1)[:, None] + jnp.arange(targets.shape[1])[None]
        return self.final_norm(jnp.take_along_axis(states, places[..., None], axis=1))

    def start(
        self,
        source: Float[Array, "B T D"],
        source_mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None,
        max_new: int,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Returns the state that predicts the first new token, and a cache with room for `max_new` tokens."""
        c = self.config
        lengths = jnp.sum(source_mask, axis=1)
        states, offset, kvs = self._run(source, prompt)
        last = jnp.take_along_axis(states, (offset + lengths - 1)[:, None, None], axis=1)[:, 0]
        room = (source.shape[0], max_new, c.num_kv_heads, c.head_dim)
        stacked = (c.num_layers,) if c.scan_layers else ()

        def layer_cache(kv: KV, prompt_kv: KV | None) -> LayerCache:
            return LayerCache(prompt_kv, kv, KV(*(jnp.zeros(stacked + room, a.dtype) for a in kv)))

        caches = layer_cache(*kvs) if c.scan_layers else tuple(layer_cache(*kv) for kv in kvs)
        in_front = jnp.ones((source.shape[0], offset), bool)
        bias = mask_bias(jnp.concatenate([in_front, source_mask], axis=1))
        shared = 0 if prompt is None or prompt.ndim == 3 else prompt.shape[0]
        return self.final_norm(last), Cache(caches, bias, shared + offset + lengths)

    def extend(self, cache: Cache, tokens: Int[Array, "B U"], t: Array | int) -> tuple[Float[Array, "B U D"], Cache]:
        """Returns the states after appending tokens at step `t` (0: the first new token), and the cache with them."""
        slots = jax.tree.leaves(cache.layers)[-1].shape[-3]
        positions = cache.next_position[:, None] + t + jnp.arange(tokens.shape[1])[None]
        context = Context(
            rope=rope_angles(positions, rope_frequencies(self.config)),
            bias=step_bias(tokens.shape[1], slots, t),
            source_bias=cache.source_bias,
            step=t,
        )
        (states, _), kvs = self._blocks((self.embed(tokens), None), context, cache.layers)
        if self.config.scan_layers:
            caches = cache.layers._replace(new=kvs[0])
        else:
            caches = tuple(old._replace(new=new) for old, (new, _) in zip(cache.layers, kvs, strict=True))
        return self.final_norm(states), cache._replace(layers=caches)

    def _join(self, source: Array, lengths: Array, tokens: Array) -> Array:
        """Returns source embeddings with the embedded tokens right behind each row's last real source token."""
        if tokens.shape[1] == 0:
            return source
        both = jnp.concatenate([source, self.embed(tokens)], axis=1)
        column = jnp.arange(both.shape[1])[None]
        behind = column - lengths[:, None]  # index among the targets, where not negative
        places = jnp.where(behind < 0, column, jnp.minimum(source.shape[1] + behind, both.shape[1] - 1))
        return jnp.take_along_axis(both, places[..., None], axis=1)

    def _run(self, x: Array, prompt: Array | None) -> tuple[Array, int, Any]:
        """Runs the blocks over text (B, T, D) behind a prompt.

        Returns the states, the number of leading columns in them that are a prompt of each row's own, and each layer's
        keys and values. Rows are padded on the right, so causality alone hides the padding.
        """
        frequencies = rope_frequencies(self.config)
        offset = 0
        if prompt is not None and prompt.ndim == 3:
            x, offset, prompt = jnp.concatenate([prompt, x], axis=1), prompt.shape[1], None
        shared = 0 if prompt is None else prompt.shape[0]
        context = Context(
            rope=rope_angles(shared + jnp.arange(x.shape[1]), frequencies),
            bias=causal_bias(x.shape[1]),
            prompt_rope=None if prompt is None else rope_angles(jnp.arange(shared), frequencies),
            prompt_bias=None if prompt is None else causal_bias(shared),
        )
        (x, _), kvs = self._blocks((x, prompt), context, None)
        return x, offset, kvs

    def _blocks(self, streams: tuple[Array, Array | None], context: Context, caches: Any) -> tuple[Any, Any]:
        if self.config.scan_layers:
            return self.layers(streams, context, caches)
        kvs = []
        for i, block in enumerate(self.layers):
            streams, kv = block(streams, context, None if caches is None else caches[i])
            kvs.append(kv)
        return streams, kvs
