"""A batch as rows: the model runs one text, and a batch is that, mapped over its rows.

Rows may share the tuned parameters, or each have their own: a row of a batch then belongs to a task of its own. XLA
sees one program over the whole batch either way: products with frozen weights are one matrix product over all rows,
and what all rows share (a prompt of the one task of a batch) is computed once.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax

from deptjax.models import attention
from deptjax.models.fused_attention import MAPPED
from deptjax.typing import Array, Bool, Float, Int, Tree


@flax.struct.dataclass
class Rows:
    """What the rows of a batch are tuned with.

    Attributes:
      trainable: the method's parameters.
      front: what their prompt is to the text behind it, from `PromptedModel.front`; `None` where there is no prompt,
        or one that depends on the text.
      encoding: (B, H), what the method's encoder makes of each row's text; `None` for a method without one.
      embeds: (B, T, D), the texts as rows of several methods have read them (`deptjax.inference.mixed`); the model is
        then one without a method. `None` where the model reads them itself.
      apart: whether the leaves of both have a leading axis B, a row of it for each row of the batch.
    """

    trainable: Tree
    front: Any = None
    encoding: Array | None = None
    embeds: Array | None = None
    apart: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def shared(cls, model: Any, trainable: Tree, frozen: Tree) -> Rows:
        """Returns what all rows of a batch share; their prompt's front is computed once."""
        return cls(trainable, front_of(model, trainable, frozen))

    def axes(self) -> tuple[int | None, int | None]:
        """Returns the axes over which `trainable` and `front` are mapped."""
        return (0, _mapped(self.front)) if self.apart else (None, None)


@functools.partial(jax.jit, static_argnums=0)
def front_of(model: Any, trainable: Tree, frozen: Tree, length: Int[Array, ""] | None = None) -> Any:
    """Returns `PromptedModel.front`, compiled."""
    return model.front(trainable, frozen, length)


def start_rows(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Int[Array, "B T"],
    source_mask: Bool[Array, "B T"],
    max_new: int,
    beams: int = 1,
    vocab_ids: Int[Array, "*B C"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """Returns float32 logits of each row's first new token, and the cache, every leaf with a leading axis B.

    The logits are over the vocabulary, or over `vocab_ids`: (C,) for all rows, or (B, C). The cache has room for
    `max_new` tokens a beam.
    """

    def start(
        trainable: Tree, front: Any, source: Array, mask: Array, vocab_ids: Any, encoding: Any, embeds: Any
    ) -> Any:
        return model.start(trainable, frozen, front, source, mask, max_new, beams, vocab_ids, encoding, embeds)

    own = None if vocab_ids is None or vocab_ids.ndim == 1 else 0
    in_axes = (*rows.axes(), 0, 0, own, _mapped(rows.encoding), _mapped(rows.embeds))
    mapped = jax.vmap(start, in_axes, axis_name=MAPPED)
    return mapped(rows.trainable, rows.front, source, source_mask, vocab_ids, rows.encoding, rows.embeds)


@functools.partial(jax.jit, static_argnums=0)
def read_rows(
    model: Any, frozen: Tree, rows: Rows, source: Int[Array, "B T"], source_mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Any]:
    """Returns `PromptedModel.read` of each row: its embeddings, and what its prompt is to them."""

    def read(trainable: Tree, front: Any, source: Array, mask: Array, encoding: Any) -> Any:
        return model.read(trainable, frozen, front, source, mask, encoding)

    in_axes = (*rows.axes(), 0, 0, _mapped(rows.encoding))
    return jax.vmap(read, in_axes, axis_name=MAPPED)(rows.trainable, rows.front, source, source_mask, rows.encoding)


def extend_rows(
    model: Any, frozen: Tree, rows: Rows, cache: Any, tokens: Int[Array, "B K U"], t: Array | int
) -> tuple[Float[Array, "B K U V"], Any]:
    """Returns float32 logits behind each new token of each beam, and the cache with them, written from step `t` on."""

    def extend(trainable: Tree, front: Any, cache: Any, tokens: Array) -> Any:
        return model.extend(trainable, frozen, front, cache, tokens, t)

    return jax.vmap(extend, (*rows.axes(), 0, 0), axis_name=MAPPED)(rows.trainable, rows.front, cache, tokens)


def select_beams(cache: Any, parents: Int[Array, "B K"]) -> Any:
    """Returns the cache with beam k of each row going on from what its beam `parents[k]` has written."""

    def select(cache: Any, parents: Array) -> Any:
        return cache._replace(backbone=attention.select_beams(cache.backbone, parents))

    return jax.vmap(select)(cache, parents)


def _mapped(array: Array | None) -> int | None:
    """Returns the axis of rows of an array that may be missing."""
    return None if array is None else 0
