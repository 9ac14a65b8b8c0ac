"""The splits of DePT's paper: train, dev and test from the official splits, whose test labels are not public.

The authors of DePT take over the rules of ATTEMPT (Asai et al. 2022, arXiv 2205.11961) with seed 42:

- `small`: half of the official validation rows, drawn at random, are the dev split, the other half the test split;
- `large`: 1,000 training rows, drawn at random, are the dev split, and the official validation rows the test split;
- `official`: the official splits as they are.

Rows are drawn one by one, as there: a text (a paragraph of MultiRC, say) may be in two splits. Given the official rows
in their order, each split has the very rows, in the very order, of the paper's code: its `torch.randperm` is computed
here without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from deptjax.data.sources import Source, Splits, TextOf, register_source, source_from_config
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest

KINDS = ("small", "large", "official")
LARGE_DEV_ROWS = 1000
SEED = 42


def torch_permutation(count: int, seed: int) -> list[int]:
    """Returns `torch.randperm(count, generator=torch.Generator().manual_seed(seed))` of the CPU, without torch.

    A Fisher-Yates shuffle from the front: draw i of the Mersenne twister (MT19937, 32 bits, started by `seed` as
    numpy's `RandomState` is) picks, modulo what is left, which of the last `count - i` numbers comes to place i.

    >>> torch_permutation(5, 42)
    [2, 4, 3, 0, 1]
    """
    twister = np.random.RandomState(seed)  # noqa: NPY002 - the generator that torch uses
    draws = twister.randint(0, 2**32, size=max(count - 1, 0), dtype=np.uint32).tolist()
    order = list(range(count))
    for place, draw in enumerate(draws):
        other = place + draw % (count - place)
        order[place], order[other] = order[other], order[place]
    return order


@dataclasses.dataclass(frozen=True)
class PaperSplits:
    """The official splits of another source, divided as in the paper.

    Attributes:
        source: gives official splits: its `train`; its `dev`, of which `small` takes both halves; its `test`, which is
            the test split of `large` and `official`, and not used by `small`. A source's config will do.
        kind: `small`, `large` or `official`.
        train_rows: the training split is cut to its first so many rows; None for all.
        row_each: a column that holds a list: training rows are repeated, one for each of its elements alone.
        seed: draws the rows.
    """

    source: Any  # a Source; linters read a union with Mapping badly, and a config becomes a source at once
    kind: str
    train_rows: int | None = None
    row_each: str | None = None
    seed: int = SEED
    infer_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.source, Mapping):
            object.__setattr__(self, "source", source_from_config(self.source))
        if not isinstance(self.source, Source):
            raise UserError(
                f"source {self.source!r:.80} is no source of rows; give a FileSource or a MemorySource, say"
            )
        if self.kind not in KINDS:
            raise UserError(f"kind '{self.kind}' is not one of {', '.join(KINDS)}.{nearest(str(self.kind), KINDS)}")
        if self.train_rows is not None and self.train_rows < 1:
            raise UserError(f"train_rows={self.train_rows} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be from 0 to 4294967295")

    def splits(self, text_of: TextOf) -> Splits:
        """Returns the paper's splits. Raises `UserError` where there are too few official rows to divide."""
        given = self.source.splits(text_of)
        train, dev, test = given
        if self.kind == "small":
            dev, test = self._drawn(given.dev, len(given.dev) // 2, "validation")
        elif self.kind == "large":
            dev, train = self._drawn(given.train, LARGE_DEV_ROWS, "training")
        if self.row_each is not None:
            train = tuple(one for row in train for one in _one_each(row, self.row_each))
        return Splits(train[: self.train_rows], dev, test)

    def _drawn(self, rows: Sequence[Row], count: int, split: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        """Returns `count` rows drawn at random, and the others, both in the order of the draw."""
        if not 0 < count < len(rows):
            raise UserError(
                f"{len(rows)} {split} rows are too few to take {max(count, 1)} from, with some left; give more"
            )
        order = [rows[index] for index in torch_permutation(len(rows), self.seed)]
        return tuple(order[:count]), tuple(order[count:])

    def to_config(self) -> dict[str, Any] | None:
        """Returns the settings with those of the source, or None where the rows cannot be found again."""
        source = self.source.to_config()
        if source is None:
            return None
        # A config's `kind` is the kind of source.
        settings = {"division": self.kind, "train_rows": self.train_rows, "row_each": self.row_each, "seed": self.seed}
        return {"kind": "paper", **settings, "source": source}


def _from_config(source: Mapping[str, Any], division: str, **settings: Any) -> PaperSplits:
    return PaperSplits(source, division, **settings)


def _one_each(row: Row, column: str) -> list[Row]:
    values = row.values.get(column)
    if not isinstance(values, (list, tuple)) or not values:
        return [row]
    return [Row({**row.values, column: [value]}, row.origin) for value in values]


register_source("paper", _from_config)
