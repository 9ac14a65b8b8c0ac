"""Array annotations and the letters of the dimension key (ARCHITECTURE.md has the table)."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

Tree = Any  # a nested dict of arrays
Key = jax.Array  # a typed PRNG key, from `jax.random.key`
Tokens = Int[Array, "B T"]
Mask = Bool[Array, "B T"]
Embeds = Float[Array, "B T D"]

__all__ = ["Array", "Bool", "Embeds", "Float", "Int", "Key", "Mask", "Tokens", "Tree"]
