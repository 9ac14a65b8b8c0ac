"""Room for several methods of one kind: one shape of parameters that holds those of all of them.

Parameters that are stacked must have one shape. A prompt shorter than the others gets zeros in front, so that its
vectors still stand next to the text (the model is told how many are real); a low-rank factor of a smaller rank, or for
shorter texts, gets zeros behind, which add nothing; a scale that differs goes into the factor it multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deptjax.errors import UserError
from deptjax.methods.base import Method, method_fields
from deptjax.typing import Array, Tree


def kind_of(method: Method) -> tuple[Any, ...]:
    """Returns what methods must have in common to share a room: all but sizes, scales and where training starts."""
    loose = (*method.sizes, *method.free, *method.in_training)
    fixed = [name for name in method_fields(type(method)) if name not in loose]
    return (method.kind, *((name, method.stacked_by(name)) for name in fixed))


def room_for(methods: Sequence[Method]) -> Any:
    """Returns the smallest method that has room for the parameters of all `methods`, resolved ones of one kind.

    >>> from deptjax.methods import DePT
    >>> room = room_for([DePT(prompt_length=4, rank=7), DePT(prompt_length=9, rank=2)])
    >>> room.prompt_length, room.rank
    (9, 7)

    Raises `UserError` naming the field for methods that cannot be stacked.
    """
    first = methods[0]
    for method in methods[1:]:
        for ours, theirs in zip(kind_of(first), kind_of(method), strict=False):
            if ours != theirs:
                names = (
                    (ours, theirs) if isinstance(ours, str) else (f"{ours[0]} {ours[1]}", f"{theirs[0]} {theirs[1]}")
                )
                raise UserError(f"prompts of {names[0]} and of {names[1]} cannot be stacked; put them into two banks")
    first = next((method for method in methods if all(method.scales().values())), first)  # 0 cannot be divided by
    largest = {name: max(getattr(method, name) for method in methods) for name in first.sizes}
    fields = {name: getattr(first, name) for name in method_fields(type(first))}
    return type(first)(**{**fields, **largest})  # not by its kind: the frozen model's is not registered


def has_room(room: Method, method: Method) -> bool:
    """Returns whether the parameters of `method` fit into those of `room`."""
    fits = all(getattr(method, name) <= getattr(room, name) for name in room.sizes)
    fits = fits and (all(room.scales().values()) or not any(method.scales().values()))
    return fits and kind_of(room) == kind_of(method)


def move_in(method: Method, trainable: Tree, room: Method, shapes: Tree) -> Tree:
    """Returns parameters with which `room` computes what `method` computes with `trainable`.

    `shapes` is the room's own tree, of arrays or `ShapeDtypeStruct`; the leaves get its shapes.
    """
    own, new = method.scales(), room.scales()

    def moved(path: tuple[Any, ...], leaf: Array, like: Any) -> Array:
        name = path[-1].key
        leaf = jnp.asarray(leaf) * (own[name] / new[name] if own[name] else 0.0) if name in own else jnp.asarray(leaf)
        missing = [want - have for want, have in zip(like.shape, leaf.shape, strict=True)]
        front = leaf.ndim + room.in_front[name] if name in room.in_front else None
        return jnp.pad(leaf, [(gap, 0) if axis == front else (0, gap) for axis, gap in enumerate(missing)])

    return jax.tree_util.tree_map_with_path(moved, trainable, shapes)
