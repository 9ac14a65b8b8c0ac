"""The BERT family: BERT, RoBERTa, CodeBERT, MiniLM and other sentence encoders in their shape.

    x = LayerNorm(word[token] + position[p] + type[0])
    x = LayerNorm(x + out(attention(q, k, v)))       both directions
    x = LayerNorm(x + down(act(up(x))))

    logits = word LayerNorm(act(dense(x at the mask))) + bias          masked language modelling
    pooled = tanh(dense(x of the first token))

Devlin et al. 2019 (arXiv 1810.04805); Liu et al. 2019 (arXiv 1907.11692). RoBERTa differs in the first position's row
(`position_offset`), in its tokenizer and in how it was trained. Norms stand behind the sums (post-layer-norm).

A prompt stands in front of the text, its special tokens included, as in the NLU code of LoPA's authors (arXiv
2405.15282): its vectors take the first positions, the text the next, and all are of type 0. Every token sees all
others, so a prompt is a part of each row.

As a model that is tuned it fills in one place: the text holds one mask token, and the state there predicts the one
token of the label. It writes no text.
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
from deptjax.models.attention import KV, Segment, attend, front_bias, heads_in_front
from deptjax.models.config import EvenHeads, check_activation
from deptjax.models.pooling import pool
from deptjax.models.remat import rematerialised
from deptjax.sharding import split_rows
from deptjax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class BertConfig(EvenHeads):
    """The shape of a BERT-family model.

    `max_positions` are those of a prompt and its text together. The table of positions has `position_offset` rows more,
    in front: RoBERTa's first token stands at row pad id + 1. `has_pooler` and `has_masked_head` say which layers the
    checkpoint has behind its blocks, `mask_token` is the id of the token whose place is to be filled.

    `dropout_rate` is that of the embedded text and of the result of each sub-layer, and of the attention weights where
    `attention_dropout_rate` does not say another.
    """

    family: ClassVar[str] = "bert"
    is_masked: ClassVar[bool] = True
    prompt_lr_ratio: ClassVar[float] = 0.03  # see Backbone.prompt_lr

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int = 512
    position_offset: int = 0
    token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    tied: bool = True
    has_pooler: bool = True
    has_masked_head: bool = True
    mask_token: int | None = None
    dropout_rate: float = 0.1
    attention_dropout_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.family, self.activation)

    @property
    def context(self) -> int | None:
        """The positions that the model has vectors for: prompt and text together."""
        return self.max_positions

    def check_fills(self) -> None:
        """Raises `UserError` for a checkpoint that is an encoder alone, and cannot be tuned to fill a mask."""
        if not self.has_masked_head:
            raise UserError(
                "this checkpoint has no masked-language-modelling head and is an encoder alone; take one that has"
                " (a BertForMaskedLM or RobertaForMaskedLM)"
            )

    def make(self, sites: Sites = NO_SITES) -> Bert:
        """Returns the Linen module with these sites filled."""
        return Bert(self, sites)


class Front(NamedTuple):
    """A prompt before it meets a text, of all rows or of each, and how many of its vectors are real, the last ones.

    `None` says that all are.
    """

    prompt: Float[Array, "*B M D"]
    length: Int[Array, ""] | None


@struct.dataclass
class Context:
    """What is the same for all layers: which keys count, and whether there is dropout.

    A tree of arrays, in which `deterministic` is static, and how many leading columns of the stream are a prompt.
    `mask` (B, S) is true on keys that count, and these come first; what hides a prompt's padding, in front, is the
    `bias` (1, 1, 1, S), if any.
    """

    mask: Bool[Array, "B S"]
    bias: Array | None
    deterministic: bool = struct.field(pytree_node=False, default=True)
    prompt_columns: int = struct.field(pytree_node=False, default=0)


class Attention(nn.Module):
    """Attention of a stream to itself, in both directions."""

    config: BertConfig
    sites: Sites

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        c = self.config

        def linear(name: str) -> layers.Linear:
            return layers.Linear(c.width, f"attention/{name}", self.sites, bias=True, name=name)

        query, key, value = (linear(n)(x).reshape(*x.shape[:-1], c.num_heads, -1) for n in ("query", "key", "value"))
        own = Segment(KV(heads_in_front(key), heads_in_front(value)), context.bias, context.mask)
        extra = layers.extra_segments(self.sites, "attention", c.num_heads, c.head_dim, x.dtype)
        rate = c.dropout_rate if c.attention_dropout_rate is None else c.attention_dropout_rate
        dropout = nn.Dropout(rate, deterministic=False) if rate and not context.deterministic else None
        mixed = attend(query, [*extra, own], c.head_dim**-0.5, dropout, c.attention)
        return linear("out")(mixed.reshape(x.shape))


class Block(nn.Module):
    """One layer: attention, then the MLP, a norm behind the sum with each."""

    config: BertConfig
    sites: Sites

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> tuple[Float[Array, "B S D"], None]:
        c = self.config
        drop = nn.Dropout(c.dropout_rate, deterministic=context.deterministic)
        stream, columns = split_rows(x), context.prompt_columns
        x, _ = layers.fill_stream(self.sites, "prompt", stream, None, columns, lambda: stream[:, columns])
        y = Attention(c, self.sites, name="attention")(x, context)
        y = drop(layers.residual_fill(self.sites, "attention", c.width)(y))
        x = layers.LayerNorm(c.norm_eps, name="post_attention_norm")(x + y)
        y = layers.MLP(c, self.sites, name="mlp")(x)
        y = drop(layers.residual_fill(self.sites, "mlp", c.width)(y))
        return layers.LayerNorm(c.norm_eps, name="post_mlp_norm")(x + y), None


class MaskedHead(nn.Module):
    """What stands between the state at a mask and its logits, `LayerNorm(act(dense(x)))`, and the bias of these."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.dense = layers.Linear(c.width, "masked_head/dense", bias=True)
        self.norm = layers.LayerNorm(c.norm_eps)
        self.bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))

    def __call__(self, state: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
        return self.norm(layers.ACTIVATIONS[self.config.activation](self.dense(state)))

    def biased(self, logits: Float[Array, "*S V"], vocab_ids: Array | None) -> Float[Array, "*S V"]:
        """Returns the logits, over the vocabulary or over `vocab_ids` alone, with their bias added."""
        bias = self.bias if vocab_ids is None else self.bias[vocab_ids]
        return logits + jnp.broadcast_to(bias.astype(jnp.float32), logits.shape)


class Bert(nn.Module):
    """The backbone. Its methods take embedded text, so that a method can act between `embed` and the blocks.

    Rows are aligned to the left: a token's column is its place in its own text.
    """

    config: BertConfig
    sites: Sites = NO_SITES

    def setup(self) -> None:
        c = self.config
        self.token_embedder = layers.Embedding(c.vocab_size, c.width, c.dtype)
        self.position_embedder = layers.PositionEmbedding(c.position_offset + c.max_positions, c.width)
        self.type_embedder = layers.Embedding(c.token_types, c.width, c.dtype)
        self.embedding_norm = layers.LayerNorm(c.norm_eps)
        self.dropout = nn.Dropout(c.dropout_rate)
        block = rematerialised(Block, c.remat, c.scan_layers)
        if c.scan_layers:
            self.layers: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                variable_broadcast=COMMON,
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast,),
                length=c.num_layers,
            )(c, self.sites)
        else:
            self.layers = [block(c, self.sites) for _ in range(c.num_layers)]
        if c.has_pooler:
            self.pooler = layers.Linear(c.width, "pooler", bias=True)
        if c.has_masked_head:
            self.masked_head = MaskedHead(c)
            if not c.tied:
                self.logits_dense = layers.Head(c.vocab_size)

    def init_pass(self) -> Array:
        """Runs every part once, on one token, for `init`."""
        embeds, mask = self.embed(jnp.zeros((1, 1), jnp.int32)), jnp.ones((1, 1), bool)
        states = self.encode(embeds, mask)
        if self.config.has_pooler:
            self.pool(states, mask, "pooled")
        return self.head(self.masked_head(states)) if self.config.has_masked_head else states

    def embed(self, tokens: Int[Array, "*S"]) -> Float[Array, "*S D"]:
        """Returns the frozen word embeddings of token ids, alone.

        An input method acts on these, as torch models' `inputs_embeds` do; positions, types and the norm come behind.
        """
        return self.token_embedder(tokens)

    def encode(
        self,
        embeds: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Returns the last layer's states of the text's tokens, behind a prompt of all rows or one of each.

        With `deterministic=False` there is dropout as in BERT, from the rng `"dropout"`.
        """
        states = self._states(embeds, mask, prompt, deterministic)
        return states if prompt is None else states[:, prompt.shape[-2] :]

    def pool(self, states: Float[Array, "B T D"], mask: Bool[Array, "B T"], pooling: str) -> Float[Array, "B D"]:
        """Returns one vector of each text: `deptjax.models.pooling.pool`, or `pooled`.

        Raises `UserError` for `pooled` where the checkpoint has no such layer.
        """
        if pooling != "pooled" or not self.config.has_pooler:
            return pool(states, mask, pooling)
        return jnp.tanh(self.pooler(pool(states, mask, "first")))

    def head(self, states: Float[Array, "*S D"], vocab_ids: Int[Array, "C"] | None = None) -> Float[Array, "*S V"]:
        """Returns float32 logits over the vocabulary, or over `vocab_ids` alone, of states from `target_states`."""
        decoder = self.token_embedder.attend if self.config.tied else self.logits_dense
        return self.masked_head.biased(decoder(states, vocab_ids), vocab_ids)

    def target_states(
        self,
        source: Float[Array, "B T D"],
        source_mask: Bool[Array, "B T"],
        prompt: Float[Array, "*B M D"] | None,
        targets: Int[Array, "B U"],
        deterministic: bool = True,
        *,
        tokens: Int[Array, "B T"],
    ) -> Float[Array, "B 1 D"]:
        """Returns the state at each row's mask token, as `head` takes it, behind the masked head's own layers.

        `tokens` are the ids of the source. There is one place to fill, and so one target a row: `targets` are not
        looked at. Raises `UserError` for a checkpoint without a masked-language-modelling head.
        """
        self._check_fills()
        return self._at_mask(self.encode(source, source_mask, prompt, deterministic), tokens)[:, None]

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
        *,
        tokens: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B D"], tuple[()]]:
        """Returns the state at the mask token, as `head` takes it, and nothing to go on from.

        `tokens` are the ids of the source. Nothing follows, so `max_new` and `beams` say nothing here.
        """
        self._check_fills()
        prompt, length = (None, None) if front is None else front
        states = self._states(source, source_mask, prompt, True, length)
        return self._at_mask(states[:, 0 if prompt is None else prompt.shape[-2] :], tokens), ()

    def extend(self, cache: Any, tokens: Array, t: Array | int, front: Any = None) -> Any:
        """Raises `UserError`: there is nothing behind the place that is filled."""
        raise UserError(
            "a masked model fills one place and writes no text; give labels of one token each, or take a causal or"
            " encoder-decoder backbone"
        )

    def _check_fills(self) -> None:
        self.config.check_fills()
        if self.config.mask_token is None:
            raise UserError("the tokenizer has no mask token; take the tokenizer that belongs to the model")

    def _at_mask(self, states: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
        """Returns the masked head's state at the first mask token of each row."""
        place = jnp.argmax(tokens == self.config.mask_token, axis=1)
        return self.masked_head(jnp.take_along_axis(states, place[:, None, None], axis=1)[:, 0])

    def _states(
        self,
        text: Array,
        mask: Array,
        prompt: Array | None,
        deterministic: bool,
        prompt_length: Array | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the last layer's states of the prompt and the text, S = M + T.

        Of a prompt that is padded the last `prompt_length` vectors are real, and take the first positions.
        """
        count = 0 if prompt is None else prompt.shape[-2]
        x, bias = text, None
        if prompt is not None:
            front = jnp.broadcast_to(prompt.astype(text.dtype), (text.shape[0], *prompt.shape[-2:]))
            x = jnp.concatenate([front, text], axis=1)
            mask = jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)
            bias = front_bias(count, prompt_length)
            if bias is not None:
                bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, text.shape[1])))
        first = self.config.position_offset - (0 if prompt_length is None else count - prompt_length)
        x = x + self.position_embedder(first + jnp.arange(x.shape[1]), x.dtype)[None]
        x = self.embedding_norm(x + self.type_embedder(jnp.zeros((1, 1), jnp.int32)))
        x, context = self.dropout(x, deterministic=deterministic), Context(mask, bias, deterministic, count)
        if self.config.scan_layers:
            return self.layers(x, context)[0]
        for block in self.layers:
            x, _ = block(x, context)
        return x
