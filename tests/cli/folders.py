"""Writes a tiny backbone as a Hugging Face folder, by the same table of names that reads one."""

from __future__ import annotations

import functools
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from deptjax.interop.names import entries
from deptjax.testing import tiny_llama


def save_llama(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """Writes config, weights and tokenizer of `tiny_llama(seed)`, and returns the folder."""
    backbone = tiny_llama(seed)
    config = backbone.config
    folder.mkdir(parents=True)
    tensors = {}
    for entry in entries(config):
        leaf = np.asarray(functools.reduce(lambda tree, key: tree[key], entry.path, backbone.params))
        tensors[entry.name] = np.ascontiguousarray(leaf.T if entry.transpose else leaf)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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
    (folder / "config.json").write_text(json.dumps(fields))
    backbone.tokenizer.save_pretrained(folder)
    return folder
