"""From a batch to answers: a task's `Reader` knows how its answers are read, `answer_batch` runs a batch of any tasks.

Where a task has labels, the likeliest of them is the answer; else text is generated. Both are done for all rows of a
batch at once, whatever task each belongs to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from deptjax.data.forms import WRITES_NO_TEXT
from deptjax.data.preprocess import Preprocessor
from deptjax.data.tasks import Task
from deptjax.errors import UserError
from deptjax.inference.controls import EOS, STOP, Decoded
from deptjax.inference.decoding import Decoding
from deptjax.inference.generate import generate
from deptjax.inference.rows import Rows
from deptjax.inference.scoring import sequence_scores, token_scores
from deptjax.inference.stop import cut_at_stop
from deptjax.sharding import to_host
from deptjax.typing import Array, Tree

MODES = ("auto", "labels", "generate")


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated text.

    Attributes:
      text: without what follows a stop string, and without that string.
      tokens: their ids, the end token included.
      log_probs: of each token, under the model's own distribution, in nats.
      score: what candidates are ranked by: the sum of `log_probs`; of a beam, divided by `length ** length_penalty`.
      ended: why the text ends: `eos`, `stop` (a stop string) or `length`.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    ended: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answers to one text.

    Attributes:
      text: a label, or generated text.
      scores: the probability of each label, where labels were scored.
      candidates: the generated texts, best first, where text was generated.
    """

    text: str
    scores: dict[str, float] | None = None
    candidates: tuple[Generation, ...] = ()

    @property
    def has_numbers(self) -> bool:
        """Whether the model computed numbers, and not NaN, which has no likeliest answer."""
        scores = [*(self.scores or {}).values(), *(x for one in self.candidates for x in (one.score, *one.log_probs))]
        return not any(map(math.isnan, scores))


def check_mode(preprocessor: Preprocessor, mode: str) -> None:
    """Raises `UserError` for the mode `generate` where the backbone writes no text."""
    if mode == "generate" and preprocessor.fills_mask:
        raise UserError(f"evaluation 'generate': {WRITES_NO_TEXT}; use 'labels', or another backbone")


class Reader:
    """How the answers of one task are read.

    Args:
      preprocessor: of the task and the backbone's tokenizer.
      mode: `labels` (the likeliest label), `generate`, or `auto`: `labels` where the task has labels.

    Attributes:
      preprocessor: as given.
      kind: `token` (labels that are one token each), `sequence` (other labels) or `text`.
      sequences: (C, U) int32, the tokens of each label, `mask` (C, U) bool those that are real; of no label for `text`.
    """

    def __init__(self, preprocessor: Preprocessor, mode: str = "auto") -> None:
        check_mode(preprocessor, mode)
        task = preprocessor.task
        if mode == "labels" and not task.labels:
            raise UserError(f"evaluation 'labels' needs labels, and task '{task.name}' has none; use 'generate'")
        self.preprocessor = preprocessor
        self.sequences, self.mask = np.zeros((0, 0), np.int32), np.zeros((0, 0), bool)
        if mode == "generate" or not task.labels:
            self.kind = "text"
        elif preprocessor.labels_are_tokens():
            self.kind = "token"
            self.sequences = preprocessor.label_tokens()[:, None]
            self.mask = np.ones(self.sequences.shape, bool)
        else:
            self.kind = "sequence"
            self.sequences, self.mask = preprocessor.label_sequences()

    @property
    def task(self) -> Task:
        """The task whose answers are read."""
        return self.preprocessor.task

    def answer_of_scores(self, log_probs: np.ndarray) -> Answer:
        """Returns the likeliest label, given the log-probability of each (C or more,); it is normalised here."""
        labels = self.task.labels or ()
        wide = log_probs[: len(labels)].astype(np.float64)
        shares = np.exp(wide - wide.max())
        shares /= shares.sum()
        return Answer(labels[int(shares.argmax())], dict(zip(labels, map(float, shares), strict=True)))

    def answer_of_texts(self, candidates: Sequence[Generation]) -> Answer:
        """Returns what the best candidate says, as a label where it is one."""
        return Answer(self.task.label_from_text(candidates[0].text), None, tuple(candidates))


def padded_labels(readers: Sequence[Reader], shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the label sequences of each row, (B, C, U) int32, and their mask, padded to `shape` or the largest."""
    count, length = shape or tuple(max(reader.sequences.shape[axis] for reader in readers) for axis in (0, 1))
    ids, mask = np.zeros((len(readers), count, length), np.int32), np.zeros((len(readers), count, length), bool)
    for row, reader in enumerate(readers):
        c, u = reader.sequences.shape
        ids[row, :c, :u], mask[row, :c, :u] = reader.sequences, reader.mask
    return ids, mask


def answer_batch(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Array,
    source_mask: Array,
    readers: Sequence[Reader],
    *,
    label_shape: tuple[int, int] | None = None,
    decoding: Decoding | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """Returns the answers of the first rows of a batch, one for each of `readers`; what follows them is filler.

    Args:
      model: a `PromptedModel`.
      frozen: the backbone's parameters.
      rows: what the rows are tuned with.
      source: (B, T) int32.
      source_mask: (B, T) bool.
      readers: of the rows that count, all of one kind.
      label_shape: (C, U) to which label sequences are padded, so that batches of other tasks have the same shapes.
      decoding: for texts; by default greedy, as long as the task's longest target.
      numbers: each row's own number, for sampling.
    """
    kind, count = readers[0].kind, len(readers)
    filler = source.shape[0] - count
    if kind == "text":
        own = [
            reader.preprocessor.max_target_length if decoding is None else decoding.max_new_tokens for reader in readers
        ]
        settings = decoding or Decoding(max_new_tokens=max(own))
        tokenizer = readers[0].preprocessor.tokenizer
        decoded = generate(
            model,
            frozen,
            rows,
            source,
            source_mask,
            settings,
            tokenizer,
            limits=own + [0] * filler,
            numbers=[*(numbers if numbers is not None else range(count)), *[0] * filler],
        )
        texts = generations(decoded, tokenizer, settings)
        return [reader.answer_of_texts(candidates) for reader, candidates in zip(readers, texts, strict=False)]
    ids, mask = padded_labels([*readers, *[readers[-1]] * filler], label_shape)
    if not rows.apart and len(set(readers)) == 1:  # one task: the head then has one set of labels and not one a row
        ids, mask = ids[0], mask[0]
    inputs = (model, frozen, rows, source, source_mask)
    if kind == "token":
        scores = token_scores(*inputs, jnp.asarray(ids[..., 0]), jnp.asarray(mask[..., 0]))
    else:
        scores = sequence_scores(*inputs, jnp.asarray(ids), jnp.asarray(mask))
    return [reader.answer_of_scores(row) for reader, row in zip(readers, to_host(scores), strict=False)]


def generations(decoded: Decoded, tokenizer: Any, decoding: Decoding) -> list[list[Generation]]:
    """Returns the texts of each row of `decoded`, best first."""
    tokens, lengths, log_probs, scores, ended = (leaf for leaf in to_host(decoded))
    if not decoding.is_beam_search:  # independent samples come as they were drawn
        order = np.argsort(-scores, axis=1, kind="stable")
    else:
        order = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    # Tidying spaces in front of punctuation, as T5's tokenizer does, could hide the stop string that was found.
    as_written = {"clean_up_tokenization_spaces": False} if decoding.stop else {}
    result = []
    for row, ranks in enumerate(order):
        kept = [tokens[row, n, : lengths[row, n]].tolist() for n in ranks]
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True, **as_written) if kept else []
        result.append(
            [
                Generation(
                    text=cut_at_stop(text, decoding.stop),
                    tokens=tuple(ids),
                    log_probs=tuple(map(float, log_probs[row, n, : lengths[row, n]])),
                    score=float(scores[row, n]),
                    ended={EOS: "eos", STOP: "stop"}.get(int(ended[row, n]), "length"),
                )
                for n, ids, text in zip(ranks, kept, texts, strict=True)
            ]
        )
    return result
