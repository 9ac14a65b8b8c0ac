"""What small networks of methods are made of: a linear layer and a norm, as pure functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deptjax.typing import Array, Float

NORM_EPS = 1e-5  # torch's LayerNorm


def dense(x: Float[Array, "*B I"], weight: Float[Array, "I O"], bias: Float[Array, "O"]) -> Float[Array, "*B O"]:
    """Returns `x @ weight + bias`.

    >>> dense(jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.ones(5)).shape
    (2, 5)
    """
    y = x @ weight
    return y + jnp.broadcast_to(bias, y.shape)


def layer_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """Returns `scale * (x - mean(x)) / sqrt(var(x) + 1e-5) + bias` over the last axis. Ba et al. 2016, 1607.06450."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)
