"""What sources have in common whose rows come in splits with names, such as train, validation and test."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from deptjax.data.sources import Splits, TextOf, given_or_drawn
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedSplits(abc.ABC):
    """A source whose rows come in named splits; a subclass reads one split in `rows` and has a `kind`.

    Attributes:
        train: the split that is trained on; sources say whether a part of one may be named, such as `train[:90%]`.
        dev, test: splits; where None, the rows are drawn from `train` without duplicates across the splits.
        dev_size, test_size: rows to draw, as a share below 1 or a count; used only where the split is None.
        seed: draws the split.
    """

    kind: ClassVar[str]
    infer_labels: ClassVar[bool] = True

    train: str = "train"
    dev: str | None = "validation"
    test: str | None = "test"
    dev_size: float = 0.1
    test_size: float = 0.1
    seed: int = 0

    @abc.abstractmethod
    def rows(self, split: str) -> tuple[Row, ...]:
        """Returns the rows of one split, in their order.

        Values are texts, numbers, booleans, None, and lists and dicts of these. Raises `UserError` in one line for a
        library that is not installed, data that is not there, and a split of another name.
        """

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What the rows are from, for messages: `glue/sst2`."""

    def splits(self, text_of: TextOf) -> Splits:
        """Returns the rows of the named splits, with dev and test drawn from train where they are None."""
        return given_or_drawn(
            self.rows(self.train),
            None if self.dev is None else self.rows(self.dev),
            None if self.test is None else self.rows(self.test),
            text_of,
            dev_size=self.dev_size,
            test_size=self.test_size,
            seed=self.seed,
            name=f"{self.title} {self.train}",
        )

    def to_config(self) -> dict[str, Any]:
        """Returns the settings as a JSON object."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def made_rows(self, split: str, values: Iterable[Mapping[str, object]]) -> tuple[Row, ...]:
        """Returns rows that know where they come from. Raises `UserError` where there are none."""
        rows = tuple(Row(row, f"{self.title} {split}, row {number}") for number, row in enumerate(values, 1))
        if not rows:
            raise UserError(f"{self.title}: split '{split}' has no rows")
        return rows

    def no_split(self, split: str, known: Iterable[str]) -> UserError:
        """Returns the error of a split that is not there, with the setting that names it."""
        known = [str(name) for name in known]
        field = next((name for name in ("train", "dev", "test") if getattr(self, name) == split), "split")
        drawn = "" if field == "train" else ", or to None to draw its rows from train"
        return UserError(
            f"{self.title}: no split '{split}'; set {field}= to one of {', '.join(known) or 'none'}{drawn}."
            f"{nearest(split, known)}"
        )


def shortest(value: float) -> float:
    """Returns the shortest number that means the same in float32, as a column of that type was written.

    >>> shortest(3.799999952316284)
    3.8
    """
    return float(str(np.float32(value)))


def one_line(error: BaseException) -> str:
    """Returns a library's message as one line of a length that can be read."""
    return " ".join(str(error).split())[:300] or type(error).__name__
