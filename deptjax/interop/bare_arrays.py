"""Prompts as bare arrays: `.npz`, `.safetensors` and `.npy`, with the names of `prompt.safetensors`.

The method's configuration goes with them, as JSON under `method` (in safetensors: in the header). Files of others have
none: a single array (P, D) is a soft prompt, as google-research/prompt-tuning saves it (`.npy`), and a prompt with a
low-rank pair is DePT with its usual scaling.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from deptjax.errors import UserError
from deptjax.interop.adapters import Adapter, refuse_others, take
from deptjax.interop.array_files import SINGLE, array_bytes, floats, read_arrays, safetensors_note
from deptjax.models.backbone import Backbone
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

METHOD = "method"
_PROMPT, _A, _B = "input/prompt", "input/lora_a", "input/lora_b"
_ALIASES = {
    SINGLE: _PROMPT,
    "prompt": _PROMPT,
    "prompt_embeddings": _PROMPT,
    "lora_a": _A,
    "lora_b": _B,
    "prompt_encoder.lora_embedding_A": _A,
    "prompt_encoder.lora_embedding_B": _B,
}


def read_bare(path: Path, backbone: Backbone) -> Adapter:
    """Returns the method and the parameters of a file of arrays.

    Raises `UserError` for arrays of no method that can be told, or of another width than the backbone's.
    """
    arrays = read_arrays(path)
    text = safetensors_note(path).get(METHOD) if path.suffix.lower() == ".safetensors" else None
    if METHOD in arrays:
        text = str(arrays.pop(METHOD))
    if text is None:
        return _told_by_names(path, arrays, backbone)
    try:
        config = json.loads(text)
        if not isinstance(config, dict) or not isinstance(config.get(METHOD), str):
            raise ValueError("it names no method")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its '{METHOD}' is not the JSON of a method ({error}); export it again") from None
    leaves = {name: floats(array, f"{path}: array '{name}'") for name, array in arrays.items()}
    try:
        return Adapter(config, traverse_util.unflatten_dict(leaves, sep="/"))
    except (TypeError, ValueError, AttributeError, IndexError):  # one name is inside another
        raise UserError(f"{path}: the names {', '.join(sorted(leaves))} make no tree; export it again") from None


def _told_by_names(path: Path, arrays: dict[str, np.ndarray], backbone: Backbone) -> Adapter:
    named = {_ALIASES.get(name, name): array for name, array in arrays.items()}
    if len(named) == 1 and len(arrays) == 1 and next(iter(arrays.values())).ndim == 2:
        named = {_PROMPT: next(iter(arrays.values()))}  # there is nothing else it could be, whatever its name
    if _PROMPT not in named:
        there = ", ".join(f"'{name}' {array.shape}" for name, array in list(arrays.items())[:8])
        raise UserError(f"{path}: no soft prompt and no '{METHOD}' among its arrays ({there}); export the prompt again")
    where = str(path)
    refuse_others(named, [_PROMPT, _A, _B], where)
    prompt = floats(take(named, _PROMPT, (None, backbone.width), where), f"{where}: the prompt")
    if not len(prompt):
        raise UserError(f"{where}: the prompt has no vectors; export it again")
    if _A not in named and _B not in named:
        config: dict[str, Any] = {"method": "prompt_tuning", "prompt_length": len(prompt), "prompt_init": "random"}
        return Adapter(config, {"input": {"prompt": prompt}})
    a = floats(take(named, _A, (None, None), where), f"{where}: '{_A}'")
    b = floats(take(named, _B, (a.shape[1], backbone.width), where), f"{where}: '{_B}'")
    logger.warning("%s does not say how its low-rank pair is scaled: taken as alpha / sqrt(rank) with alpha 8", where)
    config = {"method": "dept", "prompt_length": len(prompt), "rank": a.shape[1], "max_length": a.shape[0]}
    return Adapter({**config, "prompt_init": "random"}, {"input": {"prompt": prompt, "lora_a": a, "lora_b": b}})


def bare_bytes(method: dict[str, Any], trainable: Tree, ending: str) -> bytes:
    """Returns the bytes of a `.npz`, `.safetensors` or `.npy` file that `read_bare` reads.

    `.npy` holds one array and no names: it takes a soft prompt alone. Raises `UserError` for any other.
    """
    leaves = traverse_util.flatten_dict(trainable, sep="/")
    arrays = {name: np.asarray(leaf) for name, leaf in sorted(leaves.items())}
    text = json.dumps(method, sort_keys=True)
    if ending == ".npy":
        if list(arrays) != [_PROMPT]:
            raise UserError(f"an .npy file holds a soft prompt alone, and '{method[METHOD]}' has more; use npz")
        return array_bytes(arrays, ending)
    if ending == ".npz":
        return array_bytes({**arrays, METHOD: np.array(text)}, ending)
    return array_bytes(arrays, ending, {METHOD: text})
