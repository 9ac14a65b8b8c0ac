"""`Evaluator`: the answers of a model that is being tuned, for the prepared examples of its task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.data.pipeline import eval_batches
from deptjax.data.preprocess import Example, Preprocessor
from deptjax.inference.answers import Answer, Reader, answer_batch
from deptjax.inference.rows import Rows
from deptjax.inference.text_encoder import TextEncoder
from deptjax.methods.base import ENCODER
from deptjax.methods.encoded import without_encoder
from deptjax.sharding import Placement, put_leaf
from deptjax.typing import Tree


class Evaluator:
    """Runs a model over examples, a batch at a time, in order of length; answers come back in the examples' order.

    Args:
      model: a `PromptedModel`.
      preprocessor: of the model's task and tokenizer.
      mode: see `Reader`.
      batch_size: rows a batch.
      buckets: the source lengths that batches are padded to.
      placement: the devices; by default one.
      encoder: what reads the texts, for a method with an encoder.
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Preprocessor,
        *,
        mode: str = "auto",
        batch_size: int = 32,
        buckets: Sequence[int],
        placement: Placement | None = None,
        encoder: TextEncoder | None = None,
    ) -> None:
        self._model, self._placement, self._encoder = model, placement, encoder
        self._reader = Reader(preprocessor, mode)
        self._batch_size, self._buckets = batch_size, tuple(buckets)

    def answers(
        self,
        trainable: Tree,
        frozen: Tree,
        examples: Sequence[Example],
        on_rows: Callable[[int], object] = lambda rows: None,
    ) -> list[Answer]:
        """Returns one answer an example. `on_rows(n)` is called after each batch with the number of its rows."""
        answers: list[Answer | None] = [None] * len(examples)
        weights = trainable.get(ENCODER)
        rows = Rows.shared(self._model, without_encoder(trainable), frozen)
        for indices, batch in eval_batches(examples, batch_size=self._batch_size, buckets=self._buckets):
            if self._encoder is not None:
                batch = self._encoder.of_batch(batch, weights)
            placed = self._put({name: batch[name] for name in ("source", "source_mask", "encoding") if name in batch})
            rows = dataclasses.replace(rows, encoding=placed.get("encoding"))
            readers = [self._reader] * len(indices)
            found = answer_batch(self._model, frozen, rows, placed["source"], placed["source_mask"], readers)
            for index, answer in zip(indices, found, strict=True):
                answers[index] = answer
            on_rows(len(indices))
        return [answer for answer in answers if answer is not None]

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns a batch, which every host has whole, on the devices."""
        if self._placement is None:
            return {name: jnp.asarray(rows) for name, rows in batch.items()}
        divides = self._batch_size % self._placement.row_parts == 0
        sharding = self._placement.rows if divides else self._placement.replicated
        return {name: put_leaf(rows, sharding) for name, rows in batch.items()}
