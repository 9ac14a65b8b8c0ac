"""Checkpoints of DePT's authors (their fork of peft, arXiv 2309.05173), both ways.

A folder with `adapter_config.json` (`peft_type` PROMPT_TUNING_LORA) and `adapter_model.bin`, a file of torch.save with
`prompt_embeddings` (M, D), `prompt_encoder.lora_embedding_A` (X, R) and `prompt_encoder.lora_embedding_B` (R, D). The
offset of token i is `lora_alpha / sqrt(r)` times row i of A B; the fork adds it by column of a text that is padded to
`max_length`, which for texts padded on the right is the same row.

The low-rank pair was not always saved (`save_lora_embeddings`). Without it the prompt alone is left.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import numpy as np

from deptjax.errors import UserError
from deptjax.interop.adapters import CONFIG, TENSORS, Adapter, AdapterConfig, refuse_others, take
from deptjax.interop.array_files import array_bytes, floats
from deptjax.interop.peft_prompts import COMMON, EMBEDDINGS, OFF, prompt_fields
from deptjax.models.backbone import Backbone
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

KIND = "PROMPT_TUNING_LORA"
A, B = "prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B"
ALPHA = 8.0  # the fork's default
_KNOWN = [
    *COMMON,
    *"prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path r lora_alpha init_lora_weights".split(),
    *"hidden_size max_length save_lora_embeddings load_lora_embeddings load_lora_embedding_B".split(),
]


def read_dept(config: AdapterConfig, tensors: dict[str, np.ndarray], where: str, backbone: Backbone) -> Adapter:
    """Returns DePT with the parameters of an authors' checkpoint; prompt tuning, with a warning, where A and B are not.

    Raises `UserError` for a config or tensors that do not fit each other or the backbone.
    """
    if config.get("bias", "none") != "none":
        config.refuse("bias", "trained biases cannot be held here; expected none")
    config.only([*_KNOWN, "bias"], OFF)
    if config.get("num_transformer_submodules", 1) != 1:
        config.refuse("num_transformer_submodules", "expected 1, a prompt in front of the encoder alone")
    length = config.whole("num_virtual_tokens")
    refuse_others(tensors, [EMBEDDINGS, A, B], where)
    prompt = floats(take(tensors, EMBEDDINGS, (length, backbone.width), where), f"{where}: tensor '{EMBEDDINGS}'")
    shared = {"prompt_length": length, "prompt_init": "random"}
    if A not in tensors and B not in tensors:
        logger.warning("%s holds no low-rank pair (%s and %s): taken as prompt tuning", where, A, B)
        return Adapter({"method": "prompt_tuning", **shared}, {"input": {"prompt": prompt}})
    rank, rows, alpha = config.whole("r"), config.whole("max_length"), config.number("lora_alpha", ALPHA)
    a = floats(take(tensors, A, (rows, rank), where), f"{where}: tensor '{A}'")
    b = floats(take(tensors, B, (rank, backbone.width), where), f"{where}: tensor '{B}'")
    method = {"method": "dept", **shared, "rank": rank, "max_length": rows, "alpha": alpha}
    return Adapter(method, {"input": {"prompt": prompt, "lora_a": a, "lora_b": b}})


def dept_files(method: dict[str, Any], trainable: Tree, backbone: Backbone) -> dict[str, bytes]:
    """Returns the files of an authors' checkpoint, by name, with all the fields that their fork writes.

    Raises `UserError` for parameters that are not a prompt with a low-rank pair.
    """
    leaves = trainable.get("input", {})
    if set(leaves) != {"prompt", "lora_a", "lora_b"}:
        raise UserError(f"the authors' format holds a prompt with a low-rank pair, not '{method['method']}'; use peft")
    rank = method["rank"]
    fields = {
        "peft_type": KIND,
        "task_type": "SEQ_2_SEQ_LM" if backbone.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": backbone.name,
        "revision": None,
        "inference_mode": True,
        **prompt_fields(method["prompt_length"], backbone),
        "hidden_size": backbone.width,
        "max_length": method["max_length"],
        "r": rank,
        "lora_alpha": _alpha(method["scaling"], method["alpha"], rank),
        "bias": "none",
        "init_lora_weights": True,
        "prompt_tuning_init": "RANDOM",  # with TEXT the fork's loader would want the backbone's tokenizer
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "save_lora_embeddings": True,
        "load_lora_embeddings": True,
        "load_lora_embedding_B": True,
    }
    tensors = {
        name: np.asarray(leaves[leaf], np.float32)
        for name, leaf in ((EMBEDDINGS, "prompt"), (A, "lora_a"), (B, "lora_b"))
    }
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
    return {CONFIG: text.encode(), TENSORS[1]: array_bytes(tensors, ".bin")}


def _alpha(scaling: str | float, alpha: float, rank: int) -> int | float:
    """Returns the `lora_alpha` whose quotient by sqrt(rank) is the method's scaling."""
    if scaling == "none":
        alpha = math.sqrt(rank)
    elif not isinstance(scaling, str):
        alpha = float(scaling) * math.sqrt(rank)
    return int(alpha) if alpha == int(alpha) else alpha
