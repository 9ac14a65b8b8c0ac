"""Reads safetensors files tensor by tensor, a few megabytes at a time.

Layout (github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON that map a name to
its dtype, shape and byte range, then the tensors. A file is never mapped into memory nor read whole: mapped pages
count as the process's memory and a 7B checkpoint would be held twice.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from deptjax.errors import UserError

BLOCK_BYTES = 4 << 20  # what is read at a time; converted blocks live beside it, so a few times this is the overhead

_DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_OTHER_SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class TensorSource(Protocol):
    """What a checkpoint offers the converter: names, shapes, and a way to fill an array with one tensor."""

    def names(self) -> list[str]:
        """Returns the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the stored shape of a tensor."""

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for messages."""

    def blocks(self, name: str, wanted: tuple[int, int] | None = None) -> Any:
        """Yields `(start, rows)`: consecutive slices of the tensor along axis 0, as floating numpy arrays.

        `wanted` are the first row that is needed and the one behind the last; others may come as well.
        """


class SafetensorsFile:
    """One open-and-close safetensors file. Raises `UserError` when the file is truncated or malformed.

    Only the header is read here; `blocks` reads one tensor, a block of rows at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tensors, self._start = _header(self.path)

    def names(self) -> list[str]:
        """Returns the names of all tensors, in the order of the header."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the stored shape of a tensor."""
        return tuple(self._tensors[name]["shape"])

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for messages."""
        return str(self.path)

    def blocks(self, name: str, wanted: tuple[int, int] | None = None) -> Any:
        """Yields `(start, rows)`: consecutive slices of the tensor along axis 0, in the stored dtype, of `wanted` rows.

        Raises `UserError` for a dtype that is not floating point (quantised integers need a dequantised file).
        """
        entry = self._tensors[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"{self.path}: tensor '{name}' has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)};"
                " take a checkpoint that is not quantised"
            )
        shape = tuple(entry["shape"])
        rows, row_shape = (shape[0], shape[1:]) if shape else (1, ())
        row_bytes = max(1, math.prod(row_shape) * dtype.itemsize)
        step = max(1, BLOCK_BYTES // row_bytes)
        with open(self.path, "rb", buffering=0) as file:
            first, last = wanted or (0, rows)
            file.seek(self._start + entry["data_offsets"][0] + first * row_bytes)
            for start in range(first, last, step):
                count = min(step, last - start)
                block = np.empty((count, *row_shape), dtype)
                read_exactly(file, block, self.path, name)
                yield start, block


def read_exactly(file: Any, out: np.ndarray, path: Path, name: str) -> None:
    """Fills the C-contiguous array `out` from `file`; raises `UserError` when the file ends before it is full."""
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise UserError(f"{path}: the file ends inside tensor '{name}'; it is truncated, fetch it again")
        done += got


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the tensors' entries and the offset of the first data byte, every byte range checked."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            raise UserError(f"{path}: the file ends inside its header ({size} bytes); it is truncated, fetch it again")
        try:
            entries = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path}: not a safetensors file (its header is not JSON: {error})") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: not a safetensors file (its header is not a JSON object)")
    entries.pop("__metadata__", None)
    start = 8 + length
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        width = _DTYPES[entry["dtype"]].itemsize if entry["dtype"] in _DTYPES else _OTHER_SIZES.get(entry["dtype"])
        if width is not None and end - begin != math.prod(entry["shape"]) * width:
            raise UserError(f"{path}: tensor '{name}' has {end - begin} bytes, which its shape {entry['shape']} denies")
        if start + end > size:
            raise UserError(
                f"{path}: the file has {size} bytes but tensor '{name}' ends at byte {start + end};"
                " it is truncated, fetch it again"
            )
    return entries, start


class SafetensorsFolder:
    """The tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        self._files: dict[str, SafetensorsFile] = {}
        if single.is_file():
            file = SafetensorsFile(single)
            self._files = dict.fromkeys(file.names(), file)
        elif index.is_file():
            self._open_shards(index)
        else:
            torch = any(self.folder.glob("*.bin"))
            remedy = "save the model with safe_serialization=True" if torch else "is this the model's folder?"
            raise UserError(
                f"{self.folder}: there is no model.safetensors and no model.safetensors.index.json; {remedy}"
            )

    def _open_shards(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index}: not an index of shards (no readable 'weight_map'); fetch it again") from None
        shards: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            if shard not in shards:
                path = self.folder / shard
                if Path(shard).name != shard or not path.is_file():
                    raise UserError(f"{index}: shard '{shard}' is not in the folder; fetch it again")
                shards[shard] = SafetensorsFile(path)
            if name not in shards[shard]:
                raise UserError(f"{shards[shard].path}: tensor '{name}' is missing, which {index.name} places here")
            self._files[name] = shards[shard]
        for file in shards.values():  # a tensor that the index forgot would be silently left out
            for name in file.names():
                if name not in self._files:
                    raise UserError(f"{file.path}: tensor '{name}' is not in {index.name}; fetch both again")

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the stored shape of a tensor."""
        return self._files[name].shape(name)

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, or the folder where none does, for messages."""
        return str(self._files[name].path if name in self._files else self.folder)

    def blocks(self, name: str, wanted: tuple[int, int] | None = None) -> Any:
        """Yields `(start, rows)` slices of a tensor along axis 0, as `SafetensorsFile.blocks` does."""
        return self._files[name].blocks(name, wanted)
