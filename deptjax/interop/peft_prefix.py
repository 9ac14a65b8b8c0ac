"""Prefix tuning of HF peft (PREFIX_TUNING), on LLaMA.

One tensor `prompt_embeddings` (P, L * 2 * K * H): for each position and layer the keys, then the values, heads apart
(peft, `get_prompt`). With `prefix_projection` peft stores what its MLP has computed, in the same shape.

peft hands them to the model as the past: keys that are not rotated, in front of a text whose positions start at P. Here
the text keeps its positions, which start at 0. A rotary score depends on the difference of angles alone,
(R(i + P) q) . k = (R(i) q) . (R(-P) k), so a key is turned by -P positions when it is read, by P when it is written.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deptjax.interop.adapters import Adapter, AdapterConfig, refuse_others, take
from deptjax.interop.array_files import floats
from deptjax.interop.names import Path
from deptjax.interop.peft_prompts import COMMON, EMBEDDINGS, OFF, prompt_fields
from deptjax.models.backbone import Backbone
from deptjax.models.layout import with_layout
from deptjax.models.rope import rope_angles, rope_frequencies, rotate
from deptjax.typing import Tree

_KNOWN = [*COMMON, "init_weights", "encoder_hidden_size", "prefix_projection"]


def read_prefix(config: AdapterConfig, tensors: dict[str, np.ndarray], where: str, backbone: Backbone) -> Adapter:
    """Returns prefix tuning with keys and values (P, K, H) in each layer.

    Raises `UserError` on another family than LLaMA (see `_refusal`).
    """
    if refusal := _refusal(backbone):
        config.refuse("peft_type", f"{refusal}, which cannot be held here")
    config.only(_KNOWN, OFF)
    if config.get("num_transformer_submodules", 1) != 1:
        config.refuse("num_transformer_submodules", "expected 1 for this backbone")
    c, length = backbone.config, config.whole("num_virtual_tokens")
    refuse_others(tensors, [EMBEDDINGS], where)
    width = c.num_layers * 2 * c.num_kv_heads * c.head_dim
    stored = floats(take(tensors, EMBEDDINGS, (length, width), where), f"{where}: tensor '{EMBEDDINGS}'")
    pairs = stored.reshape(length, c.num_layers, 2, c.num_kv_heads, c.head_dim).swapaxes(0, 1)
    leaves: dict[Path, np.ndarray] = {}
    for i, pair in enumerate(pairs):
        place = (f"layers_{i}", "attention", "site")
        leaves[(*place, "keys")] = _turned(pair[:, 0], -length, backbone)
        leaves[(*place, "values")] = np.ascontiguousarray(pair[:, 1])
    return Adapter({"method": "prefix_tuning", "prefix_length": length}, {"backbone": unflatten_dict(leaves)})


def prefix_files(method: dict[str, Any], trainable: Tree, backbone: Backbone) -> tuple[dict[str, Any], Tree]:
    """Returns the fields of the config, and the tensors, of a PREFIX_TUNING adapter.

    Raises `UserError` on another family than LLaMA.
    """
    c, length = backbone.config, method["prefix_length"]
    if refusal := _refusal(backbone):
        config = AdapterConfig({"peft_type": "PREFIX_TUNING"}, backbone.name)
        config.refuse("peft_type", f"{refusal}; write npz or safetensors")
    leaves = flatten_dict(with_layout(trainable["backbone"], scan_layers=False))
    pairs = []
    for i in range(c.num_layers):
        place = (f"layers_{i}", "attention", "site")
        keys = _turned(np.asarray(leaves[(*place, "keys")], np.float32), length, backbone)
        pairs += [keys, np.asarray(leaves[(*place, "values")], np.float32)]
    fields = {
        "peft_type": "PREFIX_TUNING",
        **prompt_fields(length, backbone),
        "token_dim": c.num_kv_heads * c.head_dim,
        "num_attention_heads": c.num_kv_heads,
        "encoder_hidden_size": c.num_kv_heads * c.head_dim,
        "prefix_projection": False,
    }
    return fields, {EMBEDDINGS: np.stack(pairs, axis=1).reshape(length, -1)}


def _refusal(backbone: Backbone) -> str | None:
    """Returns what peft does to a prefix on this family that the attention site does not, or `None`."""
    return {
        "t5": "on T5 peft adds a relative position bias to the scores of a prefix",
        "gpt2": "on GPT-2 peft moves the text's positions behind the prefix",
    }.get(backbone.config.family)


def _turned(keys: np.ndarray, positions: int, backbone: Backbone) -> np.ndarray:
    """Returns keys (P, K, H), all of them turned by the same number of positions."""
    angles = rope_angles(jnp.full(keys.shape[:1], positions), rope_frequencies(backbone.config))
    return np.array(rotate(jnp.asarray(keys), angles))
