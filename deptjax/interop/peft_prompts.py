"""Soft prompts of HF peft: PROMPT_TUNING and P_TUNING, which are stored alike.

Both store one tensor `prompt_embeddings` (M, D): P-tuning's encoder has been applied by then (peft,
`get_prompt_embedding_to_save`). On an encoder-decoder peft has `num_transformer_submodules` 2 unless it is told
otherwise and then stores 2 M vectors, of which its forward pass puts the first M in front of the encoder's input and
never reads the others.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from deptjax.interop.adapters import Adapter, AdapterConfig, refuse_others, take
from deptjax.interop.array_files import floats
from deptjax.models.backbone import Backbone
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

EMBEDDINGS = "prompt_embeddings"
COMMON = (
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode num_virtual_tokens"
    " token_dim num_transformer_submodules num_attention_heads num_layers"
).split()
_KNOWN = [
    *COMMON,
    *"prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split(),
    *"encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout".split(),
]
OFF = {"modules_to_save": "modules trained beside the adapter"}


def read_soft_prompt(config: AdapterConfig, tensors: dict[str, np.ndarray], where: str, backbone: Backbone) -> Adapter:
    """Returns prompt tuning with the prompt (M, D) of a PROMPT_TUNING or P_TUNING adapter."""
    config.only(_KNOWN, OFF)
    length = config.whole("num_virtual_tokens")
    copies = _submodules(config, backbone)
    refuse_others(tensors, [EMBEDDINGS], where)
    stored = take(tensors, EMBEDDINGS, (length * copies, backbone.width), where)
    if copies > 1:
        logger.warning("%s: the last %d of %d vectors are left out: peft does not read them either", where, length,
                       length * copies)  # fmt: skip
    prompt = floats(stored[:length], f"{where}: tensor '{EMBEDDINGS}'")
    return Adapter(
        {"method": "prompt_tuning", "prompt_length": length, "prompt_init": "random"}, {"input": {"prompt": prompt}}
    )


def _submodules(config: AdapterConfig, backbone: Backbone) -> int:
    """Returns how many times M vectors are stored."""
    two = backbone.config.is_encoder_decoder
    copies = config.get("num_transformer_submodules", 2 if two else 1)
    if copies not in ((1, 2) if two else (1,)):
        config.refuse("num_transformer_submodules", f"expected 1{' or 2' if two else ''} for this backbone")
    return int(copies)


def soft_prompt_files(method: dict[str, Any], trainable: Tree, backbone: Backbone) -> tuple[dict[str, Any], Tree]:
    """Returns the fields of the config, and the tensors, of a PROMPT_TUNING adapter."""
    fields = {
        "peft_type": "PROMPT_TUNING",
        **prompt_fields(method["prompt_length"], backbone),
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    return fields, {EMBEDDINGS: np.asarray(trainable["input"]["prompt"], np.float32)}


def prompt_fields(length: int, backbone: Backbone) -> dict[str, Any]:
    """Returns the fields that all of peft's prompt configs have."""
    shape = backbone.config
    layers = shape.num_encoder_layers if shape.is_encoder_decoder else shape.num_layers
    return {
        "num_virtual_tokens": length,
        "token_dim": backbone.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": shape.num_heads,
        "num_layers": layers,
    }
