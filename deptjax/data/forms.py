"""How each kind of backbone takes a source and its target: what frames them, how they join, where a source is cut.

| form              | source                                       | target                                         |
|-------------------|----------------------------------------------|------------------------------------------------|
| `causal`          | as the tokenizer has it, without an end token | the text that goes on behind a space; end token |
| `encoder_decoder` | its pieces and `</s>`                        | its pieces and `</s>`                           |
| `masked`          | between the tokenizer's special tokens       | one token, that of the mask's place             |

A causal label that is a single token, as all others of its task are, is scored by one state: nothing follows it.

The template of a masked form holds `{mask}`, once: `"{sentence} . It was {mask} ."`. A label there is one token, with
a space in front of it where the template has one (RoBERTa's tokens know of it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from deptjax.data.tasks import Task
from deptjax.errors import UserError
from deptjax.tokens import token_ids

WRITES_NO_TEXT = "a masked model fills one place and writes no text"


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here; it also decodes (`batch_decode`)."""

    eos_token_id: Any
    pad_token_id: Any
    batch_decode: Any
    convert_ids_to_tokens: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any: ...


class Cuttable(NamedTuple):
    """A source text: what is kept, the n + 1 texts of `fixed`, and between them the n of `texts`, cut at their ends."""

    fixed: list[str]
    texts: list[str]

    def joined(self, lengths: Sequence[int]) -> str:
        """Returns the source text with so many letters of each text that may be cut."""
        kept = [text[:length] for text, length in zip(self.texts, lengths, strict=True)]
        return self.fixed[0] + "".join(a + b for a, b in zip(kept, self.fixed[1:], strict=True))


class Form:
    """A tokenizer and a task as one kind of backbone takes them.

    Attributes:
      task: as given; where the form has a mask, with the mask token's text in its template.
      fills_mask: whether the target is the token at a mask, and nothing can follow it.
      not_one_token: what to do about a label that is several tokens where one is asked for.
    """

    fills_mask: ClassVar[bool] = False
    not_one_token: ClassVar[str] = "give it a one-token text in verbalizers, or score labels by their likelihood"

    def __init__(self, tokenizer: Tokenizer, task: Task) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token); use one that names it")
        if task.input_template.masks:
            raise UserError(
                f"task '{task.name}': the input template {task.input!r} has {{mask}}, which a masked backbone (BERT,"
                " RoBERTa) fills and this one does not; leave it out, or rename a column of that name"
            )
        self.task, self._tokenizer, self._eos = task, tokenizer, int(tokenizer.eos_token_id)
        self._suffix = task.input_template.suffix

    def tidy(self, text: str) -> str:
        """Returns a source text as it is encoded."""
        return text

    def unmasked(self, text: str) -> str:
        """Returns a source text as another model reads it: without the backbone's mask token."""
        return text

    def source_ids(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of source texts, special tokens included."""
        raise NotImplementedError

    def pieces(self, sources: Sequence[tuple[str, list[int]]], targets: list[str]) -> list[list[int]]:
        """Returns the ids of the targets behind their sources, each a text and its ids, without an end token."""
        raise NotImplementedError

    def ended(self, pieces: list[int], single: bool = False) -> list[int]:
        """Returns the ids of a target with what ends it; `single`: it is a label, and all of its task are one token."""
        return [*pieces, self._eos]

    def check(self, ids: list[int], where: str) -> None:
        """Raises `UserError`, beginning with `where`, for the ids of a source that cannot be answered."""

    def shortened(self, ids: list[int], max_length: int, text: str) -> list[int] | None:
        """Returns a source cut by tokens, or `None` where it is the text that has to be cut."""
        return None

    def cuttable(self, text: str) -> Cuttable:
        """Returns what of a source text may be cut: what stands in front of the template's suffix."""
        suffix = self._suffix_of(text)
        return Cuttable(["", suffix], [text[: len(text) - len(suffix)]])

    def ids(self, texts: list[str], special: bool) -> list[list[int]]:
        """Returns what the tokenizer makes of texts, with its special tokens or without."""
        return token_ids(self._tokenizer, texts, add_special_tokens=special)

    def _suffix_of(self, text: str) -> str:
        return self._suffix if text.endswith(self._suffix) else ""


class Causal(Form):
    """The target continues the source: a space is put between, unless the source ends in white space."""

    def tidy(self, text: str) -> str:
        """Returns the text, which without a suffix loses white space at its end.

        Else the first target token, " yes" or "yes", would depend on how a row happens to end.
        """
        return text if self._suffix else text.rstrip()

    def source_ids(self, texts: list[str]) -> list[list[int]]:
        """Returns ids without an end token; one is kept where it is all there is, and so a start token."""
        return [self._open(ids, 1) for ids in self.ids([self.tidy(text) for text in texts], special=True)]

    def pieces(self, sources: Sequence[tuple[str, list[int]]], targets: list[str]) -> list[list[int]]:
        """Returns the ids as they are in the joint text, or alone where a token would straddle the border."""
        spaced = [
            target if not text or text[-1].isspace() or target[:1].isspace() else " " + target
            for (text, _), target in zip(sources, targets, strict=True)
        ]
        joint = self.ids([text + target for (text, _), target in zip(sources, spaced, strict=True)], special=True)
        alone = self.ids(spaced, special=False)
        found = []
        for (_, source), both, single in zip(sources, joint, alone, strict=True):
            both = self._open(both, 0)
            behind = both[len(source) :] if both[: len(source)] == source else []
            found.append(behind or single)
        return found

    def ended(self, pieces: list[int], single: bool = False) -> list[int]:
        """Returns the ids with the end token, but of labels that are all single tokens."""
        return pieces if single else super().ended(pieces)

    def _open(self, ids: list[int], least: int) -> list[int]:
        while len(ids) > least and ids[-1] == self._eos:
            ids.pop()
        return ids


class EncoderDecoder(Form):
    """Source and target are apart, and both end with the end token."""

    def source_ids(self, texts: list[str]) -> list[list[int]]:
        """Returns ids with exactly one end token."""
        found = []
        for ids in self.ids(texts, special=True):
            while ids and ids[-1] == self._eos:
                ids.pop()
            found.append([*ids, self._eos])
        return found

    def pieces(self, sources: Sequence[tuple[str, list[int]]], targets: list[str]) -> list[list[int]]:
        """Returns the ids of the targets alone."""
        alone = self.ids(targets, special=False)
        return [ids[:-1] if ids and ids[-1] == self._eos else ids for ids in alone]

    def shortened(self, ids: list[int], max_length: int, text: str) -> list[int] | None:
        """Returns the first tokens and the end token, as usual truncation does, where the template has no suffix."""
        return None if self._suffix_of(text) else [*ids[: max_length - 1], self._eos]


class Masked(Form):
    """The target is the token at the one mask of the source, which stands between the tokenizer's special tokens."""

    fills_mask: ClassVar[bool] = True
    not_one_token: ClassVar[str] = "a masked model fills in one, so give it a one-token text in verbalizers"

    def __init__(self, tokenizer: Any, task: Task) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token (mask_token); use the one that belongs to the model")
        template, where = task.input_template, f"task '{task.name}'"
        if template.masks != 1:
            count = f"{template.masks} times" if template.masks else "nowhere"
            raise UserError(
                f"{where}: the input template {task.input!r} has {{mask}} {count}; a masked model fills one place, so"
                " write {mask} once, where the label is to stand"
            )
        if not task.labels:
            raise UserError(f"{where} has no labels, and {WRITES_NO_TEXT}; name its labels")
        self._mask, self._token = int(tokenizer.mask_token_id), str(tokenizer.mask_token)
        self._lead, self._after = template.around_mask
        self.task, self._tokenizer = dataclasses.replace(task, input=template.with_mask(self._token)), tokenizer
        self._suffix = self.task.input_template.suffix

    def unmasked(self, text: str) -> str:
        """Returns a source text without the mask token."""
        return text.replace(self._token, "")

    def source_ids(self, texts: list[str]) -> list[list[int]]:
        """Returns ids between the tokenizer's special tokens."""
        return self.ids(texts, special=True)

    def pieces(self, sources: Sequence[tuple[str, list[int]]], targets: list[str]) -> list[list[int]]:
        """Returns the ids of the targets as they stand at the mask, with the white space in front of it."""
        spaced = self._lead[-1:].isspace()
        return self.ids([f" {t}" if spaced and not t[:1].isspace() else t for t in targets], special=False)

    def ended(self, pieces: list[int], single: bool = False) -> list[int]:
        """Returns the ids. Raises `UserError` for more than one."""
        if len(pieces) != 1:
            told = " ".join(map(str, self._tokenizer.convert_ids_to_tokens(pieces)))
            raise UserError(f"'{told}' is {len(pieces)} tokens, and a masked model fills in one; give a text of one")
        return pieces

    def check(self, ids: list[int], where: str) -> None:
        """Raises `UserError` for a source in which the mask of the template is not the only one."""
        if ids.count(self._mask) != 1:
            raise UserError(
                f"{where}the text holds the mask token {self._token}, whose place the template gives; take it out"
            )

    def cuttable(self, text: str) -> Cuttable:
        """Returns the texts of the template's columns, between what the template itself has, the mask among it.

        Of a text that the template did not give, what stands around the mask and its fixed text.
        """
        parts = self.task.input_template.split(text)
        if parts is not None and any(self._token in fixed for fixed in parts[0]):
            return Cuttable(*parts)
        place = text.index(self._token)
        start = place - len(self._lead) if text[:place].endswith(self._lead) else place
        end = place + len(self._token)
        end += len(self._after) if text.startswith(self._after, end) else 0
        return Cuttable(["", text[start:end], ""], [text[:start], text[end:]])


FORMS: dict[str, type[Form]] = {"causal": Causal, "encoder_decoder": EncoderDecoder, "masked": Masked}


def form_of(config: Any) -> str:
    """Returns the name of the form of a backbone's config."""
    return "encoder_decoder" if config.is_encoder_decoder else "masked" if config.is_masked else "causal"
