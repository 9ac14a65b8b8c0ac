"""From rows to token ids: sources cut with care, targets as the kind of backbone expects them.

What a source and a target are to a causal, an encoder-decoder or a masked backbone is in `deptjax.data.forms`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from deptjax.data.forms import FORMS, Cuttable, Tokenizer
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest

logger = logging.getLogger(__name__)

_CHUNK = 1024  # texts given to the tokenizer at once; fast tokenizers work in parallel over them


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One encoded row: `source` (T,) int32, not empty; `target` (U,) int32; `label` index, -1 for free text.

    `encoder_source` (E,) int32 is the source text in the tokens of a method's encoder, if it has one.
    """

    source: np.ndarray
    target: np.ndarray
    label: int
    encoder_source: np.ndarray | None = None


class Preprocessor:
    r"""Encodes the rows of one task for one tokenizer.

    A source longer than `max_length` tokens is cut (or is an error). What is cut is the end of the text in front of the
    template's suffix: of `"{question}\nType:"` the question, so that the model still reads `Type:`. An
    encoder-decoder's template without a suffix is cut by tokens, as the usual truncation does. Of one with a mask the
    texts of the columns are cut, the longest first, and nothing of the template's own. `</s>` and the target are never
    cut for it.

    Attributes:
        task, tokenizer, max_length, max_target_length: as given; `max_target_length` filled in from the task, and in
            the task's template, for a masked backbone, the tokenizer's mask token.
        cut_count: number of sources and free-text targets cut so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        task: Task,
        *,
        form: str,
        max_length: int,
        on_too_long: str = "cut",
        max_target_length: int | None = None,
        encoder_tokens: Callable[[Sequence[str]], list[np.ndarray]] | None = None,
    ):
        """Prepares the encoding of `task`.

        Args:
            tokenizer: a transformers tokenizer.
            task: as returned by `Task.load`; labels that are still None are taken for free text.
            form: what the backbone is: `causal`, `encoder_decoder` or `masked` (`deptjax.data.forms.form_of`).
            max_length: the most tokens of a source, special tokens included.
            on_too_long: `cut`, which warns once, or `error`.
            max_target_length: the most tokens of a free-text target, the end token included; None for the task's own.
            encoder_tokens: what makes an encoder's tokens of source texts.

        Raises `UserError` for a setting out of range, a tokenizer without the end or mask token that is needed, and a
        template with `{mask}` where it has no place, or without it where one is to be filled.
        """
        if on_too_long not in ("cut", "error"):
            raise UserError(f"on_too_long='{on_too_long}' must be 'cut' or 'error'")
        if max_length < 1:
            raise UserError(f"max_length={max_length} must be at least 1")
        if max_target_length is not None and max_target_length < 1:
            raise UserError(f"max_target_length={max_target_length} must be at least 1")
        if form not in FORMS:
            raise UserError(f"form='{form}' must be one of {', '.join(FORMS)}.{nearest(form, FORMS)}")
        self._form = FORMS[form](tokenizer, task)
        self.task = self._form.task
        self.cut_count = 0
        self.tokenizer = tokenizer
        self._encoder_tokens = encoder_tokens
        self.max_length = max_length
        self._on_too_long = on_too_long
        self.max_target_length = max_target_length or task.max_target_length
        self._warned = False

    @property
    def fills_mask(self) -> bool:
        """Whether answers are the one token at a mask, so that no text can be written."""
        return self._form.fills_mask

    def unmasked(self, source_texts: Sequence[str]) -> list[str]:
        """Returns source texts as a method's encoder reads them: without a masked backbone's mask token."""
        return [self._form.unmasked(text) for text in source_texts]

    def encode(self, row: Row) -> Example:
        """Returns the encoded row; raises `UserError` naming it when it is too long and `on_too_long` is `error`."""
        return self.encode_all([row])[0]

    def encode_all(self, rows: Iterable[Row]) -> list[Example]:
        """Returns the encoded rows, in their order.

        Warns through `logging` the first time that texts are cut, with their number. Raises as `encode`.
        """
        rows, before = list(rows), self.cut_count
        examples: list[Example] = []
        for start in range(0, len(rows), _CHUNK):
            examples += self._encode_chunk(rows[start : start + _CHUNK])
        cut = self.cut_count - before
        if cut and not self._warned:
            self._warned = True
            logger.warning(
                "task '%s': %d of %d rows hold more than max_length=%d tokens%s and were cut",
                *(self.task.name, cut, len(rows), self.max_length),
                "" if self.task.labels else f", or max_target_length={self.max_target_length},",
            )
        return examples

    def encode_text(self, source_text: str) -> np.ndarray:
        """Returns the token ids (T,) int32 of a finished source text, cut as in training; for prediction.

        `Task.source_text` makes the source text from a row or a bare text.
        """
        return self.encode_texts([source_text])[0]

    def encode_texts(self, source_texts: Sequence[str], origins: Sequence[str] | None = None) -> list[np.ndarray]:
        """Returns what `encode_text` does for each text; a mistake is told with its text's origin."""
        found: list[np.ndarray] = []
        for start in range(0, len(source_texts), _CHUNK):
            texts = source_texts[start : start + _CHUNK]
            where = [""] * len(texts) if origins is None else origins[start : start + _CHUNK]
            fitted = (self._fit(*each) for each in zip(texts, self._form.source_ids(list(texts)), where, strict=True))
            found += [np.asarray(ids, np.int32) for _, ids in fitted]
        return found

    def continuation_ids(self, source_text: str, continuations: Sequence[str], end: bool = True) -> list[list[int]]:
        """Returns the ids of texts that follow a source text, as targets have them; with `end` the end token as well.

        On a masked backbone they are what may stand at the mask, and nothing ends them. Raises `UserError` for a
        continuation without tokens, and there for one of several.
        """
        source, ids = self._fit(source_text, self._form.source_ids([source_text])[0], "")
        pieces = self._form.pieces([(source, ids)] * len(continuations), list(continuations))
        for text, some in zip(continuations, pieces, strict=True):
            if not some:
                raise UserError(f"the continuation {text!r} has no tokens; give a text")
        return [self._form.ended(some) if end or self.fills_mask else some for some in pieces]

    def label_tokens(self) -> np.ndarray:
        """Returns the token (C,) int32 of each label, for a loss over the labels alone.

        Raises `UserError` naming a label that is not a single token, with its tokens, or two labels that share one.
        """
        tokens: list[int] = []
        for label, pieces in zip(self._labels(), self._label_pieces, strict=True):
            if len(pieces) != 1:
                shown = " ".join(map(str, self.tokenizer.convert_ids_to_tokens(pieces)))
                raise UserError(
                    f"task '{self.task.name}': label '{label}' is {len(pieces)} tokens ({shown}), not one; "
                    f"{self._form.not_one_token}"
                )
            if pieces[0] == getattr(self.tokenizer, "unk_token_id", None):
                raise UserError(
                    f"task '{self.task.name}': label '{label}' is a text that the tokenizer does not know; give it "
                    "another in verbalizers"
                )
            if pieces[0] in tokens:
                other = self._labels()[tokens.index(pieces[0])]
                raise UserError(
                    f"task '{self.task.name}': labels '{other}' and '{label}' are the same token ("
                    f"{self.tokenizer.convert_ids_to_tokens(pieces)[0]}); give one another text in verbalizers"
                )
            tokens.append(pieces[0])
        return np.asarray(tokens, np.int32)

    def longest_target(self) -> int:
        """Returns the most tokens that a target can have."""
        return max(map(len, self._label_ids)) if self.task.labels else self.max_target_length

    def labels_are_tokens(self) -> bool:
        """Returns whether every label is one token, and no two the same: whether `label_tokens` succeeds."""
        firsts = {ids[0] for ids in self._label_pieces if len(ids) == 1}
        return bool(self.task.labels) and len(firsts) == len(self.task.texts)

    def label_sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns each label's target ids (C, U) int32, padded on the right with 0, and their mask (C, U) bool.

        For scoring by the likelihood of whole labels. The rows equal the targets of examples with that label. Raises
        `UserError` for a task without labels.
        """
        self._labels()
        ids = np.zeros((len(self._label_ids), max(map(len, self._label_ids))), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, label in enumerate(self._label_ids):
            ids[row, : len(label)], mask[row, : len(label)] = label, True
        return ids, mask

    def _labels(self) -> tuple[str, ...]:
        if not self.task.labels:
            raise UserError(f"task '{self.task.name}' has no labels: it is free text; name its labels, or generate")
        return self.task.labels

    def _encode_chunk(self, rows: Sequence[Row]) -> list[Example]:
        texts = [self.task.source_text(row) for row in rows]
        found = zip(texts, self._form.source_ids(texts), (row.origin for row in rows), strict=True)
        fitted = [self._fit(*each) for each in found]
        if self.task.labels:
            labels = [self.task.label_index(row) for row in rows]
            targets = [self._label_ids[label] for label in labels]
        else:
            labels = [-1] * len(rows)
            pieces = self._form.pieces(fitted, [self.task.target_text(row) for row in rows])
            targets = [self._fit_target(ids, row.origin) for ids, row in zip(pieces, rows, strict=True)]
        read = [None] * len(rows) if self._encoder_tokens is None else self._encoder_tokens(self.unmasked(texts))
        return [
            Example(np.asarray(source, np.int32), np.asarray(target, np.int32), label, own)
            for (_, source), target, label, own in zip(fitted, targets, labels, read, strict=True)
        ]

    @functools.cached_property
    def _label_pieces(self) -> list[list[int]]:
        """The ids of each label without an end token.

        A label is encoded once, behind a stand-in for the source, not once a row: it is the same class whatever the
        row, and the loss over labels needs it to be the same tokens. What counts of the source is how it ends, the
        suffix.
        """
        stand_in = "x" + self.task.input_template.suffix
        sources = [(stand_in, ids) for ids in self._form.source_ids([stand_in])]
        return self._form.pieces(sources * len(self.task.texts), list(self.task.texts))

    @functools.cached_property
    def _label_ids(self) -> list[list[int]]:
        """The target of each label. All end alike, as the form has it."""
        if self.fills_mask:
            self.label_tokens()  # says which label is not one token
        single = self.labels_are_tokens()
        return [self._form.ended(ids, single) for ids in self._label_pieces]

    def _fit(self, text: str, ids: list[int], origin: str) -> tuple[str, list[int]]:
        """Returns the source text and its ids, cut to `max_length`."""
        where = f"{origin}: " if origin else ""
        text = self._form.tidy(text)
        if not ids:
            raise UserError(f"{where}the source text is empty; give a text")
        self._form.check(ids, where)
        if len(ids) <= self.max_length:
            return text, ids
        if self._on_too_long == "error":
            raise UserError(
                f"{where}the source is {len(ids)} tokens, more than max_length={self.max_length}; shorten it, raise "
                "max_length, or set on_too_long='cut'"
            )
        self.cut_count += 1
        if (shortened := self._form.shortened(ids, self.max_length, text)) is not None:
            return text, shortened
        parts = self._form.cuttable(text)
        if (fitted := self._fitted(parts)) is None:
            own = "".join(parts.fixed)
            raise UserError(
                f"{where}max_length={self.max_length} leaves no room for text beside the template's {own!r}; raise it"
            )
        return fitted

    def _fitted(self, parts: Cuttable) -> tuple[str, list[int]] | None:
        """Returns the text with as many letters of its parts as `max_length` has room for, and its ids, or `None`.

        The longest are cut first, down to one length; what is left goes to the first that has use for it.
        """
        whole = [len(text) for text in parts.texts]

        def fits(lengths: Sequence[int]) -> bool:
            return len(self._form.source_ids([parts.joined(lengths)])[0]) <= self.max_length

        def extended(lengths: list[int], place: int) -> list[int]:
            end = whole[place] + 1 - lengths[place]
            return _raised(lengths, place, _largest(end, lambda more: fits(_raised(lengths, place, more))))

        level = _largest(max(whole), lambda most: fits([min(length, most) for length in whole]))
        kept = [min(length, level) for length in whole]
        for place in range(len(whole) if len(whole) > 1 else 0):
            kept = extended(kept, place)
        # Fewer letters can be more tokens (a word cut short), so what the search found is checked, and shortened if
        # need be. Some text is kept.
        while any(kept):
            text = self._form.tidy(parts.joined(kept))
            ids = self._form.source_ids([text])[0]
            if ids and len(ids) <= self.max_length:
                return text, ids
            kept = _raised(kept, kept.index(max(kept)), -1)
        return None

    def _fit_target(self, ids: list[int], origin: str) -> list[int]:
        if len(ids) + 1 > self.max_target_length:
            if self._on_too_long == "error":
                raise UserError(
                    f"{origin}: the target is {len(ids) + 1} tokens, more than max_target_length="
                    f"{self.max_target_length}; shorten it, raise max_target_length, or set on_too_long='cut'"
                )
            self.cut_count += 1
            ids = ids[: self.max_target_length - 1]
        return self._form.ended(ids)


def _largest(end: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number below `end` that fits, taken that all smaller ones do; at least 0."""
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _raised(lengths: Sequence[int], place: int, by: int) -> list[int]:
    return [length + by if i == place else length for i, length in enumerate(lengths)]
