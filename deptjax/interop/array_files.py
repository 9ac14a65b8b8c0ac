"""Reads and writes files of named arrays: safetensors, torch's `.bin` and `.pt`, and numpy's `.npz` and `.npy`.

Files come from strangers. Nothing in them is run, no size that they claim is believed before it is compared with what
is there, and nothing is read that lies outside the folder that was named.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from deptjax.errors import UserError
from deptjax.interop.safetensors import SafetensorsFile
from deptjax.interop.torch_files import read_torch, torch_bytes

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".npy")
SINGLE = ""  # the name of the one array of a file that holds no names

_MAX_UNPACKED = 1 << 30  # of a compressed .npz; a prompt is a thousandth of it
_UNFINISHED = re.compile(r"\..*\.(new|part|old)|.*\.(incomplete|part|partial|tmp|temp|crdownload|download)")
# What Python's readers raise on damaged files; RuntimeError of zips that are encrypted or of another version.
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, KeyError, TypeError, EOFError),
    *(AttributeError, OverflowError, MemoryError, SyntaxError, tokenize.TokenError),
)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name; the only one of a file without names is called `SINGLE`.

    Raises `UserError`, in one line that names the file, for one that is missing, still being written, of another
    format, truncated or damaged, or holds anything but numbers.
    """
    path = Path(path)
    check_finished(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    ending = path.suffix.lower()
    if ending == ".safetensors":
        return _safetensors(path)
    if ending in (".bin", ".pt", ".pth"):
        found = read_torch(path)
        return {SINGLE: found} if isinstance(found, np.ndarray) else found
    if ending == ".npz":
        return _npz(path)
    if ending == ".npy":
        with open(path, "rb") as file:
            return {SINGLE: _npy(file, path.stat().st_size, path, "the array")}
    raise UserError(f"{path}: files that end in '{ending}' are not read; give one of {', '.join(ENDINGS)}")


def check_finished(path: Path) -> None:
    """Raises `UserError` for a file or folder whose name says that it is still being written."""
    if _UNFINISHED.fullmatch(path.name):
        raise UserError(f"{path}: the name is that of something still being written; wait, or give the finished one")


def inside(folder: Path, name: str) -> Path:
    """Returns the file `name` of a folder.

    Raises `UserError` for a name that leads out of the folder, and for a link that does: only the links of a hub's
    cache, from a snapshot to its blobs, are followed.
    """
    path = folder / name
    home, real = folder.resolve(), path.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in homes):
        raise UserError(f"{path} leads out of {folder}, to {real}; copy the file into the folder")
    return path


def floats(array: np.ndarray, what: str) -> np.ndarray:
    """Returns the numbers as a float32 array of its own. Raises `UserError`, naming `what`, for other than floats."""
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        raise UserError(f"{what} has dtype {array.dtype}; it must hold floating point numbers")
    result = np.array(array, np.float32, order="C")
    if not np.all(np.isfinite(result)):
        raise UserError(f"{what} holds numbers that are not finite; take a checkpoint from before its training broke")
    return result


def array_bytes(arrays: Mapping[str, np.ndarray], ending: str, note: Mapping[str, str] | None = None) -> bytes:
    """Returns the bytes of a file that ends in `.safetensors`, `.bin`, `.npz` or `.npy`, the same for the same arrays.

    `note`, of one entry, is kept in the header of safetensors. `.npy` takes exactly one array, whatever its name.
    """
    import io

    if ending == ".safetensors":
        from safetensors.numpy import save

        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return bytes(save(contiguous, dict(note or {"format": "pt"})))  # of two notes the order would be random
    if ending == ".bin":
        return torch_bytes(arrays)
    out = io.BytesIO()
    if ending == ".npy":
        (array,) = arrays.values()
        np.lib.format.write_array(out, np.asarray(array, order="C"), allow_pickle=False)
    else:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:  # np.savez, without the time of day in it
            for name, array in arrays.items():
                member = io.BytesIO()
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
                file.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return out.getvalue()


def safetensors_note(path: Path) -> dict[str, str]:
    """Returns the texts in the header of a safetensors file that `read_arrays` has read."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    note = header.get("__metadata__", {})
    return {k: v for k, v in note.items() if isinstance(v, str)} if isinstance(note, dict) else {}


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        file = SafetensorsFile(path)
        return {name: _joined(file, name) for name in file.names()}
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({type(error).__name__}: {error})") from None


def _joined(file: SafetensorsFile, name: str) -> np.ndarray:
    blocks = [rows for _, rows in file.blocks(name)]
    shape = file.shape(name)
    return np.concatenate(blocks).reshape(shape) if blocks else np.zeros(shape, np.float32)


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            total = sum(member.file_size for member in members)
            if total > max(_MAX_UNPACKED, path.stat().st_size):
                raise UserError(f"{path}: it unpacks to {total:,} bytes, more than a prompt can have")
            found = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                with file.open(member) as stream:
                    found[name] = _npy(stream, member.file_size, path, f"array '{name}'")
            return found
    except UserError:
        raise
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a member at a place below 0
            raise
        raise UserError(f"{path}: not an .npz file, truncated or damaged ({error}); fetch it again") from None


def _npy(stream: Any, size: int, path: Path, what: str) -> np.ndarray:
    """Returns the array in a stream of `size` bytes, once its header agrees with its size."""
    try:
        shape, fortran, dtype, header = _npy_header(stream)
        if dtype.hasobject:
            raise UserError(f"{path}: {what} holds Python objects, which are not read; save numbers")
        wanted = math.prod(shape) * dtype.itemsize
        if wanted != size - header:
            raise UserError(f"{path}: {what} has {size - header} bytes, which its shape {shape} denies; fetch it again")
        data = stream.read(wanted)
        if len(data) != wanted:
            raise EOFError("it ends too early")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(f"{path}: {what} is not an .npy array, or damaged ({error}); fetch it again") from None


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Returns shape, order, dtype and the length of the header (numpy's NEP 1)."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version}")
    return shape, fortran, dtype, stream.tell()
