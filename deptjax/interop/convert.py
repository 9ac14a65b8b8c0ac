"""Fills a parameter tree from a checkpoint, a block of rows at a time.

Every leaf is allocated once, in its final dtype and layout (stacked, where layers are scanned), and its tensors are
read into it a few megabytes at a time. So the peak of memory is the tree itself and a few blocks, whatever the dtype
on disk and however the layers are laid out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from deptjax.errors import UserError, nearest
from deptjax.interop.names import HARMLESS_TENSORS, Entry, Path, entries
from deptjax.interop.safetensors import TensorSource
from deptjax.typing import Tree

DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_LAYER = re.compile(r"layers_(\d+)")
_ALIGN = 64  # jax on CPU takes over a host array without a copy when its first byte is so aligned

Place = Callable[[Path, np.ndarray], Any]


def fill_tree(config: Any, source: TensorSource, *, scan_layers: bool, dtype: str, place: Place | None = None) -> Tree:
    """Returns the parameter tree that `config` describes, filled from `source`.

    `place(path, array)` turns each finished leaf into what the tree holds; by default a jax array on the default
    device. Pass one that shards, so that no device ever holds the whole tree.

    Raises `UserError` for a tensor that is missing, unexpected or has another shape, before anything is read, and for
    two stored copies of a tied tensor that differ.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    wanted = _resolve(entries(config), source)
    place = place or place_on_default_device
    tree: Tree = {}
    for path, group in leaves_of(wanted, scan_layers).items():
        shape = group[0].leaf_shape
        leaf = empty_aligned((len(group), *shape) if is_stacked(path) else shape, DTYPES[dtype])
        for i, entry in enumerate(group):
            target = leaf[i] if is_stacked(path) else leaf
            _fill(entry, source, target.T if entry.transpose else target)
        put(tree, path, place(path, leaf))
    return tree


def put(tree: Tree, path: Path, leaf: Any) -> None:
    """Puts a leaf into a nested dict, whose inner dicts are made where they are not there."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def _resolve(wanted: list[Entry], source: TensorSource) -> list[Entry]:
    """Returns the entries with the names that are there, once every name and shape has been checked."""
    there = set(source.names())
    found: list[Entry] = []
    known: set[str] = set()
    for entry in wanted:
        known.update((entry.name, *entry.copies))
        name = entry.name
        if name not in there and entry.instead is not None:
            # The table, the first entry, may itself be stored under another name, and then so is its stand-in.
            stands_in = found[0].name if found and entry.instead == wanted[0].name else entry.instead
            name = stands_in if stands_in in there else name
        if name not in there:
            where = source.where(name)
            raise UserError(f"{where}: tensor '{name}' is missing; the config and the weights do not belong together")
        known.add(name)
        found.append(entry._replace(name=name))
    for entry in found:
        for name in (entry.name, *(n for n in entry.copies if n in there)):
            if source.shape(name) != entry.shape:
                raise UserError(
                    f"{source.where(name)}: tensor '{name}' has shape {source.shape(name)}, expected {entry.shape};"
                    " the config and the weights do not belong together"
                )
    for name in source.names():
        if name not in known and not HARMLESS_TENSORS.fullmatch(name):
            raise UserError(
                f"{source.where(name)}: tensor '{name}' is not one that this model has; it would be silently ignored,"
                f" so take a checkpoint without it.{nearest(name, known)}"
            )
    return found


def leaves_of(wanted: list[Entry], scan_layers: bool) -> dict[Path, list[Entry]]:
    """Returns the entries that fill each leaf, in the order of layers."""
    leaves: dict[Path, list[Entry]] = {}
    for entry in wanted:
        path = tuple("layers" if _LAYER.fullmatch(part) else part for part in entry.path) if scan_layers else entry.path
        leaves.setdefault(path, []).append(entry)
    return leaves


def is_stacked(path: Path) -> bool:
    """Returns whether a leaf holds all layers, on a leading axis."""
    return "layers" in path


def _fill(entry: Entry, source: TensorSource, out: np.ndarray) -> None:
    """Reads `entry`'s part of its tensor into `out`, laid out as stored, with any strides, and checks its copies."""
    width = entry.shape[-1] // entry.part[1]
    first = entry.part[0] * width
    there = set(source.names()) if entry.copies else set()
    copies = [(name, iter(source.blocks(name))) for name in entry.copies if name in there and name != entry.name]
    for start, block in source.blocks(entry.name):
        for name, blocks in copies:
            if not _equal(block, start, blocks):
                raise UserError(
                    f"{source.where(name)}: tensor '{name}' differs from '{entry.name}', which the config ties to it;"
                    " correct 'tie_word_embeddings' in the config"
                )
        if block.ndim > 1:
            out[start : start + len(block)] = block[..., first : first + width]
        else:  # the blocks of a vector run along the axis that is cut
            low, high = max(start, first), min(start + len(block), first + width)
            if low < high:
                out[low - first : high - first] = block[low - start : high - start]


def _equal(block: np.ndarray, start: int, blocks: Iterator[tuple[int, np.ndarray]]) -> bool:
    other_start, other = next(blocks)
    return other_start == start and other.shape == block.shape and bool(np.all(other == block))


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an unfilled host array that jax on CPU takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    skip = -raw.ctypes.data % _ALIGN
    return raw[skip : skip + size].view(dtype).reshape(shape)


def place_on_default_device(path: Path, leaf: np.ndarray) -> Any:
    """Returns a finished leaf as a jax array on the default device."""
    import jax

    return jax.device_put(leaf)
