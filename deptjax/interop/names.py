"""Which stored tensor fills which leaf: Hugging Face's names against the parameter trees of ARCHITECTURE.md.

Torch stores a projection as (out, in), the trees hold kernels as (in, out); T5's relative bias is stored as
(buckets, N) and held as (N, buckets). GPT-2's files hold kernels as (in, out) too, query, key and value side by side in
one tensor. Everything else is equal as it stands. The tables read both ways: they import
checkpoints, and a tuned tree can be written back with them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any, NamedTuple

Path = tuple[str, ...]

# Stored by old versions, never read: rotary frequencies are a function of the config, the first cross-attention of some
# T5 files carries a relative bias that T5 does not use, GPT-2's causal mask is a triangle of ones, BERT's positions are
# numbers from 0 on, and its head that tells whether a sentence is the next one is of its training alone.
HARMLESS_TENSORS = re.compile(
    r"(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    r"|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
    r"|(bert\.|roberta\.)?embeddings\.(position_ids|token_type_ids)|cls\.seq_relationship\.(weight|bias))"
)


class Entry(NamedTuple):
    """One leaf: its `path` in the unrolled tree, the tensor `name` that fills it, and that tensor's stored `shape`.

    `transpose`: the leaf is the tensor transposed. `copies`: tensors that may be present and must then hold the same
    values. `instead`: when `name` is absent, the first of these that is there is taken. `part`: which of how many equal
    pieces of the tensor, along its last axis, the leaf is.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    copies: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    part: tuple[int, int] = (0, 1)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        shape = (*self.shape[:-1], self.shape[-1] // self.part[1])
        return shape[::-1] if self.transpose else shape


def entries(config: Any) -> list[Entry]:
    """Returns the entry of every leaf of the backbone that `config` describes."""
    return {"bert": bert_entries, "gpt2": gpt2_entries, "llama": llama_entries, "t5": t5_entries}[config.family](config)


def with_parts(config: Any, names: Collection[str]) -> Any:
    """Returns the config of a model with the layers that its files have, given the names of the stored tensors.

    Files of one config may hold BERT's blocks alone, a pooler behind them, the masked-language-modelling head, or both.
    """
    if config.family != "bert":
        return config
    head = ("cls.predictions.", "lm_head.")
    return dataclasses.replace(
        config,
        has_pooler=any(f"{prefix}pooler.dense.weight" in names for prefix in _BERT_PREFIXES),
        has_masked_head=any(name.startswith(head) for name in names),
    )


def llama_entries(config: Any) -> list[Entry]:
    """Returns the entries of a `LlamaConfig`, with the names of transformers' `LlamaForCausalLM`."""
    width, mlp = config.width, config.mlp_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embed = (config.vocab_size, width)
    tied = ("lm_head.weight",) if config.tied else ()
    out = [Entry(("token_embedder", "embedding"), "model.embed_tokens.weight", embed, copies=tied)]
    for i in range(config.num_layers):
        layer, name = f"layers_{i}", f"model.layers.{i}."
        attention, dense = (layer, "attention"), (layer, "mlp")
        out += [
            Entry((layer, "pre_attention_norm", "scale"), name + "input_layernorm.weight", (width,)),
            _kernel((*attention, "query"), name + "self_attn.q_proj.weight", width, queries),
            _kernel((*attention, "key"), name + "self_attn.k_proj.weight", width, keys),
            _kernel((*attention, "value"), name + "self_attn.v_proj.weight", width, keys),
            _kernel((*attention, "out"), name + "self_attn.o_proj.weight", queries, width),
            Entry((layer, "pre_mlp_norm", "scale"), name + "post_attention_layernorm.weight", (width,)),
            _kernel((*dense, "gate"), name + "mlp.gate_proj.weight", width, mlp),
            _kernel((*dense, "up"), name + "mlp.up_proj.weight", width, mlp),
            _kernel((*dense, "down"), name + "mlp.down_proj.weight", mlp, width),
        ]
    out.append(Entry(("final_norm", "scale"), "model.norm.weight", (width,)))
    if not config.tied:
        out.append(_kernel(("logits_dense",), "lm_head.weight", width, config.vocab_size))
    return out


def gpt2_entries(config: Any) -> list[Entry]:
    """Returns the entries of a `GPT2Config`, with the names of transformers' `GPT2LMHeadModel` or of its body."""
    width, mlp = config.width, config.mlp_dim
    tied = ("lm_head.weight",) if config.tied else ()
    out = [
        _gpt2(("token_embedder", "embedding"), "wte.weight", (config.vocab_size, width))._replace(copies=tied),
        _gpt2(("position_embedder", "embedding"), "wpe.weight", (config.max_positions, width)),
    ]
    for i in range(config.num_layers):
        layer, name = f"layers_{i}", f"h.{i}."
        out += _gpt2_norm((layer, "pre_attention_norm"), name + "ln_1", width)
        for part, leaf in enumerate(("query", "key", "value")):
            both = _gpt2_linear((layer, "attention", leaf), name + "attn.c_attn", width, 3 * width)
            out += [entry._replace(part=(part, 3)) for entry in both]
        out += _gpt2_linear((layer, "attention", "out"), name + "attn.c_proj", width, width)
        out += _gpt2_norm((layer, "pre_mlp_norm"), name + "ln_2", width)
        out += _gpt2_linear((layer, "mlp", "up"), name + "mlp.c_fc", width, mlp)
        out += _gpt2_linear((layer, "mlp", "down"), name + "mlp.c_proj", mlp, width)
    out += _gpt2_norm(("final_norm",), "ln_f", width)
    if not config.tied:
        out.append(_kernel(("logits_dense",), "lm_head.weight", width, config.vocab_size))
    return out


def _gpt2(path: Path, name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(path, f"transformer.{name}", shape, instead=(name,))


def _gpt2_norm(path: Path, name: str, width: int) -> list[Entry]:
    return [_gpt2((*path, "scale"), f"{name}.weight", (width,)), _gpt2((*path, "bias"), f"{name}.bias", (width,))]


def _gpt2_linear(path: Path, name: str, features_in: int, features_out: int) -> list[Entry]:
    kernel = _gpt2((*path, "kernel"), f"{name}.weight", (features_in, features_out))
    return [kernel, _gpt2((*path, "bias"), f"{name}.bias", (features_out,))]


_BERT_PREFIXES = ("bert.", "roberta.", "")


def bert_entries(config: Any) -> list[Entry]:
    """Returns the entries of a `BertConfig`, with the names of transformers' `BertForMaskedLM`.

    Of a model with a `position_offset`, those of `RobertaForMaskedLM`. Either may be stored without its prefix, as
    `BertModel` and `RobertaModel` are, and BERT's norms may have their first names, gamma and beta.
    """
    width, mlp = config.width, config.mlp_dim
    roberta = config.position_offset > 0
    body = _Bert("roberta." if roberta else "bert.")
    out = [body.entry(("token_embedder", "embedding"), "embeddings.word_embeddings.weight", (config.vocab_size, width))]
    head = "lm_head" if roberta else "cls.predictions"
    if config.tied and config.has_masked_head:
        out = [out[0]._replace(copies=(f"{head}.decoder.weight",))]
    tables = {
        "position": (config.position_offset + config.max_positions, "embeddings.position_embeddings.weight"),
        "type": (config.token_types, "embeddings.token_type_embeddings.weight"),
    }
    out += [body.entry((f"{kind}_embedder", "embedding"), at, (rows, width)) for kind, (rows, at) in tables.items()]
    out += body.norm(("embedding_norm",), "embeddings.LayerNorm", width)
    for i in range(config.num_layers):
        layer, at = f"layers_{i}", f"encoder.layer.{i}."
        for name in ("query", "key", "value"):
            out += body.linear((layer, "attention", name), f"{at}attention.self.{name}", width, width)
        out += body.linear((layer, "attention", "out"), f"{at}attention.output.dense", width, width)
        out += body.norm((layer, "post_attention_norm"), f"{at}attention.output.LayerNorm", width)
        out += body.linear((layer, "mlp", "up"), f"{at}intermediate.dense", width, mlp)
        out += body.linear((layer, "mlp", "down"), f"{at}output.dense", mlp, width)
        out += body.norm((layer, "post_mlp_norm"), f"{at}output.LayerNorm", width)
    if config.has_pooler:
        out += body.linear(("pooler",), "pooler.dense", width, width)
    if config.has_masked_head:
        within, norm = ("", "layer_norm") if roberta else ("transform.", "LayerNorm")
        out += _Bert().linear(("masked_head", "dense"), f"{head}.{within}dense", width, width)
        out += _Bert().norm(("masked_head", "norm"), f"{head}.{within}{norm}", width)
        copy = (f"{head}.decoder.bias",)
        out.append(Entry(("masked_head", "bias"), f"{head}.bias", (config.vocab_size,), copies=copy, instead=copy))
        if not config.tied:
            out.append(_kernel(("logits_dense",), f"{head}.decoder.weight", width, config.vocab_size))
    return out


class _Bert(NamedTuple):
    """Makes the entries of what is stored with a prefix, or, in the files of a body alone, without any."""

    prefix: str = ""

    def entry(self, path: Path, name: str, shape: tuple[int, ...], old: str | None = None) -> Entry:
        names = [f"{prefix}{n}" for n in (name, old) if n for prefix in dict.fromkeys((self.prefix, ""))]
        return Entry(path, names[0], shape, instead=tuple(names[1:]))

    def norm(self, path: Path, name: str, width: int) -> list[Entry]:
        stored = {"scale": ("weight", "gamma"), "bias": ("bias", "beta")}
        return [
            self.entry((*path, leaf), f"{name}.{new}", (width,), f"{name}.{old}") for leaf, (new, old) in stored.items()
        ]

    def linear(self, path: Path, name: str, features_in: int, features_out: int) -> list[Entry]:
        kernel = self.entry((*path, "kernel"), f"{name}.weight", (features_out, features_in))
        return [kernel._replace(transpose=True), self.entry((*path, "bias"), f"{name}.bias", (features_out,))]


def t5_entries(config: Any) -> list[Entry]:
    """Returns the entries of a `T5Config`, with the names of transformers' `T5ForConditionalGeneration`."""
    width = config.width
    copies: tuple[str, ...] = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    if config.tied:
        copies += ("lm_head.weight",)
    embed = (config.vocab_size, width)
    # Files written by some versions hold the shared table under one of its other names alone.
    out = [Entry(("token_embedder", "embedding"), "shared.weight", embed, copies=copies, instead=copies[:1])]
    out += _t5_stack(config, "encoder", config.num_encoder_layers)
    out += _t5_stack(config, "decoder", config.num_decoder_layers)
    if not config.tied:
        # Without scaled logits but without a head of its own, a model uses the embedding table as it stands.
        head = _kernel(("decoder", "logits_dense"), "lm_head.weight", width, config.vocab_size)
        out.append(head._replace(instead=("shared.weight",)))
    return out


def _t5_stack(config: Any, stack: str, layers: int) -> list[Entry]:
    width, inner, mlp = config.width, config.num_heads * config.head_dim, config.mlp_dim
    decoder = stack == "decoder"
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shape = (config.relative_buckets, config.num_heads)
    out = [Entry((stack, "relpos_bias", "rel_embedding"), bias, shape, transpose=True)]
    for i in range(layers):
        layer, name = (stack, f"layers_{i}"), f"{stack}.block.{i}.layer."
        self_norm = "pre_self_attention_layer_norm" if decoder else "pre_attention_layer_norm"
        out.append(Entry((*layer, self_norm, "scale"), name + "0.layer_norm.weight", (width,)))
        own = "self_attention" if decoder else "attention"
        out += _t5_attention((*layer, own), name + "0.SelfAttention", width, inner)
        if decoder:
            cross = (*layer, "pre_cross_attention_layer_norm", "scale")
            out.append(Entry(cross, name + "1.layer_norm.weight", (width,)))
            out += _t5_attention((*layer, "encoder_decoder_attention"), name + "1.EncDecAttention", width, inner)
        name += "2." if decoder else "1."
        out.append(Entry((*layer, "pre_mlp_layer_norm", "scale"), name + "layer_norm.weight", (width,)))
        for wi in ("wi_0", "wi_1") if config.gated else ("wi",):
            out.append(_kernel((*layer, "mlp", wi), f"{name}DenseReluDense.{wi}.weight", width, mlp))
        out.append(_kernel((*layer, "mlp", "wo"), f"{name}DenseReluDense.wo.weight", mlp, width))
    out.append(Entry((stack, f"{stack}_norm", "scale"), f"{stack}.final_layer_norm.weight", (width,)))
    return out


def _t5_attention(path: Path, name: str, width: int, inner: int) -> list[Entry]:
    into = [
        _kernel((*path, leaf), f"{name}.{letter}.weight", width, inner)
        for leaf, letter in (("query", "q"), ("key", "k"), ("value", "v"))
    ]
    return [*into, _kernel((*path, "out"), f"{name}.o.weight", inner, width)]


def _kernel(path: Path, name: str, features_in: int, features_out: int) -> Entry:
    return Entry((*path, "kernel"), name, (features_out, features_in), transpose=True)
