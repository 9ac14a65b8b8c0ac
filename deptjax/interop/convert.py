"""Fills a parameter tree from a checkpoint, a block of rows at a time.

Every leaf is allocated once, in its final dtype and layout (stacked, where layers are scanned), and its tensors are
read into it a few megabytes at a time. So the peak of memory is the tree itself and a few blocks, whatever the dtype
on disk and however the layers are laid out. Where a mesh splits the model, a host allocates and fills the parts of a
leaf that its own devices hold, and never has the whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from deptjax.errors import UserError, nearest
from deptjax.interop.names import HARMLESS_TENSORS, Entry, Path, entries
from deptjax.interop.safetensors import TensorSource
from deptjax.quantization import quantize_host, scheme_of
from deptjax.sharding import Placement, backbone_axes
from deptjax.typing import Tree

DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_LAYER = re.compile(r"layers_(\d+)")
_ALIGN = 64  # jax on CPU takes over a host array without a copy when its first byte is so aligned

Index = tuple[slice, ...]


class Place(Protocol):
    """Where the leaves of a tree go."""

    def parts(self, path: Path, shape: tuple[int, ...]) -> list[Index]:
        """Returns which parts of a leaf this host needs, each a slice with start and stop for every axis."""

    def leaf(self, path: Path, shape: tuple[int, ...], parts: list[np.ndarray]) -> Any:
        """Returns what the tree holds, given these parts, filled."""


class DefaultDevice:
    """Leaves are jax arrays on the default device."""

    def parts(self, path: Path, shape: tuple[int, ...]) -> list[Index]:
        """Returns the whole."""
        return [tuple(slice(0, size) for size in shape)]

    def leaf(self, path: Path, shape: tuple[int, ...], parts: list[np.ndarray]) -> Any:
        """Returns the array."""
        import jax

        return jax.device_put(parts[0])


class Sharded:
    """Leaves are split over a mesh by its axis rules; each part is copied from the host to its devices alone."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def parts(self, path: Path, shape: tuple[int, ...]) -> list[Index]:
        """Returns the parts that the devices of this host hold, each once."""
        return [tuple(slice(*ends) for ends in part) for part in self._devices(path, shape)]

    def leaf(self, path: Path, shape: tuple[int, ...], parts: list[np.ndarray]) -> Any:
        """Returns the array of all hosts together."""
        import jax

        held = self._devices(path, shape).values()
        shards = [jax.device_put(part, device) for part, devices in zip(parts, held, strict=True) for device in devices]
        return jax.make_array_from_single_device_arrays(shape, self._sharding(path, shape), shards)

    def _sharding(self, path: Path, shape: tuple[int, ...]) -> Any:
        return self._placement.fitting(backbone_axes(path), shape)

    def _devices(self, path: Path, shape: tuple[int, ...]) -> dict[tuple[tuple[int, int], ...], list[Any]]:
        """Returns the devices of this host that hold each part, which is a start and an end on every axis."""
        held: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in self._sharding(path, shape).addressable_devices_indices_map(shape).items():
            ends = (part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
            held.setdefault(tuple(ends), []).append(device)
        return held


def fill_tree(
    config: Any,
    source: TensorSource,
    *,
    scan_layers: bool,
    dtype: str,
    quantize: str | None = None,
    place: Place | None = None,
) -> Tree:
    """Returns the parameter tree that `config` describes, filled from `source`.

    `place` is where the leaves go; by default they are jax arrays on the default device. With `quantize` each kernel is
    read whole, a layer at a time and in float32, and quantised before its parts are placed.

    Raises `UserError` for a tensor that is missing, unexpected or has another shape, before anything is read, and for
    two stored copies of a tied tensor that differ.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    wanted = _resolve(entries(config), source)
    place = place or DefaultDevice()
    tree: Tree = {}
    for path, group in leaves_of(wanted, scan_layers).items():
        stack = len(group) if is_stacked(path) else None
        scheme = scheme_of(path, quantize)
        if scheme is not None:
            kernels = (_whole(entry, source) for entry in group)
            put(tree, path, quantized_leaf(path, kernels, stack, scheme, place))
            continue
        leaf = Parts(place, path, group[0].leaf_shape, stack, DTYPES[dtype])
        for layer, entry in enumerate(group):
            _fill(entry, source, leaf.of_layer(layer))
        put(tree, path, leaf.placed())
    return tree


class Parts:
    """The parts of a leaf that this host needs: allocated, to be filled a layer at a time, then placed."""

    def __init__(self, place: Place, path: Path, shape: tuple[int, ...], stack: int | None, dtype: np.dtype) -> None:
        self._place, self._path, self._stacked = place, path, stack is not None
        self._shape = shape if stack is None else (stack, *shape)
        self._indices = place.parts(path, self._shape)
        self._arrays = [empty_aligned(tuple(s.stop - s.start for s in index), dtype) for index in self._indices]

    def of_layer(self, layer: int) -> list[tuple[Index, np.ndarray]]:
        """Returns the parts of a layer, each with its place in the layer's own array."""
        parts = zip(self._indices, self._arrays, strict=True)
        if not self._stacked:
            return list(parts)
        return [(k[1:], part[layer - k[0].start]) for k, part in parts if k[0].start <= layer < k[0].stop]

    def placed(self) -> Any:
        """Returns what the tree holds."""
        return self._place.leaf(self._path, self._shape, self._arrays)


def quantized_leaf(path: Path, kernels: Iterable[np.ndarray], stack: int | None, scheme: str, place: Place) -> Any:
    """Returns the node of a kernel, or of a `stack` of layers, given float32 kernels (I, O), taken one by one.

    A scale belongs to a whole column or tile, so each host quantises whole kernels, and keeps its parts of them.
    """
    leaves: dict[str, Parts] = {}
    for layer, kernel in enumerate(kernels):
        node = quantize_host(kernel, scheme)
        for name, values in (("qvalue", node.qvalue), ("scale", node.scale)):
            if name not in leaves:
                leaves[name] = Parts(place, (*path, name), values.shape, stack, values.dtype)
            for index, out in leaves[name].of_layer(layer):
                out[...] = values[index]
    return dataclasses.replace(node, **{name: leaf.placed() for name, leaf in leaves.items()})


def _whole(entry: Entry, source: TensorSource) -> np.ndarray:
    """Returns an entry's leaf in float32."""
    leaf = np.empty(entry.leaf_shape, np.float32)
    _fill(entry, source, [(tuple(slice(0, size) for size in leaf.shape), leaf)])
    return leaf


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
        if name not in there:
            # The table, the first entry, may itself be stored under another name, and then so is its stand-in.
            others = (found[0].name if found and other == wanted[0].name else other for other in entry.instead)
            name = next((other for other in others if other in there), name)
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


def _fill(entry: Entry, source: TensorSource, pieces: list[tuple[Index, np.ndarray]]) -> None:
    """Reads `entry`'s tensor into pieces of its leaf, each with the place that it has there, and checks its copies."""
    if not pieces:
        return
    stored = [_as_stored(entry, index, out) for index, out in pieces]
    wanted = min(index[0].start for index, _ in stored), max(index[0].stop for index, _ in stored)
    there = set(source.names()) if entry.copies else set()
    copies = [
        (name, iter(source.blocks(name, wanted))) for name in entry.copies if name in there and name != entry.name
    ]
    for start, block in source.blocks(entry.name, wanted):
        for name, blocks in copies:
            if not _equal(block, start, blocks):
                raise UserError(
                    f"{source.where(name)}: tensor '{name}' differs from '{entry.name}', which the config ties to it;"
                    " correct 'tie_word_embeddings' in the config"
                )
        for (rows, *within), out in stored:
            low, high = max(start, rows.start), min(start + len(block), rows.stop)
            if low < high:
                out[low - rows.start : high - rows.start] = block[low - start : high - start][:, *within]


def _as_stored(entry: Entry, index: Index, out: np.ndarray) -> tuple[Index, np.ndarray]:
    """Returns a piece of a leaf, and its place in the stored tensor, laid out as that is."""
    if entry.transpose:
        index, out = index[::-1], out.T
    first = entry.part[0] * (entry.shape[-1] // entry.part[1])
    return (*index[:-1], slice(index[-1].start + first, index[-1].stop + first)), out


def _equal(block: np.ndarray, start: int, blocks: Iterator[tuple[int, np.ndarray]]) -> bool:
    other_start, other = next(blocks)
    return other_start == start and other.shape == block.shape and bool(np.all(other == block))


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an unfilled host array that jax on CPU takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    skip = -raw.ctypes.data % _ALIGN
    return raw[skip : skip + size].view(dtype).reshape(shape)
