"""Where rows come from: the user's own files, or rows in memory; and how they are split without leaks.

A *source* gives three lists of rows (train, dev, test). It knows no template: the caller hands it a function that
renders a row's source text, by which duplicates are found, so that no text of one drawn split is also in another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from deptjax.data.files import FORMATS, read_rows
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest

logger = logging.getLogger(__name__)

TextOf = Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Splits:
    """The rows of a data set, by what they are for: fitting, choosing, and reporting."""

    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]

    def __iter__(self) -> Iterator[tuple[Row, ...]]:
        return iter((self.train, self.dev, self.test))


@runtime_checkable
class Source(Protocol):
    """Where a task's rows come from.

    `splits(text_of)` returns the rows; the same source gives the same splits in every process. `infer_labels` says
    whether labels that the task leaves open may be inferred from the rows. `to_config` returns what a saved prompt
    stores: a JSON object with its `kind`, or None when the rows cannot be found again from a description.
    """

    infer_labels: ClassVar[bool]

    def splits(self, text_of: TextOf) -> Splits: ...

    def to_config(self) -> dict[str, Any] | None: ...


_KINDS: dict[str, Callable[..., Source]] = {}


def register_source(kind: str, make: Callable[..., Source]) -> None:
    """Makes `source_from_config` build `kind` by calling `make` with the other entries of the config."""
    _KINDS[kind] = make


def source_from_config(config: Mapping[str, Any] | None) -> Source | None:
    """Returns the source that `to_config` described, or None for None.

    Raises `UserError` for an unknown kind or a setting that the kind does not have.
    """
    if config is None:
        return None
    settings = dict(config)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(
            f"source kind {kind!r} is not known; it is one of {sorted(_KINDS)}.{nearest(str(kind), _KINDS)}"
        )
    try:
        return _KINDS[kind](**settings)
    except TypeError as error:
        raise UserError(f"source of kind '{kind}': {error}") from None


def normalized(text: str) -> str:
    r"""Returns `text` without differences of case and white space: two texts are duplicates when these are equal.

    >>> normalized("  A gripping\tFilm ")
    'a gripping film'
    """
    return " ".join(text.casefold().split())


def hash_order(texts: Iterable[str], seed: int) -> list[str]:
    """Returns the distinct `texts` in an order drawn by `seed`.

    The order sorts SHA-256 digests of seed and text. So it is the same on every machine and under every version of
    numpy, does not depend on the order of the file, and a row added to the file moves no other row to another split.
    """
    return sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())


def draw_splits(
    rows: Sequence[Row],
    text_of: TextOf,
    *,
    dev_size: float,
    test_size: float,
    seed: int,
    keep_in_train: frozenset[str] = frozenset(),
    name: str = "the data",
) -> Splits:
    """Returns `rows` split in three; rows with the same normalized text stay together.

    Args:
        rows: all rows; each lands in exactly one split, in the order given.
        text_of: renders a row's source text.
        dev_size, test_size: a number of rows when at least 1, a share of them when below 1, none when 0.
        seed: draws the split (see `hash_order`).
        keep_in_train: normalized texts that may not be drawn, because a split given by the user holds them.
        name: the file's name for error messages.

    Raises `UserError` when there are too few distinct texts to give every wanted split one.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(normalized(text_of(row)), []).append(index)
    drawable = [text for text in hash_order(groups, seed) if text not in keep_in_train]
    wanted = {"test": _count(test_size, len(rows), "test_size"), "dev": _count(dev_size, len(rows), "dev_size")}
    parts = sum(count > 0 for count in wanted.values())
    if wanted["test"] + wanted["dev"] >= len(rows) or len(drawable) <= parts:
        raise UserError(
            f"{name}: {len(rows)} rows with {len(drawable)} distinct texts are too few to draw {wanted['dev']} dev and "
            f"{wanted['test']} test rows from; give dev= and test= files, or smaller dev_size and test_size"
        )
    home = ["train"] * len(rows)
    for split, count in wanted.items():
        left, spare = count, []
        for text in drawable:
            # A group larger than what is left goes to train, so that the sizes come out as asked. The first one is
            # taken whatever its size: a split that was asked for is never empty.
            if left > 0 and (len(groups[text]) <= left or left == count):
                for index in groups[text]:
                    home[index] = split
                left -= len(groups[text])
            else:
                spare.append(text)
        drawable = spare
    return Splits(
        *(tuple(row for row, at in zip(rows, home, strict=True) if at == split) for split in ("train", "dev", "test"))
    )


def _count(size: float, total: int, field: str) -> int:
    """Returns the number of rows that a size, share or count, means; at least one for a share above 0."""
    if not 0 <= size < math.inf or (size >= 1 and size != int(size)):
        raise UserError(f"{field}={size} must be a share below 1, or a whole number of rows")
    return int(size) if size >= 1 or size == 0 else max(1, round(size * total))


def given_or_drawn(
    train: tuple[Row, ...],
    dev: tuple[Row, ...] | None,
    test: tuple[Row, ...] | None,
    text_of: TextOf,
    *,
    dev_size: float,
    test_size: float,
    seed: int,
    name: str,
) -> Splits:
    """Returns the splits that were given, and those that are None drawn from `train` by `draw_splits`.

    Nothing is drawn that a given split holds. Rows of `train` that are also in a given split stay, and their number is
    logged: a split that somebody else made is left as it is.
    """
    held_out = frozenset(normalized(text_of(row)) for part in (dev, test) if part for row in part)
    shared = sum(normalized(text_of(row)) in held_out for row in train)
    if shared:
        logger.warning("%s: %d of %d rows are also in dev or test", name, shared, len(train))
    dev_size = 0 if dev is not None else dev_size
    test_size = 0 if test is not None else test_size
    if dev_size == 0 and test_size == 0:
        return Splits(train, dev or (), test or ())
    drawn = draw_splits(
        train, text_of, dev_size=dev_size, test_size=test_size, seed=seed, keep_in_train=held_out, name=name
    )
    return Splits(drawn.train, dev or drawn.dev, test or drawn.test)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Rows in the user's files: JSON lines, CSV, TSV or Parquet.

    Attributes:
        train: path of the training file. `~` stands for the home folder.
        dev, test: paths; where None, the rows are drawn from `train` without duplicates across the splits.
        format: one of `jsonl`, `csv`, `tsv`, `parquet`; None tells it from each file's ending.
        encoding: of the text formats; a byte order mark in front of UTF-8 is accepted.
        quotes: whether `"` quotes fields in CSV and TSV.
        dev_size, test_size: rows to draw, as a share below 1 or a count; used only where the file is not given.
        seed: draws the split.
    """

    train: str
    dev: str | None = None
    test: str | None = None
    format: str | None = None
    encoding: str = "utf-8"
    quotes: bool = True
    dev_size: float = 0.1
    test_size: float = 0.1
    seed: int = 0
    infer_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("train", "dev", "test"):
            path = getattr(self, field)
            if path is not None:
                object.__setattr__(self, field, os.fspath(path))  # so that a pathlib.Path serialises as well
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"format={self.format!r} is not one of {FORMATS}.{nearest(str(self.format), FORMATS)}")

    def splits(self, text_of: TextOf) -> Splits:
        """Returns the rows of the files; every row has been rendered by `text_of`, so every source text is valid."""
        return given_or_drawn(
            self._read(self.train),
            None if self.dev is None else self._read(self.dev),
            None if self.test is None else self._read(self.test),
            text_of,
            dev_size=self.dev_size,
            test_size=self.test_size,
            seed=self.seed,
            name=self.train,
        )

    def _read(self, path: str) -> tuple[Row, ...]:
        return read_rows(path, format=self.format, encoding=self.encoding, quotes=self.quotes)

    def to_config(self) -> dict[str, Any]:
        """Returns the settings as a JSON object; paths as they were given."""
        return {"kind": "file", **dataclasses.asdict(self)}


class MemorySource:
    """Rows that the caller already has, as mappings from column to value.

    Where `dev` or `test` is None it is drawn from `train`, as `FileSource` does. The rows are not written into a saved
    prompt (they may be private, and are not needed to predict), so a task read back from one has no source.
    """

    infer_labels: ClassVar[bool] = True

    def __init__(
        self,
        train: Iterable[Mapping[str, object]],
        dev: Iterable[Mapping[str, object]] | None = None,
        test: Iterable[Mapping[str, object]] | None = None,
        *,
        dev_size: float = 0.1,
        test_size: float = 0.1,
        seed: int = 0,
    ):
        self._train = _rows(train, "train")
        self._dev = None if dev is None else _rows(dev, "dev")
        self._test = None if test is None else _rows(test, "test")
        self._dev_size, self._test_size, self._seed = dev_size, test_size, seed

    def splits(self, text_of: TextOf) -> Splits:
        """Returns the rows given, with dev and test drawn from train where they were not given."""
        return given_or_drawn(
            self._train,
            self._dev,
            self._test,
            text_of,
            dev_size=self._dev_size,
            test_size=self._test_size,
            seed=self._seed,
            name="train",
        )

    def to_config(self) -> None:
        """Returns None: the rows stay with the caller."""
        return


def _rows(rows: Iterable[Mapping[str, object]], split: str) -> tuple[Row, ...]:
    made = tuple(Row(row, f"{split} row {number}") for number, row in enumerate(rows, 1))
    if not made:
        raise UserError(f"{split}: no rows")
    return made


register_source("file", FileSource)
