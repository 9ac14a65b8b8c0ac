"""A slice of TPUs that is described and not there: devices to compile for, of `libtpu` alone, on any Linux machine."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any

from deptjax.errors import UserError, nearest
from deptjax.planning.chips import CHIPS

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # of the torus; v5e and v6e come in the sizes of _FLAT alone
# What libtpu would ask the metadata server of a cloud machine for. Answered here, it asks nobody and prints nothing;
# which accelerator is named does not matter, since the topology says what is compiled for.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so several processes may compile at once
}


def tpu_devices(name: str) -> tuple[str, list[Any]]:
    """Returns the chip's name in `CHIPS` and the devices of a slice, one a chip, such as the 16 of `v5e:4x4`.

    To be called before jax has looked for devices: after it, this process has no others than CPUs.

    Raises `UserError` for a slice that does not exist, with the nearest, and where libtpu is not installed.
    """
    chip, sizes = _parsed(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name}: the compiler for TPUs is not installed; it comes with pip install 'deptjax[tpu]'"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import jax

    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, jax would look for TPUs on this machine
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": [1 if size % 2 else 2 for size in sizes[:2]] + [1]}
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device, as cloud machines have them
    try:
        return chip, list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        told = str(error).splitlines()[0]
        raise UserError(f"--topology {name}: libtpu does not know it ({told})") from None


def _parsed(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns the chip and the sizes of `v5e:4x4`."""
    chip, _, told = name.partition(":")
    if chip not in _DIMENSIONS:
        known = ", ".join(_DIMENSIONS)
        raise UserError(f"topology '{name}' is of no known chip; there are {known}.{nearest(chip, _DIMENSIONS)}")
    wanted = _DIMENSIONS[chip]
    example = "4x4" if wanted == 2 else "4x4x4"
    if not re.fullmatch(r"\d+(x\d+)*", told) or told.count("x") != wanted - 1:
        raise UserError(f"topology '{name}' does not say {wanted} sizes; write {chip}:{example}, say")
    sizes = tuple(int(size) for size in told.split("x"))
    if wanted == 2 and sizes not in _FLAT:
        near = min(_FLAT, key=lambda known: (abs(math.log(max(math.prod(sizes), 0.5) / math.prod(known))), known))
        slices = ", ".join(f"{a}x{b}" for a, b in _FLAT)
        raise UserError(
            f"topology '{name}' does not exist; {chip} comes as {slices}. Did you mean '{chip}:{near[0]}x{near[1]}'?"
        )
    if wanted == 3 and any(size not in (1, 2) and (size == 0 or size % 4) for size in sizes):
        whole = "x".join(str(size if size in (1, 2) else max(4, round(size / 4) * 4)) for size in sizes)
        raise UserError(
            f"topology '{name}' does not exist; {chip} has sizes of 1, 2 and multiples of 4. "
            f"Did you mean '{chip}:{whole}'?"
        )
    return chip, sizes


assert set(_DIMENSIONS) <= set(CHIPS)  # a slice is of a chip whose peaks are known
