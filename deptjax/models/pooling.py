"""From the states of a text's tokens to one vector of the text.

| pooling  | the vector                                                        |
|----------|-------------------------------------------------------------------|
| `first`  | the state of the first token: BERT's `[CLS]`, RoBERTa's `<s>`      |
| `mean`   | the mean of the states of all tokens, special ones included       |
| `last`   | the state of the last token: what a causal model knows of a text  |
| `pooled` | `tanh(dense(first))`, for a BERT that has this layer (`Bert.pool`) |

Devlin et al. 2019 (arXiv 1810.04805) for `first` and `pooled`; Reimers and Gurevych 2019 (arXiv 1908.10084) for `mean`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.methods.base import POOLINGS
from deptjax.typing import Array, Bool, Float


class SentencePooling(NamedTuple):
    """How a checkpoint's own files say that a text's vector is made.

    Attributes:
      pooling: one of `POOLINGS`, or the name of what is not implemented.
      normalize: whether vectors are scaled to length 1.
    """

    pooling: str
    normalize: bool


def check_pooling(pooling: str) -> None:
    """Raises `UserError` for a pooling that is not one of `POOLINGS`."""
    if pooling not in POOLINGS:
        known, hint = ", ".join(POOLINGS), nearest(pooling, POOLINGS)
        raise UserError(f"pooling '{pooling}' is not known; use one of: {known}.{hint}")


def pool(states: Float[Array, "B T D"], mask: Bool[Array, "B T"], pooling: str) -> Float[Array, "B D"]:
    """Returns the vector of each text, by `first`, `mean` (a sum in float32) or `last`; of an empty one, zeros by mean.

    Where `mask` is false there is padding, on either side. Raises `UserError` for another pooling: `pooled` is a layer
    of a model, which that model has to compute.
    """
    if pooling == "mean":
        counts = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        total = jnp.sum(jnp.where(mask[..., None], states, 0), axis=1, dtype=jnp.float32)
        return (total / counts).astype(states.dtype)
    if pooling not in ("first", "last"):
        check_pooling(pooling)
        raise UserError(f"pooling '{pooling}' needs a layer that this model does not have; use first, mean or last")
    length = mask.shape[1]
    place = jnp.argmax(mask, axis=1) if pooling == "first" else length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(states, place[:, None, None], axis=1)[:, 0]


def l2_normalized(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the vectors divided by their lengths, computed in float32; one shorter than 1e-12 is divided by that."""
    squares = jnp.sum(jnp.square(vectors.astype(jnp.float32)), axis=-1, keepdims=True)
    return (vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(vectors.dtype)
