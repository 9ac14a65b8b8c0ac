"""Rows of several kinds of methods in one batch.

All that a method of the input site does to a text is to change its embeddings and to put a prompt in front of them.
So each kind reads its own rows, with a program of its own, and what is left, nearly all of the work, is one program
over the whole batch: the backbone's, without any method. Prompts shorter than the longest of the batch get zeros in
front, which nothing attends to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.inference.rows import Rows, read_rows
from deptjax.methods.base import Method
from deptjax.typing import Array, Int, Tree


class Part(NamedTuple):
    """Rows of one kind: what their own model reads, and where they stand in the batch.

    Attributes:
      model: of their method.
      frozen: the backbone's parameters.
      rows: what they are tuned with.
      source: (N, T) int32; what follows the rows that count is filler.
      source_mask: (N, T) bool.
      places: the rows of the batch that they are, one for each that counts.
    """

    model: Any
    frozen: Tree
    rows: Rows
    source: Array
    source_mask: Array
    places: Sequence[int]


def can_mix(method: Method) -> bool:
    """Returns whether rows of `method` can stand beside those of other kinds: whether it acts at the input alone."""
    return not (method.sites().inner or method.tunes_backbone)


def mixed_rows(parts: Sequence[Part], size: int) -> Rows:
    """Returns the rows of a batch of `size` that is put together of `parts`, for a model without a method.

    Rows of the batch that are in no part are filler: zeros.
    """
    read = [_Read.of(part) for part in parts]
    batch = _empty(read, size)
    for part, own in zip(parts, read, strict=True):
        filler = [size] * (len(own.lengths) - len(part.places))  # there is no such row, so it is dropped
        batch = _placed(batch, own, jnp.asarray([*part.places, *filler], jnp.int32))
    front = None if batch.front is None else batch.front._replace(length=batch.lengths)
    return Rows({}, front, embeds=batch.embeds, apart=True)


class _Read(NamedTuple):
    """What rows are to the backbone.

    Attributes:
      embeds: (N, T, D), their texts.
      front: what their prompts are to them, each leaf (N, ..., M, H), its `length` left out; `None` without prompts.
      lengths: (N,) int32, how many vectors of each prompt are real, the last ones.
    """

    embeds: Array
    front: Any
    lengths: Array

    @classmethod
    def of(cls, part: Part) -> _Read:
        embeds, front = read_rows(part.model, part.frozen, part.rows, part.source, part.source_mask)
        count = embeds.shape[0]
        if front is None:
            return cls(embeds, None, jnp.zeros(count, jnp.int32))
        lengths, front = front.length, front._replace(length=None)
        return cls(embeds, front, jnp.full(count, _vectors(front), jnp.int32) if lengths is None else lengths)


def _vectors(front: Any) -> int:
    """Returns M, the vectors of the prompts, real or not."""
    return int(jax.tree.leaves(front)[0].shape[-2])


def _empty(read: Sequence[_Read], size: int) -> _Read:
    """Returns `size` rows of zeros, with room for the longest text and the longest prompt of those that are read."""
    length = max(own.embeds.shape[1] for own in read)
    _, _, width = read[0].embeds.shape
    embeds = jnp.zeros((size, length, width), read[0].embeds.dtype)
    fronts = [own.front for own in read if own.front is not None]
    vectors = max(map(_vectors, fronts), default=0)
    front = None
    if fronts:
        front = jax.tree.map(lambda a: jnp.zeros((size, *a.shape[1:-2], vectors, a.shape[-1]), a.dtype), fronts[0])
    return _Read(embeds, front, jnp.zeros(size, jnp.int32))


@functools.partial(jax.jit, donate_argnums=0)
def _placed(batch: _Read, own: _Read, places: Int[Array, "N"]) -> _Read:
    """Returns the batch with rows put at their places: texts get zeros behind, prompts get them in front."""

    def put(rows: Array, ours: Array, in_front: bool) -> Array:
        gap = rows.shape[-2] - ours.shape[-2]
        pad = [(0, 0)] * (ours.ndim - 2) + [(gap, 0) if in_front else (0, gap), (0, 0)]
        return rows.at[places].set(jnp.pad(ours, pad).astype(rows.dtype), mode="drop")

    front = batch.front
    if own.front is not None:
        front = jax.tree.map(functools.partial(put, in_front=True), front, own.front)
    return _Read(put(batch.embeds, own.embeds, False), front, batch.lengths.at[places].set(own.lengths, mode="drop"))
