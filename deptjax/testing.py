"""Small backbones with random weights and a tokenizer made in memory, for tests and examples that need no download."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.models.backbone import Backbone
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


def random_params(config: Any, seed: int = 0, scale: float = 1.0) -> Tree:
    """Returns a random float32 tree for a config: kernels N(0, scale / fan-in), norms near 1, the rest N(0, 1)."""
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    def forward(module: Any) -> Array:
        return module.head(module.target_states(module.embed(tokens), mask, None, tokens))

    shapes = jax.eval_shape(lambda: config.make().init(jax.random.key(0), method=forward))["params"]
    random = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: Any) -> Array:
        values = random.standard_normal(shape.shape).astype(np.float32)
        if path[-1].key == "scale":
            values = 1 + 0.1 * values
        elif path[-1].key == "kernel":
            values = values * (scale / shape.shape[-2]) ** 0.5
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
