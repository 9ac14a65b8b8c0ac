"""T5X checkpoints for the tests: those that T5X wrote, and ones in other layouts, made with flax and tensorstore."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from deptjax.interop.convert import put
from tests.goldens.make_goldens import FOLDER


def unpack(folder: Path) -> Path:
    """Unpacks what T5X wrote, and returns the folder that holds `plain` and `sharded`, each with `checkpoint_3`."""
    with tarfile.open(FOLDER / "t5x_ckpt.tgz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "t5x_ckpt"


def scalable() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the parameters by dotted name and the batch with its logits, of `t5x_scalable.npz`."""
    with np.load(FOLDER / "t5x_scalable.npz") as stored:
        arrays = dict(stored)
    weights = {k.removeprefix("weight:"): v for k, v in arrays.items() if k.startswith("weight:")}
    return weights, {k: v for k, v in arrays.items() if not k.startswith("weight:")}


def write_inline(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Writes a checkpoint whose arrays all stand in the msgpack file, as flax writes one."""
    target: dict[str, Any] = {}
    for name, values in arrays.items():
        put(target, tuple(name.split(".")), np.ascontiguousarray(values))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").write_bytes(msgpack_serialize({"optimizer": {"target": target, "state": {}}}))
    return folder


def change(folder: Path, **changes: Any) -> None:
    """Changes entries of a checkpoint's msgpack file: parameters (`__` stands for a dot) and, without one, the top.

    `None` deletes.
    """
    content = read(folder)
    for key, value in changes.items():
        *parts, last = key.split("__")
        node = content["optimizer"]["target"] if len(parts) else content
        for part in parts:
            node = node.setdefault(part, {})
        node.pop(last, None)
        if value is not None:
            node[last] = value
    (folder / "checkpoint").write_bytes(msgpack_serialize(content))


def read(folder: Path) -> Any:
    """Returns the content of a checkpoint's msgpack file."""
    return msgpack_restore((folder / "checkpoint").read_bytes())
