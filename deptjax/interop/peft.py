"""Folders of HF peft and its forks: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

Each kind of adapter is read and written in a file of its own; this one knows which kind is whose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deptjax.errors import UserError, nearest
from deptjax.interop.adapters import CONFIG, TENSORS, Adapter, AdapterConfig, read_tensors
from deptjax.interop.array_files import array_bytes
from deptjax.interop.official_dept import KIND as DEPT
from deptjax.interop.official_dept import read_dept
from deptjax.interop.peft_lora import lora_files, read_lora
from deptjax.interop.peft_prefix import prefix_files, read_prefix
from deptjax.interop.peft_prompts import read_soft_prompt, soft_prompt_files
from deptjax.models.backbone import Backbone
from deptjax.typing import Tree

Reader = Callable[..., Adapter]
Writer = Callable[[dict[str, Any], Tree, Backbone], tuple[dict[str, Any], Tree]]

READERS: dict[str, Reader] = {  # by `peft_type`
    "PROMPT_TUNING": read_soft_prompt,
    "P_TUNING": read_soft_prompt,
    "PREFIX_TUNING": read_prefix,
    "LORA": read_lora,
    DEPT: read_dept,
}
WRITERS: dict[str, Writer] = {  # by the method's kind
    "prompt_tuning": soft_prompt_files,
    "prefix_tuning": prefix_files,
    "lora": lora_files,
}
_TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # by whether the backbone is an encoder-decoder


def read_peft(folder: Path, backbone: Backbone) -> Adapter:
    """Returns the method and the parameters of an adapter's folder.

    Raises `UserError`, in one line that names the file and the field or tensor, for an adapter that cannot be held
    exactly, that belongs to another backbone, or that is damaged.
    """
    config = AdapterConfig.read(folder)
    kind = config.get("peft_type")
    if kind not in READERS:
        config.refuse("peft_type", f"expected one of {', '.join(READERS)}.{nearest(str(kind), READERS)}")
    wanted = _TASK_TYPES[backbone.config.is_encoder_decoder]
    if config.get("task_type", wanted) not in (wanted, "FEATURE_EXTRACTION"):
        config.refuse("task_type", f"'{backbone.name}' takes adapters of {wanted}")
    tensors, where = read_tensors(folder)
    return READERS[kind](config, tensors, where, backbone)


def peft_files(method: dict[str, Any], trainable: Tree, backbone: Backbone) -> dict[str, bytes]:
    """Returns the files of an adapter's folder, by name, which `peft.PeftModel.from_pretrained` reads.

    Raises `UserError` for a method that peft does not have.
    """
    kind = method["method"]
    if kind not in WRITERS:
        raise UserError(f"peft has no method '{kind}'; it takes {', '.join(WRITERS)}")
    fields, tensors = WRITERS[kind](method, trainable, backbone)
    fields |= {
        "task_type": _TASK_TYPES[backbone.config.is_encoder_decoder],
        "base_model_name_or_path": backbone.name,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
    }
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
    return {CONFIG: text.encode(), TENSORS[0]: array_bytes(tensors, ".safetensors")}
