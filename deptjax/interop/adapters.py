"""What the adapter formats have in common: their folder's config, the projections they name.

An adapter is read into a method's configuration and its `trainable` tree, layers one by one; which class the method has
is known to `deptjax.prompt` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from deptjax.errors import UserError, nearest
from deptjax.interop.array_files import check_finished, inside, read_arrays
from deptjax.interop.names import Path as TreePath
from deptjax.interop.names import entries
from deptjax.typing import Tree

CONFIG = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
_LAYER = re.compile(r"layers_(\d+)")


class Adapter(NamedTuple):
    """What was read: the method's configuration (`{"method": kind, field: value}`), and float32 parameters."""

    method: dict[str, Any]
    trainable: Tree


class AdapterConfig:
    """The fields of one `adapter_config.json`; every complaint names the file and the field."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields = dict(fields)
        self.where = where

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Returns the config of an adapter's folder. Raises `UserError` where it is missing or not an object."""
        path = inside(folder, CONFIG)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {CONFIG}; is it the adapter's folder?") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}: expected a JSON object; fetch it again")
        return cls(fields, str(path))

    def get(self, field: str, default: Any = None) -> Any:
        """Returns the field, or `default` where it is absent or null."""
        value = self.fields.get(field)
        return default if value is None else value

    def refuse(self, field: str, why: str) -> NoReturn:
        """Raises the error about `field`."""
        raise UserError(f"{self.where}: '{field}' is {json.dumps(self.fields.get(field))}: {why}")

    def whole(self, field: str) -> int:
        """Returns a field's whole number, at least 1."""
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(field, "expected a whole number, at least 1")
        return int(value)

    def number(self, field: str, default: float) -> float:
        """Returns a field's number."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(field, "expected a number")
        return float(value)

    def only(self, known: Iterable[str], off: Mapping[str, str]) -> None:
        """Refuses what is set of the fields `off`, each with what it means, and of those that nobody knows."""
        known = list(known)
        for field, value in self.fields.items():
            if field in off and value:
                self.refuse(field, f"{off[field]} cannot be held here; train without it")
            if field not in known and field not in off and value:
                why = "this field is not known here and may change what the adapter computes"
                self.refuse(field, why + nearest(field, known))


def read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """Returns the tensors of an adapter's folder, and their file's name for messages."""
    for name in TENSORS:
        path = inside(folder, name)
        if path.is_file():
            return read_arrays(path), str(path)
    for path in sorted(folder.glob("*")):
        check_finished(path)
    raise UserError(f"{folder} holds neither {TENSORS[0]} nor {TENSORS[1]}; fetch the adapter again")


def take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int | None, ...], where: str) -> np.ndarray:
    """Returns one tensor of the expected shape; `None` allows any size.

    Raises `UserError` naming the tensor, its shape and the expected one.
    """
    if name not in tensors:
        raise UserError(f"{where}: tensor '{name}' is missing.{nearest(name, tensors)}")
    actual = tensors[name].shape
    if len(actual) != len(shape) or any(want not in (None, have) for have, want in zip(actual, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(
            f"{where}: tensor '{name}' has shape {actual}, expected ({expected}); it belongs to another backbone or "
            "config"
        )
    return tensors[name]


def refuse_others(tensors: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises `UserError` for a tensor that would be silently ignored."""
    known = set(known)
    for name in tensors:
        if name not in known:
            raise UserError(f"{where}: tensor '{name}' has no place in this backbone; train without it")


class Projection(NamedTuple):
    """A projection of a backbone: its node in the unrolled tree, its site, torch's module, and its widths.

    `part`: which of how many equal pieces of the module's result it computes (GPT-2's query, key and value are one).
    """

    path: TreePath
    site: str
    module: str
    features_in: int
    features_out: int
    part: tuple[int, int] = (0, 1)


def projections(config: Any) -> list[Projection]:
    """Returns the projections at which a backbone has a `linear` site, layer by layer."""
    found = []
    for entry in entries(config):
        *path, leaf = entry.path
        if leaf == "kernel" and path[-1] != "logits_dense":
            site = "/".join(part for part in path if not _LAYER.fullmatch(part))
            module = entry.name.removesuffix(".weight")
            features_in, features_out = entry.leaf_shape
            found.append(Projection(tuple(path), site, module, features_in, features_out, entry.part))
    return found
