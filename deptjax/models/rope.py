"""The rotary embedding: queries and keys are turned by angles that grow with their position.

Su et al. 2021 (arXiv 2104.09864); the rule for a longer context is that of Llama 3.1 (Grattafiori et al. 2024, arXiv
2407.21783).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from deptjax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context.

    `linear` divides all of them by `factor`; `llama3` divides the slow ones, keeps the fast ones, and blends between
    (the rule of Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def rope_frequencies(config: Any) -> Float[Array, "half"]:
    """Returns the rotary frequencies in radians a position, (H / 2,), with the scaling of a `LlamaConfig`."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths  # of a frequency within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def rope_angles(positions: Int[Array, "*B T"], frequencies: Float[Array, "half"]) -> tuple[Array, Array]:
    """Returns cos and sin of the rotary angles, each (..., T, 1, H / 2): the same for every head."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.expand_dims(
        frequencies, tuple(range(positions.ndim + 1))
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "*B T N H"], rope: tuple[Array, Array]) -> Float[Array, "*B T N H"]:
    """Returns queries or keys turned by their position; dimension i pairs with i + H / 2."""
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    cos, sin = (jnp.broadcast_to(a.reshape((1,) * (x.ndim - a.ndim) + a.shape), shape).astype(x.dtype) for a in rope)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
