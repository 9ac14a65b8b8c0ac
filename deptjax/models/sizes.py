"""The shapes of published models, by name.

    config = SIZES["llama2-7b"]
    parameter_count(config)            # 6738415616, and nothing of it is allocated

`load_backbone` reads the shape from a checkpoint and needs none of this. It is for what is decided before there is a
checkpoint: whether a model fits a device, what a method's parameters are on it.

T5 1.1, its LM-adapted form and Flan-T5 have one shape; their heads are not tied to the embedding, T5 1.0's are.
Sources: Raffel et al. 2020 (arXiv 1910.10683) and T5's released configs; Xue et al. 2021 (arXiv 2010.11934) for mT5;
Xue et al. 2022 (arXiv 2105.13626, table 1) for ByT5; Devlin et al. 2019 (arXiv 1810.04805) for BERT and Liu et al. 2019
(arXiv 1907.11692) for RoBERTa, the first with its pooling layer and both with the head that fills masks; Radford et al.
2019 for GPT-2; Touvron et al. 2023 (arXiv 2307.09288) and Grattafiori et al. 2024 (arXiv 2407.21783) for Llama 2 and 3;
the model cards of SmolLM2 (arXiv 2502.02737). Vocabularies are those of the released files, padded for the hardware
they were trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from deptjax.models.bert import BertConfig
from deptjax.models.gpt2 import GPT2Config
from deptjax.models.llama import LlamaConfig
from deptjax.models.t5 import T5Config
from deptjax.quantization import quantize_tree, tree_bytes
from deptjax.typing import Tree

Config = T5Config | LlamaConfig | GPT2Config | BertConfig


def _t5(width: int, mlp_dim: int, layers: int, heads: int, head_dim: int = 64, **fields: Any) -> T5Config:
    shape = {"vocab_size": 32128, "num_encoder_layers": layers, "num_decoder_layers": layers, **fields}
    return T5Config(width=width, mlp_dim=mlp_dim, num_heads=heads, head_dim=head_dim, **shape)


def _gated(*shape: int, **fields: Any) -> T5Config:
    return _t5(*shape, activation="gelu_new", gated=True, tied=False, **fields)


def _byt5(width: int, mlp_dim: int, encoder: int, decoder: int, heads: int) -> T5Config:
    return _gated(width, mlp_dim, encoder, heads, num_decoder_layers=decoder, vocab_size=384)


def _gpt2(width: int, layers: int, heads: int) -> GPT2Config:
    return GPT2Config(vocab_size=50257, width=width, num_layers=layers, num_heads=heads, mlp_dim=4 * width)


def _bert(width: int, layers: int, heads: int, **fields: Any) -> BertConfig:
    shape = {"vocab_size": 30522, "mlp_dim": 4 * width, "mask_token": 103, **fields}
    return BertConfig(width=width, num_layers=layers, num_heads=heads, **shape)


def _llama(width: int, mlp_dim: int, layers: int, heads: int, kv_heads: int, **fields: Any) -> LlamaConfig:
    return LlamaConfig(
        width=width,
        mlp_dim=mlp_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        norm_eps=1e-5,
        **fields,
    )


_ROBERTA: dict[str, Any] = {
    "vocab_size": 50265,
    "mask_token": 50264,
    "position_offset": 2,
    "token_types": 1,
    "norm_eps": 1e-5,
    "has_pooler": False,
}
_LLAMA2: dict[str, Any] = {"vocab_size": 32000, "max_positions": 4096}
_SMOLLM2: dict[str, Any] = {"vocab_size": 49152, "max_positions": 8192, "tied": True}
_T5_1_1 = {
    "small": _gated(512, 1024, 8, 6),
    "base": _gated(768, 2048, 12, 12),
    "large": _gated(1024, 2816, 24, 16),
    "xl": _gated(2048, 5120, 24, 32),
    "xxl": _gated(4096, 10240, 24, 64),
}

SIZES: dict[str, Config] = {
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, 128),
    "t5-11b": _t5(1024, 65536, 24, 128, 128),
    **{f"{kind}-{size}": config for kind in ("t5-1.1", "t5-lm", "flan-t5") for size, config in _T5_1_1.items()},
    **{f"mt5-{size}": dataclasses.replace(config, vocab_size=250112) for size, config in _T5_1_1.items()},
    "byt5-small": _byt5(1472, 3584, 12, 4, 6),
    "byt5-base": _byt5(1536, 3968, 18, 6, 12),
    "byt5-large": _byt5(1536, 3840, 36, 12, 16),
    "byt5-xl": _byt5(2560, 6720, 36, 12, 32),
    "byt5-xxl": _byt5(4672, 12352, 36, 12, 64),
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "roberta-base": _bert(768, 12, 12, **_ROBERTA),
    "roberta-large": _bert(1024, 24, 16, **_ROBERTA),
    "all-minilm-l6-v2": _bert(384, 6, 12, has_masked_head=False),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, **_LLAMA2),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, **_LLAMA2),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, **_LLAMA2),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, vocab_size=128256, max_positions=8192, rope_theta=500000.0),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, vocab_size=128256, max_positions=8192, rope_theta=500000.0),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, rope_theta=100000.0, **_SMOLLM2),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, rope_theta=100000.0, **_SMOLLM2),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, rope_theta=130000.0, **_SMOLLM2),
}


def parameter_count(config: Config) -> int:
    """Returns how many numbers the model of a config has: the shapes alone are computed.

    >>> parameter_count(SIZES["gpt2"])
    124439808
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))


def weight_bytes(config: Config) -> int:
    """Returns the bytes of the weights of a config's model, in its dtype and quantised as it says.

    >>> weight_bytes(dataclasses.replace(SIZES["gpt2"], dtype="bfloat16"))
    248879616
    """
    stored = jax.numpy.dtype(config.dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, stored), parameter_shapes(config))
    if config.quantize is not None:
        shapes = jax.eval_shape(functools.partial(quantize_tree, scheme=config.quantize), shapes)
    return tree_bytes(shapes)


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: Config) -> Tree:
    """Returns the parameter tree of a config, layers stacked, its leaves `ShapeDtypeStruct`; not to be changed."""
    module = dataclasses.replace(config, scan_layers=True).make()  # one layer is traced instead of all
    return jax.eval_shape(lambda: module.init(jax.random.key(0), method="init_pass")["params"])
