"""The state of a run: all that changes from step to step, and nothing that does not."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from deptjax.methods.base import FIXED
from deptjax.typing import Array, Key, Tree


class TrainState(NamedTuple):
    """Step count (int32 scalar), the method's parameters, the optimiser's state, and the run's key.

    The frozen tree is not part of it: it is an argument of the step, never returned and never saved. The randomness
    of step n is `fold_in(key, n)`, so a resumed run draws what an unbroken one would have drawn.
    """

    step: Array
    trainable: Tree
    opt_state: optax.OptState
    key: Key

    @classmethod
    def create(cls, trainable: Tree, tx: optax.GradientTransformation, key: Key) -> TrainState:
        """Returns the state before the first step."""
        return cls(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), key)


def count_parameters(tree: Tree) -> int:
    """Returns the number of scalars in a tree.

    >>> count_parameters({"a": jnp.zeros((2, 3)), "b": jnp.zeros(5)})
    11
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_trained(trainable: Tree, groups: Tree) -> int:
    """Returns the number of scalars that are trained: those of a method's fixed group are not.

    >>> count_trained({"prompt": jnp.zeros(5), "sources": jnp.zeros(9)}, {"prompt": "prompt", "sources": FIXED})
    5
    """
    counted = jax.tree.map(lambda leaf, group: 0 if group == FIXED else leaf.size, trainable, groups)
    return sum(jax.tree.leaves(counted))
