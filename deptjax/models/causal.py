"""What all causal backbones share: blocks, the joining of source and targets, the prompt's front, decoding in steps.

    x = x + out(attention(q, k, v))                  of norm(x), causal
    x = x + mlp(norm(x))

A family gives its norm, its MLP, whether its projections have biases, and how it knows positions (`placed`).

Nothing in a prompt that comes first sees the text behind it, so when the prompt is the same for all rows it travels
through the blocks as a stream of its own, (M, D) beside (B, T, D): M positions a batch instead of M a row, exact, and
gradients included. Every row attends to its keys and values. For inference these keys and values are a thing of their
own, the prompt's `Front`, made once and given to `start` with every text.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from deptjax.methods.base import COMMON, NO_SITES, Sites
from deptjax.models import layers
from deptjax.models.attention import (
    KV,
    Segment,
    append,
    attend,
    causal_bias,
    front_bias,
    heads_in_front,
    mask_bias,
    step_bias,
)
from deptjax.models.remat import rematerialised
from deptjax.models.rope import rotate
from deptjax.sharding import split_rows
from deptjax.typing import Array, Bool, Float, Int

Rope = tuple[Array, Array]  # cos and sin of the angles that queries and keys are turned by


class Placed(NamedTuple):
    """A stream that knows its positions: by what was added to it, or by the angles of its queries and keys."""

    x: Array
    rope: Rope | None


class LayerCache(NamedTuple):
    """Keys and values of one layer: of the text, and of the new tokens.

    With beams the text's have one row, which all beams share, and those of the new tokens a row a beam.
    """

    source: KV
    new: KV


class Past(NamedTuple):
    """What a layer attends to beside the stream itself: the prompt's keys and values (K, M, H), and its cache."""

    prompt: KV | None
    cache: LayerCache | None


class Front(NamedTuple):
    """What a prompt is to the texts behind it: keys and values (K, M, H) a layer, and how many of the M are real.

    The real ones come last; a `length` of `None` says that all are.
    """

    layers: Any
    length: Int[Array, ""] | None


class OwnFront(NamedTuple):
    """A prompt (B, M, D) of each row's own, which is read with the text: nothing of it is known before."""

    prompt: Float[Array, "B M D"]


class Cache(NamedTuple):
    """What decoding needs of the past: one `LayerCache` a layer, which source keys are real, and where rows go on."""

    layers: Any
    source_bias: Float[Array, "B 1 1 T"]
    next_position: Int[Array, "B"]


@struct.dataclass
class Context:
    """What is the same for all layers: the angles of each stream, if any, the biases, the step when decoding.

    A tree of arrays, in which `deterministic` is static, and how many leading columns of the stream are a prompt.
    Without a `bias` the stream is causal. `text` (B, S) is true at the column of each row's last source token.
    """

    rope: Rope | None
    bias: Array | None = None
    prompt_rope: Rope | None = None
    prompt_bias: Array | None = None
    source_bias: Array | None = None
    step: Array | int = 0
    deterministic: bool = struct.field(pytree_node=False, default=True)
    prompt_columns: int = struct.field(pytree_node=False, default=0)
    text: Array | None = None


class Attention(nn.Module):
    """Causal grouped-query attention of the text, of the shared prompt, or of new tokens behind a cache."""

    config: Any
    sites: Sites
    bias: bool = False

    @nn.compact
    def __call__(
        self, x: Array, prompt: Array | None, context: Context, past: Past | None
    ) -> tuple[Array, Array | None, KV]:
        c = self.config
        heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}

        def linear(name: str, features: int) -> layers.Linear:
            return layers.Linear(features, f"attention/{name}", self.sites, bias=self.bias, name=name)

        project = {name: linear(name, count * c.head_dim) for name, count in heads.items()}
        out = linear("out", c.width)
        extra = layers.extra_segments(self.sites, "attention", c.num_kv_heads, c.head_dim, x.dtype)
        drops = c.dropout_rate and not context.deterministic
        dropout = nn.Dropout(c.dropout_rate, deterministic=False) if drops else None

        def qkv(stream: Array, rope: Rope | None) -> tuple[Array, KV]:
            q, k, v = (project[n](stream).reshape(*stream.shape[:-1], heads[n], c.head_dim) for n in heads)
            if rope is not None:
                q, k = rotate(q, rope), rotate(k, rope)
            return q, KV(heads_in_front(k), heads_in_front(v))

        def mix(query: Array, segments: list[Segment]) -> Array:
            mixed = attend(query, extra + segments, c.head_dim**-0.5, dropout, c.attention)
            return out(mixed.reshape(*mixed.shape[:-2], -1))

        def own(kv: KV) -> Segment:
            return Segment(kv, causal=True) if context.bias is None else Segment(kv, context.bias)

        query, kv = qkv(x, context.rope)
        if past is not None:
            seen = [] if past.prompt is None else [Segment(past.prompt, context.prompt_bias)]
            if past.cache is not None:
                seen.append(Segment(past.cache.source, context.source_bias))
                kv = append(past.cache.new, kv, context.step)
            return mix(query, [*seen, own(kv)]), None, kv
        if prompt is None:
            return mix(query, [own(kv)]), None, kv
        prompt_query, prompt_kv = qkv(prompt, context.prompt_rope)
        prompt = mix(prompt_query[None], [Segment(prompt_kv, causal=True)])[0]
        return mix(query, [Segment(prompt_kv), own(kv)]), prompt, kv


class Block(nn.Module):
    """One layer. Streams are the text (B, T, D) and, when it is shared, the prompt (M, D)."""

    config: Any
    sites: Sites
    norm: Any
    mlp: Any
    biases: bool

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array | None], context: Context, past: Past | None
    ) -> tuple[tuple[Array, Array | None], KV]:
        c = self.config
        drop = nn.Dropout(c.dropout_rate, deterministic=context.deterministic)
        norm = self.norm(c.norm_eps, name="pre_attention_norm")
        columns, stream = context.prompt_columns, split_rows(streams[0])

        def text() -> Array:
            assert context.text is not None
            return norm(layers.mean_states(stream, context.text))

        x, prompt = layers.fill_stream(self.sites, "prompt", stream, streams[1], columns, text)
        mixed, mixed_prompt, kv = Attention(c, self.sites, self.biases, name="attention")(
            norm(x), None if prompt is None else norm(prompt), context, past
        )
        fill = layers.residual_fill(self.sites, "attention", c.width)
        x = x + drop(fill(mixed))
        if prompt is not None and mixed_prompt is not None:
            prompt = prompt + drop(fill(mixed_prompt))

        norm, mlp = self.norm(c.norm_eps, name="pre_mlp_norm"), self.mlp(c, self.sites, name="mlp")
        fill = layers.residual_fill(self.sites, "mlp", c.width)
        x = x + drop(fill(mlp(norm(x))))
        return (x, None if prompt is None else prompt + drop(fill(mlp(norm(prompt))))), kv


class CausalModel(nn.Module):
    """A causal backbone. Its methods take embedded text, so that a method can act between `embed` and the blocks.

    A subclass gives `norm` (built with the config's `norm_eps`), `mlp` (built with config and sites), `biases` (whether
    the projections of attention have them) and `placed`.
    """

    config: Any
    sites: Sites = NO_SITES

    norm: ClassVar[type[nn.Module]]
    mlp: ClassVar[type[nn.Module]]
    biases: ClassVar[bool] = False

    def setup(self) -> None:
        c = self.config
        parts = (c, self.sites, self.norm, self.mlp, self.biases)
        block = rematerialised(Block, c.remat, c.scan_layers)
        self.token_embedder = layers.Embedding(c.vocab_size, c.width, c.dtype)
        if c.scan_layers:
            self.layers: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                variable_broadcast=COMMON,
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                length=c.num_layers,
            )(*parts)
        else:
            self.layers = [block(*parts) for _ in range(c.num_layers)]
        self.final_norm: Any = self.norm(c.norm_eps)
        if not c.tied:
            self.logits_dense = layers.Head(c.vocab_size)

    def init_pass(self) -> Array:
        """Runs every part once, on one token, for `init`."""
        tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        return self.head(self.target_states(self.embed(tokens), mask, None, tokens))

    def placed(self, x: Array, positions: Array, deterministic: bool = True) -> Placed:
        """Returns a stream (..., S, D) at these positions, (S,) or (..., S), as the first block takes it.

        Padding may have positions that the model does not have; what comes of them must be finite.
        """
        raise NotImplementedError

    def embed(self, tokens: Int[Array, "*S"]) -> Float[Array, "*S D"]:
        """Returns the frozen input embeddings of token ids."""
        return self.token_embedder(tokens)

    def head(self, states: Float[Array, "*S D"], vocab_ids: Int[Array, "C"] | None = None) -> Float[Array, "*S V"]:
        """Returns float32 logits over the vocabulary, or over `vocab_ids` alone."""
        return (
            self.token_embedder.attend(states, vocab_ids) if self.config.tied else self.logits_dense(states, vocab_ids)
        )

    def encode(
        self,
        embeds: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Returns the last states of embedded texts, padded on the right, behind a prompt if there is one."""
        states, offset = self._run(embeds, jnp.sum(mask, axis=1), prompt, deterministic)
        return self.final_norm(states[:, offset:])

    def target_states(
        self,
        source: Float[Array, "B T D"],
        source_mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None,
        targets: Int[Array, "B U"],
        deterministic: bool = True,
    ) -> Float[Array, "B U D"]:
        """Returns the state that predicts each target token, given the source and the targets before it.

        Targets follow the last real token of their row's source: rows are joined without a gap. With
        `deterministic=False` there is the family's dropout, if it has any, from the rng `"dropout"`.
        """
        lengths = jnp.sum(source_mask, axis=1)
        joined = self._join(source, lengths, targets[:, :-1])
        states, offset = self._run(joined, lengths, prompt, deterministic)
        places = offset + (lengths - 1)[:, None] + jnp.arange(targets.shape[1])[None]
        return self.final_norm(jnp.take_along_axis(states, places[..., None], axis=1))

    def front(self, prompt: Float[Array, "*B M D"], length: Int[Array, ""] | None = None) -> Front | OwnFront:
        """Returns what the last `length` vectors of a prompt (all of them by default) are to any text behind them.

        Of a prompt (B, M, D) of each row's own all are real.
        """
        if prompt.ndim == 3:
            return OwnFront(prompt)
        count = prompt.shape[0]
        hidden = front_bias(count, length)
        positions = jnp.arange(count) - (0 if length is None else count - length)
        prompt, rope = self.placed(prompt, positions)
        context = Context(rope, None if hidden is None else causal_bias(count) + hidden, prompt_columns=count)
        _, kvs = self._blocks((prompt[None], None), context, None)
        axis = 1 if self.config.scan_layers else 0  # of the one row
        return Front(jax.tree.map(lambda a: jnp.squeeze(a, axis), kvs), length)

    def start(
        self,
        source: Float[Array, "B T D"],
        source_mask: Bool[Array, "B T"],
        front: Front | OwnFront | None,
        max_new: int,
        beams: int = 1,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Returns the state that predicts the first new token, and a cache with room for `max_new` tokens.

        With more than one of `beams` B is 1, and the new tokens come in as many rows.
        """
        c, columns = self.config, 0
        if isinstance(front, OwnFront):
            own, front = front.prompt.astype(source.dtype), None
            source, columns = jnp.concatenate([own, source], axis=1), own.shape[1]
            source_mask = jnp.pad(source_mask, ((0, 0), (columns, 0)), constant_values=True)
        lengths = jnp.sum(source_mask, axis=1)
        first, text = self._positions_of(front), _only(lengths - 1, source.shape[1])
        source, rope = self.placed(source, first + jnp.arange(source.shape[1]))
        context = Context(rope, prompt_bias=self._bias_of(front), prompt_columns=columns, text=text)
        (states, _), kvs = self._blocks((source, None), context, self._past(front, None))
        last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]
        stacked = (c.num_layers,) if c.scan_layers else ()
        room = (*stacked, source.shape[0] * beams, c.num_kv_heads, max_new, c.head_dim)

        def with_room(kv: KV) -> LayerCache:
            return LayerCache(kv, KV(jnp.zeros(room, c.dtype), jnp.zeros(room, c.dtype)))

        layer_caches = with_room(kvs) if c.scan_layers else tuple(map(with_room, kvs))
        return self.final_norm(last), Cache(layer_caches, mask_bias(source_mask), first + lengths)

    def extend(
        self, cache: Cache, tokens: Int[Array, "B U"], t: Array | int, front: Front | OwnFront | None = None
    ) -> tuple[Float[Array, "B U D"], Cache]:
        """Returns the states after appending tokens at step `t` (0: the first new token), and the cache with them.

        `front` is that which `start` was given; a prompt of each row's own is in the cache, with the source.
        """
        front = None if isinstance(front, OwnFront) else front
        slots = jax.tree.leaves(cache.layers)[-1].shape[-2]
        positions = cache.next_position[:, None] + t + jnp.arange(tokens.shape[1])[None]
        x, rope = self.placed(self.embed(tokens), positions)
        context = Context(
            rope,
            bias=step_bias(tokens.shape[1], slots, t),
            prompt_bias=self._bias_of(front),
            source_bias=cache.source_bias,
            step=t,
        )
        (states, _), new = self._blocks((x, None), context, self._past(front, cache))
        if self.config.scan_layers:
            caches = cache.layers._replace(new=new)
        else:
            caches = tuple(old._replace(new=kv) for old, kv in zip(cache.layers, new, strict=True))
        return self.final_norm(states), cache._replace(layers=caches)

    def _past(self, front: Front | None, cache: Cache | None) -> Any:
        """Returns what each layer attends to beside the stream: a `Past` a layer, or one of stacked arrays."""
        prompts = None if front is None else front.layers
        caches = None if cache is None else cache.layers
        if self.config.scan_layers:
            return Past(prompts, caches)
        nothing = (None,) * self.config.num_layers
        return tuple(map(Past, prompts or nothing, caches or nothing))

    @staticmethod
    def _bias_of(front: Front | None) -> Array | None:
        return None if front is None else front_bias(_vectors(front), front.length)

    @staticmethod
    def _positions_of(front: Front | None) -> Array | int:
        """Returns how many positions a prompt takes: that of the text's first token."""
        if front is None:
            return 0
        return _vectors(front) if front.length is None else front.length

    def _join(self, source: Array, lengths: Array, tokens: Array) -> Array:
        """Returns source embeddings with the embedded tokens right behind each row's last real source token."""
        if tokens.shape[1] == 0:
            return source
        both = jnp.concatenate([source, self.embed(tokens)], axis=1)
        column = jnp.arange(both.shape[1])[None]
        behind = column - lengths[:, None]  # index among the targets, where not negative
        places = jnp.where(behind < 0, column, jnp.minimum(source.shape[1] + behind, both.shape[1] - 1))
        return jnp.take_along_axis(both, places[..., None], axis=1)

    def _run(self, x: Array, lengths: Array, prompt: Array | None, deterministic: bool) -> tuple[Array, int]:
        """Runs the blocks over text (B, T, D), whose sources have these lengths (B,), behind a prompt.

        Returns the states, and the number of leading columns in them that are a prompt of each row's own. Rows are
        padded on the right, so causality alone hides the padding.
        """
        offset = 0
        if prompt is not None and prompt.ndim == 3:
            x, offset, prompt = jnp.concatenate([prompt, x], axis=1), prompt.shape[1], None
        shared = 0 if prompt is None else prompt.shape[0]
        x, rope = self.placed(x, shared + jnp.arange(x.shape[1]), deterministic)
        text = _only(offset + lengths - 1, x.shape[1])
        context = Context(rope, deterministic=deterministic, prompt_columns=offset, text=text)
        if prompt is not None:
            prompt, rope = self.placed(prompt, jnp.arange(shared), deterministic)
            context = dataclasses.replace(context, prompt_rope=rope)
        (x, _), _ = self._blocks((x, prompt), context, None)
        return x, offset

    def _blocks(self, streams: tuple[Array, Array | None], context: Context, past: Any) -> tuple[Any, Any]:
        """Returns the streams behind the last block, and the text's keys and values: a `KV` a layer, or one stacked."""
        if self.config.scan_layers:
            return self.layers(streams, context, past)
        kvs = []
        for i, block in enumerate(self.layers):
            streams, kv = block(streams, context, None if past is None else past[i])
            kvs.append(kv)
        return streams, tuple(kvs)


def _only(places: Int[Array, "B"], length: int) -> Bool[Array, "B S"]:
    """Returns rows of this length that are true at one place each."""
    return jnp.arange(length)[None] == places[:, None]


def _vectors(front: Front) -> int:
    """Returns M, the vectors of a prompt, real or not."""
    return int(jax.tree.leaves(front.layers)[0].shape[-2])
