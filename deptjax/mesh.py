"""The shape of a mesh: read from a text, fitted to a number of devices, or chosen by the size of a model.

mesh_shape("data:2,fsdp:4", 8)      {"data": 2, "fsdp": 4, "model": 1}
mesh_shape("fsdp", 8)               {"data": 1, "fsdp": 8, "model": 1}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from deptjax.errors import UserError, nearest

DATA, FSDP, MODEL = AXES = ("data", "fsdp", "model")

MeshShape = dict[str, int]
Axes = tuple[str | None, ...]
Sizes = Mapping[str, int]
Rules = Mapping[str, tuple[str, ...]]

PRESETS: Mapping[str, tuple[str, ...]] = {
    "data": (DATA,),
    "fsdp": (FSDP,),
    "tensor": (MODEL,),
    "fsdp+tensor": (FSDP, MODEL),
}
"""The mesh axes over which a preset spreads all devices."""

# A device holds more than weights: activations, the compiler's temporaries. Up to this share, weights are held whole.
WHOLE_SHARE = 0.4


def mesh_shape(
    asked: str | Mapping[str, int] | None,
    devices: int,
    sizes: Sizes | None = None,
    rules: Rules | None = None,
    weight_bytes: int | None = None,
    device_bytes: int | None = None,
) -> MeshShape:
    """Returns the size of each axis of a mesh of so many devices.

    Args:
      asked: the sizes, as `data:2,fsdp:4` or a mapping; a name of `PRESETS`; `auto`; `None` for `data`.
      devices: how many there are; the mesh has them all.
      sizes: of the logical axes, which the mesh must divide.
      rules: which mesh axes each logical axis is split over.
      weight_bytes, device_bytes: of the whole model and of a device's memory; `auto` shards a model that needs it.

    Raises `UserError`, which proposes a mesh that fits.
    """
    sizes, rules = sizes or {}, rules or {}
    if asked is None:
        asked = "data"
    if asked == "auto":
        return _automatic(devices, sizes, rules, weight_bytes, device_bytes)
    if isinstance(asked, str) and asked in PRESETS:
        return _preset(asked, devices, sizes, rules)
    shape = _parsed(asked)
    if math.prod(shape.values()) != devices:
        raise UserError(
            f"mesh {shown(shape)} is of {math.prod(shape.values())} devices, and the number of devices is {devices}; "
            f"{_proposal(shape, devices, sizes, rules)}"
        )
    if told := _undivided(shape, sizes, rules):
        raise UserError(f"mesh {shown(shape)}: {told}; {_proposal(shape, devices, sizes, rules)}")
    return shape


def shown(shape: Mapping[str, int]) -> str:
    """Returns a mesh as it is written: `data:2,fsdp:4`.

    >>> shown({"data": 2, "fsdp": 4, "model": 1})
    'data:2,fsdp:4'
    """
    return ",".join(f"{axis}:{size}" for axis, size in shape.items() if size > 1) or "data:1"


def _parsed(asked: str | Mapping[str, int]) -> MeshShape:
    if isinstance(asked, str):
        pairs = [part.strip().partition(":") for part in asked.split(",")]
        given = {name.strip(): size.strip() for name, _, size in pairs}
        if len(given) < len(pairs):
            raise UserError(f"mesh '{asked}' names an axis twice; give each once")
    else:
        given = {name: str(size) for name, size in asked.items()}
    for name, size in given.items():
        if name not in AXES:
            known = [*AXES, *PRESETS, "auto"]
            raise UserError(
                f"mesh '{asked}': there is no axis or preset '{name}'; write sizes such as data:2,fsdp:4 (axes: "
                f"{', '.join(AXES)}), or one of {', '.join(PRESETS)}, auto.{nearest(name, known)}"
            )
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh '{asked}': the size of '{name}' is '{size}'; give a whole number, such as {name}:4")
    return {axis: int(given.get(axis, 1)) for axis in AXES}


def _undivided(shape: MeshShape, sizes: Sizes, rules: Rules) -> str | None:
    """Returns what the mesh does not divide, in words, or `None`."""
    for axis, size in sizes.items():
        parts = math.prod(shape[name] for name in rules.get(axis, ()))
        if size % parts:
            return f"the model's {axis} ({size}) does not divide into {parts}"
    return None


def _shapes(devices: int) -> Iterator[MeshShape]:
    """Yields every mesh of so many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp, model in itertools.product(divisors, divisors):
        if devices % (fsdp * model) == 0:
            yield {DATA: devices // (fsdp * model), FSDP: fsdp, MODEL: model}


def _proposal(asked: MeshShape, devices: int, sizes: Sizes, rules: Rules) -> str:
    """Returns the remedy: the mesh nearest to the one that was asked for, and the rule that would allow it."""

    def far(shape: Mapping[str, int]) -> float:
        return sum(abs(math.log(shape[axis] / asked[axis])) * weight for axis, weight in zip(AXES, (1, 1.1, 1.2)))

    fitting = [shape for shape in _shapes(devices) if not _undivided(shape, sizes, rules)]
    use = f"use {shown(min(fitting, key=far))}"
    split = [axis for axis in sizes if _undivided(asked, {axis: sizes[axis]}, rules)]
    return f"{use}, or the rule {split[0]}:none to leave that axis whole" if split else use


def _preset(name: str, devices: int, sizes: Sizes, rules: Rules) -> MeshShape:
    """Returns the mesh of a preset: all devices on its one axis, or the smallest `model` beside `fsdp`."""
    wanted = PRESETS[name]
    if len(wanted) == 1 or devices == 1:
        return mesh_shape({wanted[0]: devices}, devices, sizes, rules)
    fitting = [
        shape
        for shape in _shapes(devices)
        if shape[DATA] == 1 and shape[FSDP] > 1 and shape[MODEL] > 1 and not _undivided(shape, sizes, rules)
    ]
    if not fitting:
        asked = {DATA: 1, FSDP: devices, MODEL: 1}
        raise UserError(
            f"mesh '{name}': no sizes of fsdp and model make {devices} devices and divide the model; "
            f"{_proposal(asked, devices, sizes, rules)}"
        )
    return min(fitting, key=lambda shape: shape[MODEL])


def _automatic(
    devices: int, sizes: Sizes, rules: Rules, weight_bytes: int | None, device_bytes: int | None
) -> MeshShape:
    """Returns `data` alone where a device holds the model whole, else as little `fsdp` as makes it fit.

    The weights of a frozen model change never, so where they fit, a copy on each device costs no communication at all.
    """
    if weight_bytes is None or device_bytes is None:
        return {DATA: devices, FSDP: 1, MODEL: 1}
    fitting = [s for s in _shapes(devices) if s[MODEL] == 1 and not _undivided(s, sizes, rules)]
    fitting.sort(key=lambda shape: shape[FSDP])
    enough = (shape for shape in fitting if weight_bytes / shape[FSDP] <= WHOLE_SHARE * device_bytes)
    return next(enough, fitting[-1])
