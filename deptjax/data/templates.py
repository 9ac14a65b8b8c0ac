r"""Text templates with named columns, such as `"{question}\nType:"`, and the rows they are filled from."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping

from deptjax.errors import UserError, nearest

MASK = "mask"  # the placeholder of the place that a masked model fills


@dataclasses.dataclass(frozen=True)
class Row:
    """One example as it was read: its columns, and where it came from (`"train.csv, line 3"`) for error messages.

    `format` names the row format (`deptjax.data.row_formats`) that has computed columns of it already.
    """

    values: Mapping[str, object]
    origin: str = ""
    format: str | None = None


def as_text(value: object) -> str | None:
    """Returns the text of a column's value, as JSON writes it, or None when the value has no plain text.

    Texts are returned as they are, numbers in Python's shortest form, booleans as `true` and `false`. Null,
    not-a-number, lists, objects and bytes have no text.

    >>> as_text(3), as_text(True), as_text([1])
    ('3', 'true', None)
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and not math.isnan(value)):
        return str(value)
    return None


class Template:
    r"""A text with `{column}` placeholders; `{{` and `}}` stand for braces.

    `{mask}` is no column but the place that a masked model fills; it is rendered as it stands until `with_mask`.

    Attributes:
        text: the template as written.
        columns: the columns it names, in order of first use, at least one.
        suffix: the fixed text behind the last column, which cutting a long source must not lose.
        masks: how often it has `{mask}`.

    Raises `UserError` when the text names no column, or is not a template.

    >>> template = Template("{question}\nType:")
    >>> template.columns, template.suffix
    (('question',), '\nType:')
    """

    def __init__(self, text: str, field: str = "template"):
        self.text = text
        self._field = field
        self._parts: list[
            tuple[str, str | None]
        ] = []  # (fixed text, what stands behind it: a column, MASK, or None at the end)
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(
                f"{field} {text!r} is not a template: {error}; write {{{{ and }}}} for plain braces"
            ) from None
        end = ""
        for fixed, column, spec, conversion in parsed:
            if column is not None and (column == "" or spec or conversion):
                raise UserError(f"{field} {text!r}: a placeholder must be a bare column name such as {{text}}")
            end += fixed
            if column is not None:
                self._parts.append((end, column))
                end = ""
        self._parts.append((end, None))
        names = [column for _, column in self._parts if column is not None]
        self.masks = names.count(MASK)
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(name for name in names if name != MASK))
        if not self.columns:
            told = "names no column; write the column's name in braces, such as {text}"
            if self.masks:
                told = "names no column: {mask} is the place that a masked model fills; rename a column of that name"
            raise UserError(f"{field} {text!r} {told}")
        last = max(i for i, (_, column) in enumerate(self._parts) if column not in (MASK, None))
        self.suffix: str = "".join(map(_fixed, self._parts[last + 1 :]))

    @property
    def around_mask(self) -> tuple[str, str]:
        """The fixed texts in front of the first `{mask}` and behind it, up to the next placeholder each."""
        place = [column for _, column in self._parts].index(MASK)
        return self._parts[place][0], self._parts[place + 1][0]

    def with_mask(self, token: str) -> str:
        """Returns the text of the template with a token's text in the place of `{mask}`.

        >>> Template("{a} is {mask}").with_mask("<mask>")
        '{a} is <mask>'
        """
        written = {None: "", MASK: _escaped(token)}
        return "".join(_escaped(fixed) + written.get(column, f"{{{column}}}") for fixed, column in self._parts)

    def split(self, text: str) -> tuple[list[str], list[str]] | None:
        """Returns the fixed texts of the template, and between them the texts of columns, that give a filled `text`.

        Where a column's own text holds the fixed text behind it, the first one counts. Returns `None` for a text that
        the template cannot have given.

        >>> Template("{a} or {b}?").split("tea or coffee or milk?")
        (['', ' or ', '?'], ['tea', 'coffee or milk'])
        """
        fixed = [part for part, _ in self._parts]
        start, end = len(fixed[0]), len(text) - len(fixed[-1])
        if not text.startswith(fixed[0]) or not text.endswith(fixed[-1]) or start > end:
            return None
        texts = []
        for behind in fixed[1:-1]:
            place = text.find(behind, start, end)
            if place < 0:
                return None
            texts.append(text[start:place])
            start = place + len(behind)
        return fixed, [*texts, text[start:end]]

    def render(self, row: Row) -> str:
        """Returns the template filled from `row`.

        Raises `UserError` that names the row's origin and the column: a column that is not there (with the ones that
        are), a value without text (null, a list), or a row in which every named column is blank.
        """
        where = f"{row.origin}: " if row.origin else ""
        texts: dict[str, str] = {}
        for column in self.columns:
            if column not in row.values:
                known = [str(name) for name in row.values]
                listed = ", ".join(f"'{name}'" for name in known) or "none"
                raise UserError(
                    f"{where}no column '{column}', which the {self._field} {self.text!r} names; "
                    f"the columns are {listed}." + nearest(column, known)
                )
            value = row.values[column]
            text = as_text(value)
            if text is None:
                kind = "empty (null)" if value is None or isinstance(value, float) else f"a {type(value).__name__}"
                raise UserError(f"{where}column '{column}' is {kind}; it must hold a text, a number or a boolean")
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, which is no character
                raise UserError(
                    f"{where}column '{column}' holds half a character (a lone surrogate); mend it"
                ) from None
            texts[column] = text
        if not any(text.strip() for text in texts.values()):
            listed = ", ".join(f"'{column}'" for column in self.columns)
            raise UserError(
                f"{where}the text of column {listed} is empty; fill it or remove the row"
                if len(texts) == 1
                else f"{where}the texts of columns {listed} are all empty; fill one or remove the row"
            )
        return "".join(
            fixed + texts[column] if column in texts else _fixed((fixed, column)) for fixed, column in self._parts
        )


def _fixed(part: tuple[str, str | None]) -> str:
    """Returns the text of a part without a column."""
    fixed, column = part
    return fixed if column is None else f"{fixed}{{{MASK}}}"


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
