"""Fields of dataclasses as a person sets them: help read from the docstring, values checked against the type."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

from deptjax.errors import UserError

_NOT_A_USERS = ("parent", "name")  # fields that Linen adds to its modules
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_ORDER = ("None", "bool", "int", "float", "str")  # the narrow types are tried first
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "none"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One settable field: `kinds` are the names of its types, such as `("int", "None")`; `help` is one line."""

    name: str
    kinds: tuple[str, ...]
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class Given:
    """A value somebody gave.

    Attributes:
      value: a text from a flag, or a Python value from gin.
      origin: for messages: `--steps`, or `run.gin, line 4`.
      level: what overrides what: 1 in a gin file, 2 by `--gin.NAME=VALUE`, 3 by a flag.
    """

    value: Any
    origin: str
    level: int


FILE, BINDING, FLAG = 1, 2, 3


def fields_of(cls: type, linen: bool = False) -> dict[str, Field]:
    """Returns the settable fields of a dataclass by name; `linen` leaves out the two that Linen adds.

    What a class does not tell of a field that it inherits, the class it has it from does.
    """
    told: dict[str, str] = {}
    for own in reversed(cls.__mro__):
        told.update(attributes_of(own.__dict__.get("__doc__") or ""))
    found = {}
    for field in dataclasses.fields(cls):
        if not field.init or (linen and field.name in _NOT_A_USERS):
            continue
        kinds = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        default = None if field.default is dataclasses.MISSING else field.default
        found[field.name] = Field(
            field.name, tuple(k.strip() for k in kinds.split("|")), default, told.get(field.name, "")
        )
    return found


def attributes_of(doc: str) -> dict[str, str]:
    r"""Returns the descriptions under `Attributes:` of a docstring, each in one line, by the name of the field.

    >>> attributes_of("A class.\n\n    Attributes:\n      a, b: both,\n        really.\n      c: one.\n")
    {'a': 'both, really', 'b': 'both, really', 'c': 'one'}
    """
    found: dict[str, str] = {}
    lines = inspect.cleandoc(doc).split("\n")
    if "Attributes:" not in lines:
        return found
    names: list[str] = []
    indent = None
    for line in lines[lines.index("Attributes:") + 1 :]:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        indent = depth if indent is None else indent
        match = re.match(r"\s+(\w+(?:, \w+)*): (.*)", line)
        if depth == indent and match:
            names = match[1].split(", ")
            found.update(dict.fromkeys(names, match[2].strip()))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return {name: text.rstrip(".").replace("`", "") for name, text in found.items()}


def checked(given: Given, field: Field) -> Any:
    """Returns a given value as one of the field's types. Raises `UserError` naming where it came from."""
    for kind in (kind for kind in _ORDER if kind in field.kinds):
        ok, value = _as_kind(given.value, kind, text=given.level == FLAG)
        if ok:
            return value
    if given.level != FLAG and not set(field.kinds) <= set(_ORDER):
        return given.value  # a type of its own, which only Python can say
    wanted = " or ".join(_WORDS.get(kind, kind) for kind in field.kinds)
    raise UserError(f"{given.origin}: {field.name} {given.value!r} is not {wanted}")


def _as_kind(value: Any, kind: str, text: bool) -> tuple[bool, Any]:
    """Returns whether the value is of the kind, and the value. A text is read only where it came from a flag."""
    if kind == "str":
        return isinstance(value, str), value
    if kind == "None":
        return value is None or (text and value.lower() in ("none", "null")), None
    if text:
        return _from_text(value, kind)
    if kind == "bool":
        return isinstance(value, bool), value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False, None
    if kind == "float":
        return math.isfinite(value), float(value)
    return float(value).is_integer() if math.isfinite(value) else False, int(value) if math.isfinite(value) else None


def _from_text(value: str, kind: str) -> tuple[bool, Any]:
    if kind == "bool":
        return value.lower() in (*_TRUE, *_FALSE), value.lower() in _TRUE
    try:
        number = int(value) if kind == "int" else float(value)
    except ValueError:
        return False, None
    return math.isfinite(number), number


def unescaped(text: str) -> str:
    r"""Returns a text from a flag with `\n` and `\t` read as a line end and a tab, and `\\` as a backslash.

    >>> unescaped(r"{question}\nType:") == "{question}\nType:"
    True
    """
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)
