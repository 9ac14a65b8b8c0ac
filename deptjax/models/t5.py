"""The T5 family: T5 1.0, 1.1, LM-adapted, Flan-T5, mT5 and ByT5.

    encoder  x = x + out(attention(q, k, v) + position bias)          of RMSNorm(x), both directions
             x = x + wo(act(x wi))      or   wo(act(x wi_0) * (x wi_1))
    decoder  the same, causal, with attention to the encoder's result in between

Raffel et al. 2020 (arXiv 1910.10683); Shazeer 2020 for the gated layers of 1.1 (arXiv 2002.05202). Attention scores are
not scaled (the factor is in the weights), positions are known only through a bias that each stack computes once and
all its layers share, and with a tied head the logits are scaled by D^-1/2.

An encoder sees both directions, so a prompt is a part of every row: it stands in front of the source, in the encoder
alone. Decoder slot 0 holds the start token, slot t + 1 the new token t.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from deptjax.errors import UserError
from deptjax.methods.base import COMMON, NO_SITES, Sites
from deptjax.models import layers
from deptjax.models.attention import KV, Segment, append, attend, front_bias, heads_in_front, step_bias
from deptjax.models.config import BackboneConfig, check_activation
from deptjax.models.relative_positions import RelativePositionBias
from deptjax.models.remat import rematerialised
from deptjax.sharding import split_rows
from deptjax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class T5Config(BackboneConfig):
    """The shape of a T5-family model.

    The defaults are those of T5 1.0. T5 1.1 and its descendants have `activation="gelu_new"`, `gated=True` and
    `tied=False`.
    """

    family: ClassVar[str] = "t5"
    is_encoder_decoder: ClassVar[bool] = True
    prompt_lr_ratio: ClassVar[float] = 0.3  # see Backbone.prompt_lr

    vocab_size: int
    width: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dropout_rate: float = 0.1
    norm_eps: float = 1e-6
    decoder_start_token: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.family, self.activation)
        if self.relative_buckets < 4 or self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"t5: relative_max_distance {self.relative_max_distance} and relative_buckets {self.relative_buckets} "
                f"do not fit; use at least 4 buckets and a distance above half of them"
            )

    @property
    def context(self) -> int | None:
        """`None`: relative positions have no end."""
        return None

    def make(self, sites: Sites = NO_SITES) -> T5:
        """Returns the Linen module with these sites filled."""
        return T5(self, sites)


class LayerCache(NamedTuple):
    """Keys and values of one decoder layer: of the encoder's result, and of the start token and the new tokens.

    With beams those of the encoder's result have one row, which all beams share, and the others a row a beam.
    """

    source: KV | None
    new: KV


class Front(NamedTuple):
    """A prompt before it meets a text, of all rows or of each, and how many of its vectors are real, the last ones.

    `None` says that all are. An encoder looks both ways, so nothing of a prompt can be computed ahead.
    """

    prompt: Float[Array, "*B M D"]
    length: Int[Array, ""] | None


class Seen(NamedTuple):
    """What of the encoder's keys counts: true in `mask` (B, S), and not hidden by the `bias` (1, 1, 1, S), if any.

    Rows are padded on the right, so the true ones come first; what hides a prompt's padding, in front, is the bias.
    """

    mask: Bool[Array, "B S"]
    bias: Float[Array, "1 1 1 S"] | None = None


class Cache(NamedTuple):
    """What decoding needs of the past: one `LayerCache` a layer, and which source keys count."""

    layers: Any
    seen: Seen


@struct.dataclass
class Context:
    """What is the same for all layers of a stack: a tree of arrays, in which `deterministic` is static, and how many
    leading columns of the stream are a prompt.

    The encoder has the position bias (1, N, T, S) and what counts of its stream: two arrays and not their sum, which
    would be B times as large. The decoder, with the position bias, is causal when `step` is `None`; else its bias also
    hides the slots behind the tokens', whose first is `step`. It also has the encoder's result and what counts of that.
    """

    position_bias: Array
    seen: Seen
    deterministic: bool = struct.field(pytree_node=False)
    prompt_columns: int = struct.field(pytree_node=False, default=0)
    source: Any = None
    step: Array | int | None = None


class Attention(nn.Module):
    """Attention of a stream to itself, or to the encoder's result."""

    config: T5Config
    place: str
    sites: Sites

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        attended: Array | KV,
        bias: Array | None,
        deterministic: bool,
        mask: Array | None = None,
        past: KV | None = None,
        step: Array | int | None = None,
        causal: bool = False,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """Returns the result and the keys and values it attended to.

        `attended` is a stream, or keys and values computed before; with `past`, those of the stream are written into
        it at slot `step`. `bias`, `mask` and `causal` are those of a `Segment`.
        """
        c = self.config

        def project(name: str, stream: Array) -> Array:
            y = layers.Linear(c.num_heads * c.head_dim, f"{self.place}/{name}", self.sites, name=name)(stream)
            return y.reshape(*stream.shape[:-1], c.num_heads, c.head_dim)

        query = project("query", x)
        if isinstance(attended, KV):
            kv = attended
        else:
            kv = KV(*(heads_in_front(project(name, attended)) for name in ("key", "value")))
        if past is not None and step is not None:
            kv = append(past, kv, step)
        extra = layers.extra_segments(self.sites, self.place, c.num_heads, c.head_dim, x.dtype)
        drops = c.dropout_rate and not deterministic
        dropout = nn.Dropout(c.dropout_rate, deterministic=False) if drops else None
        mixed = attend(query, [*extra, Segment(kv, bias, mask, causal)], 1.0, dropout, c.attention)
        out = layers.Linear(c.width, f"{self.place}/out", self.sites, name="out")
        return out(mixed.reshape(*mixed.shape[:-2], -1)), kv


class MLP(nn.Module):
    """`wo(act(wi(x)))`, or `wo(act(wi_0(x)) * wi_1(x))` when gated."""

    config: T5Config
    place: str
    sites: Sites

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], deterministic: bool) -> Float[Array, "B T D"]:
        c = self.config

        def linear(name: str, features: int) -> layers.Linear:
            return layers.Linear(features, f"{self.place}/{name}", self.sites, name=name)

        hidden = layers.ACTIVATIONS[c.activation](linear("wi_0" if c.gated else "wi", c.mlp_dim)(x))
        if c.gated:
            hidden = hidden * linear("wi_1", c.mlp_dim)(x)
        hidden = nn.Dropout(c.dropout_rate)(hidden, deterministic=deterministic)
        return linear("wo", c.width)(hidden)


class EncoderLayer(nn.Module):
    """Self-attention in both directions, then the MLP."""

    config: T5Config
    sites: Sites

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        drop = nn.Dropout(c.dropout_rate, deterministic=context.deterministic)

        norm = layers.RMSNorm(c.norm_eps, name="pre_attention_layer_norm")
        stream, columns = split_rows(x), context.prompt_columns

        def text() -> Array:
            return layers.mean_states(norm(stream), context.seen.mask.at[:, :columns].set(False))

        x, _ = layers.fill_stream(self.sites, "encoder/prompt", stream, None, columns, text)
        y = norm(x)
        attention = Attention(c, "encoder/attention", self.sites, name="attention")
        bias, (mask, hidden) = context.position_bias, context.seen
        y, _ = attention(y, y, bias if hidden is None else bias + hidden, context.deterministic, mask)
        x = x + drop(layers.residual_fill(self.sites, "encoder/attention", c.width)(y))

        y = layers.RMSNorm(c.norm_eps, name="pre_mlp_layer_norm")(x)
        y = MLP(c, "encoder/mlp", self.sites, name="mlp")(y, context.deterministic)
        return x + drop(layers.residual_fill(self.sites, "encoder/mlp", c.width)(y)), None


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's result, then the MLP."""

    config: T5Config
    sites: Sites

    @nn.compact
    def __call__(
        self, x: Float[Array, "B U D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B U D"], LayerCache]:
        """Returns the stream and the layer's keys and values: those of the source only when they were computed here."""
        c = self.config
        drop = nn.Dropout(c.dropout_rate, deterministic=context.deterministic)

        x = split_rows(x)
        y = layers.RMSNorm(c.norm_eps, name="pre_self_attention_layer_norm")(x)
        attention = Attention(c, "decoder/self_attention", self.sites, name="self_attention")
        past = None if cache is None else cache.new
        y, new = attention(
            y, y, context.position_bias, context.deterministic, past=past, step=context.step, causal=past is None
        )
        x = x + drop(layers.residual_fill(self.sites, "decoder/self_attention", c.width)(y))

        y = layers.RMSNorm(c.norm_eps, name="pre_cross_attention_layer_norm")(x)
        place = "decoder/encoder_decoder_attention"
        attention = Attention(c, place, self.sites, name="encoder_decoder_attention")
        known = None if cache is None else cache.source
        source = context.source if known is None else known
        mask, hidden = context.seen
        y, source_kv = attention(y, source, hidden, context.deterministic, mask)
        x = x + drop(layers.residual_fill(self.sites, place, c.width)(y))

        y = layers.RMSNorm(c.norm_eps, name="pre_mlp_layer_norm")(x)
        y = MLP(c, "decoder/mlp", self.sites, name="mlp")(y, context.deterministic)
        x = x + drop(layers.residual_fill(self.sites, "decoder/mlp", c.width)(y))
        return x, LayerCache(source_kv if known is None else None, new)


def _scanned(layer: type[nn.Module], length: int, in_axes: tuple[Any, ...]) -> Any:
    """Returns the layer scanned: parameters stacked on axis 0, each layer with its own dropout."""
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        variable_broadcast=COMMON,
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
    )


class Encoder(nn.Module):
    """The stack that reads the prompt and the source."""

    config: T5Config
    sites: Sites

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(
            c.num_heads, c.relative_buckets, c.relative_max_distance, bidirectional=True
        )
        layer = rematerialised(EncoderLayer, c.remat, c.scan_layers)
        if c.scan_layers:
            self.layers = _scanned(layer, c.num_encoder_layers, (nn.broadcast,))(c, self.sites)
        else:
            self.layers = [layer(c, self.sites) for _ in range(c.num_encoder_layers)]
        self.encoder_norm = layers.RMSNorm(c.norm_eps)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self, x: Float[Array, "B T D"], seen: Seen, deterministic: bool, prompt_columns: int = 0
    ) -> Float[Array, "B T D"]:
        """Returns the states after the final norm; the first `prompt_columns` are of a prompt."""
        positions = jnp.arange(x.shape[1])
        context = Context(self.relpos_bias(positions, positions), seen, deterministic, prompt_columns)
        x = self.dropout(x, deterministic=deterministic)
        if self.config.scan_layers:
            x, _ = self.layers(x, context)
        else:
            for layer in self.layers:
                x, _ = layer(x, context)
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
    """The stack that writes the target; it owns the output head when that is not tied to the embedding."""

    config: T5Config
    sites: Sites

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativePositionBias(
            c.num_heads, c.relative_buckets, c.relative_max_distance, bidirectional=False
        )
        layer = rematerialised(DecoderLayer, c.remat, c.scan_layers)
        if c.scan_layers:
            self.layers = _scanned(layer, c.num_decoder_layers, (nn.broadcast, 0))(c, self.sites)
        else:
            self.layers = [layer(c, self.sites) for _ in range(c.num_decoder_layers)]
        self.decoder_norm = layers.RMSNorm(c.norm_eps)
        self.dropout = nn.Dropout(c.dropout_rate)
        if not c.tied:
            self.logits_dense = layers.Head(c.vocab_size)

    def __call__(
        self,
        x: Float[Array, "B U D"],
        source: Array | None,
        seen: Seen,
        caches: Any = None,
        step: Array | int = 0,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B U D"], Any]:
        """Returns the states after the final norm, and each layer's keys and values.

        Without `caches` the stream stands alone; with them it is written from slot `step` on, and `source` is only
        needed as long as they hold no keys and values of it.
        """
        length, slots = x.shape[1], x.shape[1] if caches is None else _slots(caches)
        bias = self.relpos_bias(step + jnp.arange(length), jnp.arange(slots))
        if caches is not None:
            bias = bias + step_bias(length, slots, step)
        context = Context(bias, seen, deterministic, source=source, step=None if caches is None else step)
        x = self.dropout(x, deterministic=deterministic)
        if self.config.scan_layers:
            x, kvs = self.layers(x, context, caches)
        else:
            results = []
            for i, layer in enumerate(self.layers):
                x, kv = layer(x, context, None if caches is None else caches[i])
                results.append(kv)
            kvs = tuple(results)
        return self.dropout(self.decoder_norm(x), deterministic=deterministic), kvs

    def head(self, states: Array, vocab_ids: Array | None) -> Array:
        """Returns the logits of a head that is not tied."""
        return self.logits_dense(states, vocab_ids)


def _slots(caches: Any) -> int:
    """Returns the number of decoder slots: the size of axis S in (B, N, S, H), or in (L, B, N, S, H) when scanned."""
    first = caches if isinstance(caches, LayerCache) else caches[0]
    return first.new.keys.shape[-2]


class T5(nn.Module):
    """The backbone. Its methods take embedded text, so that a method can act between `embed` and the encoder."""

    config: T5Config
    sites: Sites = NO_SITES

    def setup(self) -> None:
        c = self.config
        self.token_embedder = layers.Embedding(c.vocab_size, c.width, c.dtype)
        self.encoder = Encoder(c, self.sites)
        self.decoder = Decoder(c, self.sites)

    def init_pass(self) -> Array:
        """Runs every part once, on one token, for `init`."""
        tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        return self.head(self.target_states(self.embed(tokens), mask, None, tokens))

    def embed(self, tokens: Int[Array, "*S"]) -> Float[Array, "*S D"]:
        """Returns the frozen input embeddings of token ids."""
        return self.token_embedder(tokens)

    def head(self, states: Float[Array, "*S D"], vocab_ids: Int[Array, " C"] | None = None) -> Float[Array, "*S V"]:
        """Returns float32 logits over the vocabulary, or over `vocab_ids` alone; scaled by D^-1/2 when tied."""
        if not self.config.tied:
            return self.decoder.head(states, vocab_ids)
        return self.token_embedder.attend(states, vocab_ids) * self.config.width**-0.5

    def encode(
        self,
        embeds: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Returns the encoder's last states of embedded texts, padded on the right, behind a prompt if there is one."""
        states, _ = self._encode(embeds, mask, prompt, deterministic)
        return states if prompt is None else states[:, prompt.shape[-2] :]

    def target_states(
        self,
        source: Float[Array, "B T D"],
        source_mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None,
        targets: Int[Array, "B U"],
        deterministic: bool = True,
    ) -> Float[Array, "B U D"]:
        """Returns the state that predicts each target token, given the source and the targets before it.

        With `deterministic=False` there is dropout as in T5, from the rng `"dropout"`: on the embedded source (its
        prompt included) and target, the attention weights, the hidden layer of the MLP, the result of each sub-layer
        and that of each stack. Every element is dropped by itself.
        """
        encoded, seen = self._encode(source, source_mask, prompt, deterministic)
        start = jnp.full((targets.shape[0], 1), self.config.decoder_start_token, jnp.int32)
        shifted = self.embed(jnp.concatenate([start, targets[:, :-1]], axis=1))
        return self.decoder(shifted, encoded, seen, deterministic=deterministic)[0]

    def front(self, prompt: Float[Array, "*B M D"], length: Int[Array, ""] | None = None) -> Front:
        """Returns the prompt, with the number of its vectors, the last ones, that are real (by default all)."""
        return Front(prompt, length)

    def start(
        self,
        source: Float[Array, "B T D"],
        source_mask: Bool[Array, "B T"],
        front: Front | None,
        max_new: int,
        beams: int = 1,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Returns the state that predicts the first new token, and a cache with room for `max_new` tokens.

        With more than one of `beams` B is 1, and the new tokens come in as many rows.
        """
        c = self.config
        prompt, length = (None, None) if front is None else front
        encoded, seen = self._encode(source, source_mask, prompt, deterministic=True, prompt_length=length)
        stacked = (c.num_decoder_layers,) if c.scan_layers else ()
        rows = source.shape[0] * beams
        room = (*stacked, rows, c.num_heads, max_new + 1, c.head_dim)
        empty = LayerCache(None, KV(jnp.zeros(room, c.dtype), jnp.zeros(room, c.dtype)))
        caches = empty if c.scan_layers else (empty,) * c.num_decoder_layers
        first = self.embed(jnp.full((rows, 1), c.decoder_start_token, jnp.int32))
        states, caches = self.decoder(first, encoded, seen, caches, 0)
        return states[: source.shape[0], 0], Cache(caches, seen)

    def extend(
        self, cache: Cache, tokens: Int[Array, "B U"], t: Array | int, front: Front | None = None
    ) -> tuple[Float[Array, "B U D"], Cache]:
        """Returns the states after appending tokens at step `t` (0: the first new token), and the cache with them.

        The encoder has read the prompt, so nothing is asked of `front`.
        """
        states, kvs = self.decoder(self.embed(tokens), None, cache.seen, cache.layers, t + 1)
        if self.config.scan_layers:
            caches = cache.layers._replace(new=kvs.new)
        else:
            caches = tuple(old._replace(new=kv.new) for old, kv in zip(cache.layers, kvs, strict=True))
        return states, cache._replace(layers=caches)

    def _encode(
        self,
        source: Array,
        source_mask: Array,
        prompt: Array | None,
        deterministic: bool,
        prompt_length: Array | None = None,
    ) -> tuple[Float[Array, "B S D"], Seen]:
        """Returns the encoder's states of the prompt and the source, S = M + T, and which of them count."""
        seen = Seen(source_mask)
        if prompt is not None:
            batch, length, count = *source.shape[:2], prompt.shape[-2]
            front = jnp.broadcast_to(prompt.astype(source.dtype), (batch, *prompt.shape[-2:]))
            source = jnp.concatenate([front, source], axis=1)
            hidden = front_bias(count, prompt_length)
            if hidden is not None:
                hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, 0), (0, length)))
            seen = Seen(jnp.pad(source_mask, ((0, 0), (count, 0)), constant_values=True), hidden)
        return self.encoder(source, seen, deterministic, 0 if prompt is None else prompt.shape[-2]), seen
