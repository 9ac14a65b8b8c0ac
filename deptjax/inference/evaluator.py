"""Answers of a tuned model for prepared examples: the likeliest label, or generated text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.data.pipeline import eval_batches
from deptjax.data.preprocess import Example, Preprocessor
from deptjax.errors import UserError
from deptjax.inference.decode import greedy
from deptjax.inference.rows import Rows
from deptjax.inference.scoring import sequence_scores, token_scores
from deptjax.sharding import Placement
from deptjax.typing import Tree


@dataclasses.dataclass(frozen=True)
class Answer:
    """`text` is a label or generated text; `scores` the probability of each label, where labels were scored."""

    text: str
    scores: dict[str, float] | None = None


class Evaluator:
    """Runs a model over examples, a batch at a time, in order of length; answers come back in the examples' order.

    Args:
      model: a `PromptedModel`.
      preprocessor: of the model's task and tokenizer.
      mode: `labels` (the likeliest label), `generate` (greedy text), or `auto`: `labels` where the task has labels.
      batch_size: rows a batch.
      buckets: the source lengths that batches are padded to.
      placement: the devices; by default one.
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
    ) -> None:
        task = preprocessor.task
        if mode == "labels" and not task.labels:
            raise UserError(f"evaluation 'labels' needs labels, and task '{task.name}' has none; use 'generate'")
        self._model, self._preprocessor, self._placement = model, preprocessor, placement
        self._batch_size, self._buckets = batch_size, tuple(buckets)
        self._scores = self._scorer() if mode == "labels" or (mode == "auto" and task.labels) else None

    def _scorer(self) -> Callable[..., Any]:
        pre, model = self._preprocessor, self._model
        if pre.labels_are_tokens():
            tokens = jnp.asarray(pre.label_tokens())
            return lambda *args: token_scores(model, *args, tokens, jnp.ones(tokens.shape, bool))
        sequences, mask = (jnp.asarray(a) for a in pre.label_sequences())
        return lambda *args: jax.nn.log_softmax(sequence_scores(model, *args, sequences, mask))

    def answers(
        self,
        trainable: Tree,
        frozen: Tree,
        examples: Sequence[Example],
        on_rows: Callable[[int], object] = lambda rows: None,
    ) -> list[Answer]:
        """Returns one answer an example. `on_rows(n)` is called after each batch with the number of its rows."""
        answers: list[Answer | None] = [None] * len(examples)
        rows = Rows.shared(self._model, trainable, frozen)
        for indices, batch in eval_batches(examples, batch_size=self._batch_size, buckets=self._buckets):
            put = self._placement.put_batch if self._placement else lambda b: {k: jnp.asarray(v) for k, v in b.items()}
            placed = put({name: batch[name] for name in ("source", "source_mask")})
            inputs = (frozen, rows, placed["source"], placed["source_mask"])
            for index, answer in zip(indices, self._batch_answers(inputs), strict=False):
                answers[index] = answer
            on_rows(len(indices))
        return [answer for answer in answers if answer is not None]

    def _batch_answers(self, inputs: tuple[Any, ...]) -> list[Answer]:
        task, tokenizer = self._preprocessor.task, self._preprocessor.tokenizer
        if self._scores is not None:
            probabilities = np.exp(np.asarray(self._scores(*inputs)))
            labels = task.labels or ()
            return [
                Answer(labels[int(row.argmax())], dict(zip(labels, map(float, row), strict=True)))
                for row in probabilities
            ]
        eos = tokenizer.eos_token_id
        pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        length = self._preprocessor.max_target_length
        tokens = np.asarray(greedy(self._model, *inputs, max_new=length, eos_id=eos, pad_id=pad))
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(task.label_from_text(text)) for text in texts]
