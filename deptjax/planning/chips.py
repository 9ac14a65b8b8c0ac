"""What a chip can do: peaks of accelerators as their makers publish them, or as measured on the machine at hand.

All figures are for one chip, dense (no sparsity), and decimal but for memory. `interconnect` is what one chip can send
at once over all of its links, in one direction; makers often quote both directions together, twice that.

| chip | source |
|---|---|
| v4 | Jouppi et al. 2023, arXiv 2304.01433, table 4 (275 TFLOP/s, 32 GiB, 1200 GB/s, 6 links of 50 GB/s) |
| v5e | cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 394 int8, 16 GB, 819 GB/s, 400 GB/s both directions) |
| v5p | cloud.google.com/tpu/docs/v5p (459 TFLOP/s, 918 int8, 95 GB, 2765 GB/s, 1200 GB/s both directions) |
| v6e | cloud.google.com/tpu/docs/v6e (918 TFLOP/s, 1836 int8, 32 GB, 1640 GB/s, 800 GB/s both directions) |
| A100 | NVIDIA A100 80GB SXM data sheet (312 TFLOP/s, TF32 156, int8 624, 2039 GB/s, NVLink 600 GB/s both directions) |
| H100 | NVIDIA H100 SXM data sheet (989 TFLOP/s, TF32 494.7, int8 1979, 80 GB, 3.35 TB/s, NVLink 900 GB/s both) |
| H200 | NVIDIA H200 SXM data sheet (as H100, with 141 GB at 4.8 TB/s) |

A product of float32 arrays, at jax's default precision, is one pass of bfloat16 on a TPU, and TF32 on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's peaks.

    Attributes:
      name: as in `CHIPS`, or the device's own.
      memory_bytes: main memory.
      flops: peak FLOP/s of products, by HLO's name of the dtype multiplied.
      bandwidth: of main memory, bytes/s.
      interconnect: bytes/s that one chip can send to others; `None` where that is not known.
      measured: whether the figures were measured on this machine, and are not the maker's.
    """

    name: str
    memory_bytes: float
    flops: Mapping[str, float]
    bandwidth: float
    interconnect: float | None
    measured: bool = False

    def peak(self, dtype: str) -> float:
        """Returns the peak FLOP/s for a dtype; one that has no figure of its own has float32's."""
        return self.flops.get("bf16" if dtype == "f16" else dtype, self.flops["f32"])


def _tpu(name: str, memory: float, bf16: float, int8: float, bandwidth: float, interconnect: float) -> Chip:
    return Chip(name, memory * GIB, {"bf16": bf16, "f32": bf16, "s8": int8, "u8": int8}, bandwidth, interconnect)


def _gpu(name: str, memory: float, bf16: float, tf32: float, int8: float, bandwidth: float, nvlink: float) -> Chip:
    return Chip(name, memory, {"bf16": bf16, "f32": tf32, "s8": int8, "u8": int8}, bandwidth, nvlink)


CHIPS: dict[str, Chip] = {
    "v4": _tpu("v4", 32, 275e12, 275e12, 1200e9, 300e9),
    "v5e": _tpu("v5e", 16, 197e12, 394e12, 819e9, 200e9),
    "v5p": _tpu("v5p", 95, 459e12, 918e12, 2765e9, 600e9),
    "v6e": _tpu("v6e", 32, 918e12, 1836e12, 1640e9, 400e9),
    "a100": _gpu("a100", 80e9, 312e12, 156e12, 624e12, 2039e9, 300e9),
    "h100": _gpu("h100", 80e9, 989e12, 494.7e12, 1979e12, 3350e9, 450e9),
    "h200": _gpu("h200", 141e9, 989e12, 494.7e12, 1979e12, 4800e9, 450e9),
}


def measure(devices: list[Any] | None = None) -> Chip:
    """Returns what the devices at hand do: products, memory and, where there are several, sending to one another.

    Takes a few seconds. The virtual devices of one CPU share its cores and its memory, so each has its part of them.
    """
    devices = jax.devices() if devices is None else devices
    device = devices[0]
    share = len(devices) if device.platform == "cpu" else 1
    size = 2048 if device.platform == "cpu" else 8192
    flops = {
        name: _product_rate(device, size, dtype) / share for name, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
    }
    return Chip(
        name=device.device_kind,
        memory_bytes=_memory(device) / share,
        flops=flops,
        bandwidth=_copy_rate(device) / share,
        interconnect=_send_rate(devices) if len(devices) > 1 else None,
        measured=True,
    )


def _product_rate(device: Any, size: int, dtype: str) -> float:
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    return 2.0 * size**3 / _seconds(jax.jit(lambda x: x @ x), a)


def _copy_rate(device: Any) -> float:
    """Returns bytes/s of reading an array and writing another, both larger than any cache."""
    a = jax.device_put(jnp.ones((64 << 20,), jnp.float32), device)
    return 2.0 * a.nbytes / _seconds(jax.jit(lambda x: x + 1), a)


def _send_rate(devices: list[Any]) -> float:
    """Returns bytes/s that each device sends while all of them gather an array."""
    mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    a = jax.device_put(jnp.ones((len(devices), 4 << 20), jnp.float32), rows)
    sent = a.nbytes / len(devices) * (len(devices) - 1)
    return sent / _seconds(jax.jit(lambda x: x, out_shardings=whole), a)


def _seconds(program: Callable[[Any], Any], argument: Any) -> float:
    """Returns the least of several timings: what the machine can do when nothing else takes a part of it."""
    jax.block_until_ready(program(argument))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(program(argument))
        best = min(best, time.perf_counter() - start)
    return best


def _memory(device: Any) -> float:
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
