"""T5's relative positions: what a stack adds to its attention scores. Raffel et al. 2020 (arXiv 1910.10683)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deptjax.typing import Array, Float, Int


def relative_position_bucket(
    offsets: Int[Array, "*S"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "*S"]:
    """Returns the bucket of each offset (position of the key minus position of the query), int32.

    With n buckets for one direction (half of `num_buckets` when `bidirectional`, where keys ahead take the upper half;
    all of them otherwise, where keys ahead are at distance 0), distances below e = n / 2 have a bucket each, and
    distance d beyond has min(n - 1, e + floor(log(d / e) / log(max_distance / e) * (n - e))). Raffel et al. 2020,
    section 2.1.

    The logarithm is taken here, in numpy, once for each distance: on an accelerator its last bit would decide the
    bucket of distances such as 16 and 32.
    """
    count = num_buckets // 2 if bidirectional else num_buckets
    exact = count // 2
    far = np.arange(exact, max_distance + 1)
    steps = np.log(far / exact) / math.log(max_distance / exact) * (count - exact)
    # 1e-6 is far below the gap between an integer and any other value, and above the rounding of the logarithms.
    coarse = exact + np.floor(steps + 1e-6).astype(np.int32)
    of_distance = jnp.asarray(np.concatenate([np.arange(exact), np.minimum(coarse, count - 1)]), jnp.int32)
    distance = jnp.abs(offsets) if bidirectional else jnp.maximum(-offsets, 0)
    bucket = of_distance[jnp.minimum(distance, max_distance)]
    return bucket + jnp.where(offsets > 0, count, 0) if bidirectional else bucket


class RelativePositionBias(nn.Module):
    """What a stack adds to its attention scores: a learned number for each head and bucket of relative position."""

    num_heads: int
    buckets: int
    max_distance: int
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Float[Array, "1 N T S"]:
        """Returns the float32 bias for queries and keys at these positions."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param("rel_embedding", init, (self.num_heads, self.buckets))
        offsets = keys[None, :] - queries[:, None]
        chosen = relative_position_bucket(offsets, self.bidirectional, self.buckets, self.max_distance)
        # A product with one-hot rows and not a gather, whose gradient adds in an order that changes from run to run.
        one_hot = jax.nn.one_hot(chosen, self.buckets, dtype=jnp.float32)
        return jnp.einsum("nc,tsc->nts", table.astype(jnp.float32), one_hot, precision="highest")[None]
