"""Row formats: the columns that a task's templates name, computed from those that its rows come with.

A template says most of what a task needs. Where a text must be computed (a marked pronoun, stripped HTML, a rounded
score), the task names a row format, and the same function serves in training and for the rows of a request.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from deptjax.data.templates import Row, as_text
from deptjax.errors import UserError, nearest

Columns = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How rows are made ready for templates.

    Attributes:
        columns: `columns(values, paper_compat)` returns the columns that are new or changed. What a request does not
            bring (an answer, a label) it must do without. `paper_compat` asks for what the paper's code computes, where
            that differs.
        few_shot_class: the class by which a few-shot sample of free-text targets is balanced; None: it is not.
    """

    columns: Callable[[Columns, bool], dict[str, Any]]
    few_shot_class: Callable[[str], str] | None = None


_FORMATS: dict[str, RowFormat] = {}


def register_row_format(name: str, row_format: RowFormat) -> None:
    """Makes `Task(row_format=name)` use `row_format`."""
    _FORMATS[name] = row_format


def get_row_format(name: str) -> RowFormat:
    """Returns the registered row format. Raises `UserError` with the nearest name when there is none."""
    if name not in _FORMATS:
        raise UserError(f"row_format '{name}' is not known; there are {sorted(_FORMATS)}.{nearest(name, _FORMATS)}")
    return _FORMATS[name]


def formatted(row: Row, name: str, paper_compat: bool) -> Row:
    """Returns the row with the columns that format `name` computes; one that has them already is returned as it is.

    Raises `UserError` that names the row's origin and the column that is missing or holds something else.
    """
    if row.format == name:
        return row
    try:
        columns = get_row_format(name).columns(row.values, paper_compat)
    except UserError as error:
        raise UserError(f"{row.origin}: {error}" if row.origin else str(error)) from None
    return Row({**row.values, **columns}, row.origin, name)


def column_text(values: Columns, column: str) -> str:
    """Returns the text of a column. Raises `UserError` when it is not there or has no text."""
    text = as_text(values.get(column))
    if text is None:
        value = values.get(column)
        there = "is empty (null)" if value is None else f"holds a {type(value).__name__}"
        there = there if column in values else "is missing"
        raise UserError(f"column '{column}' {there}; it must hold a text or a number")
    return text


def column_number(values: Columns, column: str) -> float:
    """Returns the finite number in a column, also one written as a text. Raises `UserError` when it holds none."""
    text = column_text(values, column)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"column '{column}' holds {text!r}; it must hold a number")
    return number
