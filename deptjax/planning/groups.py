"""Among which devices a collective runs, read from its HLO text, and over which axes of the mesh that is.

HLO writes groups of partitions in three ways: `{{0,1},{2,3}}`; as an iota, `[2,4]<=[4,2]T(1,0)`, the numbers 0 to 7 in
the shape (4, 2), transposed, cut into rows of four; and by the axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`, where
`'b':(2)2` is a part of an axis: of `b` as (2, 2) the second. The partitions may stand in that mesh in another order:
`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}` has 0 to 7 in the shape (2, 4), transposed.

A permutation has pairs, from one partition to another. Partition i is the i-th device of the mesh, in the order of
`mesh.devices.flat`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*(?:\{([^}]*)\})?"
)
_AXIS = re.compile(r"'([^']+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\})\}")


def group_of(text: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes along which the members of a collective's groups differ, and the size of a group.

    Of a permutation, the size is that of its axes together.

    Args:
      text: of the instruction, from its operands on.
      mesh: the size of each axis, in their order.

    >>> group_of("%a), replica_groups=[2,4]<=[8], to_apply=%add", {"data": 2, "fsdp": 4})
    (('fsdp',), 4)
    >>> group_of("%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}", {"data": 2, "fsdp": 4})
    (('data',), 2)
    """
    pairs = _PAIRS.search(text)
    groups = _lists(pairs[1]) if pairs else _groups(text, math.prod(mesh.values()))
    axes: set[str] = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), tuple(mesh.values())))
        axes |= {name for name, at in zip(mesh, places) if len(set(at.tolist())) > 1}
    size = math.prod(mesh[name] for name in axes) if pairs else max(len(group) for group in groups)
    return tuple(name for name in mesh if name in axes), size


def _groups(text: str, devices: int) -> list[list[int]]:
    iota = _IOTA.search(text)
    if iota:
        shape, sizes = _numbers(iota[1]), _numbers(iota[2])
        order = _numbers(iota[3]) if iota[3] else list(range(len(sizes)))
        found: list[list[int]] = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape).tolist()
        return found
    by_axes = _MESH.search(text)
    if by_axes:
        mesh, shape_of_ids, order_of_ids, chosen = by_axes.groups()
        places = _by_axes(mesh, chosen or "")
        if shape_of_ids is None:
            return places
        sizes = _numbers(shape_of_ids)
        order = _numbers(order_of_ids) if order_of_ids else list(range(len(sizes)))
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)
        return [ids[group].tolist() for group in places]
    lists = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    return _lists(lists[1]) if lists else [list(range(devices))]  # `{}` is all devices in one group


def _by_axes(mesh: str, chosen: str) -> list[list[int]]:
    """Returns the groups of `mesh['a'=2,'b'=4] {'b'}`; axes that are cut in parts are reshaped into these."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(mesh)}
    cuts: dict[str, tuple[int, int]] = {}  # name: (what stands before the part, the part)
    whole = set()
    for name, _, before, size in _AXIS.findall(chosen):
        if size:
            cuts[name] = (int(before), int(size))
        else:
            whole.add(name)
    shape: list[int] = []
    inside: list[int] = []
    outside: list[int] = []
    for name, size in sizes.items():
        before, part = cuts.get(name, (1, size if name in whole else 1))
        for length, is_in in ((before, False), (part, True), (size // before // part, False)):
            (inside if is_in else outside).append(len(shape))
            shape.append(length)
    numbers = np.arange(math.prod(shape)).reshape(shape).transpose(outside + inside)
    found: list[list[int]] = numbers.reshape(-1, math.prod(shape[i] for i in inside)).tolist()
    return found


def _lists(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text + "}")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
