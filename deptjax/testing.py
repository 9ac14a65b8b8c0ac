"""Small backbones with random weights and a tokenizer made in memory, for tests and examples that need no download."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.models.backbone import Backbone
from deptjax.models.bert import BertConfig
from deptjax.models.gpt2 import GPT2Config
from deptjax.models.llama import LlamaConfig
from deptjax.models.t5 import T5Config
from deptjax.typing import Array, Tree

WORDS = tuple(
    "a an the this that is was are of to and in it not very film story plot actor scene ending good bad great awful "
    "fine dull bright sad happy yes no positive negative one two three four five red green blue : ? . , label "
    "text".split()
)


def tiny_tokenizer(words: tuple[str, ...] = WORDS) -> Any:
    """Returns a transformers tokenizer of whole words: `<pad>` 0, `</s>` 1, `<unk>` 2, then `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_masked_tokenizer(words: tuple[str, ...] = WORDS) -> Any:
    """Returns `tiny_tokenizer` with RoBERTa's frame, `<s>` and `</s>` around each text, and `<mask>`."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(words)
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"})
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
    )
    return tokenizer


def random_params(config: Any, seed: int = 0, scale: float = 1.0) -> Tree:
    """Returns a random float32 tree for a config: kernels N(0, scale / fan-in), norms near 1, biases
    near 0, the rest N(0, 1).
    """
    shapes = jax.eval_shape(lambda: config.make().init(jax.random.key(0), method="init_pass"))["params"]
    random = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: Any) -> Array:
        values = random.standard_normal(shape.shape).astype(np.float32)
        if path[-1].key == "scale":
            values = 1 + 0.1 * values
        elif path[-1].key == "kernel":
            values = values * (scale / shape.shape[-2]) ** 0.5
        elif path[-1].key == "bias":
            values = 0.1 * values
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def tiny_llama(seed: int = 0, **fields: Any) -> Backbone:
    """Returns a LLaMA of two layers with random weights, its sizes different primes where they can be."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        width=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        mlp_dim=37,
        norm_eps=1e-5,
        max_positions=512,
        tied=True,
    )
    config = dataclasses.replace(config, **fields)
    return Backbone("tiny-llama", config, random_params(config, seed), tokenizer)


def tiny_gpt2(seed: int = 0, **fields: Any) -> Backbone:
    """Returns a GPT-2 of two layers with random weights, its sizes different where they can be."""
    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), width=24, num_layers=2, num_heads=3, mlp_dim=37, max_positions=512)
    config = dataclasses.replace(config, **fields)
    return Backbone("tiny-gpt2", config, random_params(config, seed), tokenizer)


def tiny_bert(seed: int = 0, **fields: Any) -> Backbone:
    """Returns a BERT of two layers with random weights, with a pooler and a head that fills masks."""
    tokenizer = tiny_masked_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        width=24,
        num_layers=2,
        num_heads=3,
        mlp_dim=37,
        max_positions=512,
        mask_token=tokenizer.mask_token_id,
    )
    config = dataclasses.replace(config, **fields)
    return Backbone("tiny-bert", config, random_params(config, seed), tokenizer)


def tiny_t5(seed: int = 0, **fields: Any) -> Backbone:
    """Returns a T5 of two and three layers with random weights, its sizes different primes where they can be."""
    tokenizer = tiny_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        width=23,
        num_encoder_layers=2,
        num_decoder_layers=3,
        num_heads=3,
        head_dim=5,
        mlp_dim=31,
        relative_buckets=8,
        relative_max_distance=16,
    )
    config = dataclasses.replace(config, **fields)
    return Backbone("tiny-t5", config, random_params(config, seed), tokenizer)


def save_hf_folder(backbone: Backbone, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a backbone as a Hugging Face folder, which `load_backbone` and transformers read, and returns the folder.

    The folder holds `config.json`, `model.safetensors` in the dtype of the parameters, and the tokenizer's files.
    Tied and scanned layouts are written as Hugging Face has them: one tensor a layer, a tied head left out.
    Raises `ValueError` for a config that Hugging Face's format has no words for.
    """
    from safetensors.numpy import save_file

    from deptjax.interop.names import entries

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[np.ndarray]] = {}
    for entry in entries(backbone.config):  # parts of one tensor come in their order
        leaf = _leaf(backbone.params, entry.path)
        parts.setdefault(entry.name, []).append(leaf.T if entry.transpose else leaf)
    tensors = {name: np.ascontiguousarray(np.concatenate(leaves, axis=-1)) for name, leaves in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_hf_config(backbone.config), indent=2) + "\n")
    backbone.tokenizer.save_pretrained(folder)
    return folder


def _leaf(params: Tree, path: tuple[str, ...]) -> np.ndarray:
    """Returns the leaf at `path` of the unrolled tree, whether or not the layers are stacked."""
    layer = next((part for part in path if part.startswith("layers_")), None)
    stack = params[path[0]] if layer and path[0] != layer else params
    if layer is None or layer in stack:
        return np.asarray(functools.reduce(lambda tree, key: tree[key], path, params))
    stacked = functools.reduce(lambda tree, key: tree["layers" if key == layer else key], path, params)
    return np.asarray(stacked[int(layer.removeprefix("layers_"))])


def _hf_config(config: Any) -> dict[str, Any]:
    """Returns the fields of `config.json`; `deptjax.interop.huggingface` reads them back to an equal config."""
    if config.family == "t5":
        if config.gated and config.activation == "gelu":
            raise ValueError("Hugging Face has no name for a T5 gated by the exact GELU: its gated-gelu is gelu_new")
        gate = "gated-" if config.gated else ""
        return {
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": config.vocab_size,
            "d_model": config.width,
            "d_kv": config.head_dim,
            "d_ff": config.mlp_dim,
            "num_layers": config.num_encoder_layers,
            "num_decoder_layers": config.num_decoder_layers,
            "num_heads": config.num_heads,
            "relative_attention_num_buckets": config.relative_buckets,
            "relative_attention_max_distance": config.relative_max_distance,
            "feed_forward_proj": gate + ("gelu" if gate and config.activation == "gelu_new" else config.activation),
            "dropout_rate": config.dropout_rate,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied,
            "decoder_start_token_id": config.decoder_start_token,
        }
    if config.family == "gpt2":
        return {
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.mlp_dim,
            "n_positions": config.max_positions,
            "activation_function": config.activation,
            "layer_norm_epsilon": config.norm_eps,
            "embd_pdrop": config.dropout_rate,
            "attn_pdrop": config.dropout_rate,
            "resid_pdrop": config.dropout_rate,
            "tie_word_embeddings": config.tied,
        }
    if config.family == "bert":
        roberta = config.position_offset > 0
        return {
            "model_type": "roberta" if roberta else "bert",
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.mlp_dim,
            "hidden_act": config.activation,
            "hidden_dropout_prob": config.dropout_rate,
            "attention_probs_dropout_prob": (
                config.dropout_rate if config.attention_dropout_rate is None else config.attention_dropout_rate
            ),
            "max_position_embeddings": config.max_positions + config.position_offset,
            "type_vocab_size": config.token_types,
            "layer_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied,
            "pad_token_id": config.position_offset - 1 if roberta else 0,
        }
    fields = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
    }
    if config.rope_scaling is not None:
        rope = config.rope_scaling
        fields["rope_scaling"] = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":
            fields["rope_scaling"] |= {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_positions,
            }
    return fields
