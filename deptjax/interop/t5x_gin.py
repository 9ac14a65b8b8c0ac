"""Reads the few bindings of a T5X gin file that say what a checkpoint's shapes cannot.

T5X writes the settings of a run into `config.gin` of its folder, and its models are described by `model.gin`. Of both
only `T5Config` is read, with regular expressions: the files configure classes that exist in T5X alone.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from deptjax.errors import UserError

FIELDS = ("mlp_activations", "dropout_rate", "logits_via_embedding")
# T5X takes an activation by its name in flax.linen, where "gelu" is the tanh approximation.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu", "swish": "silu"}
_BINDING = re.compile(r"[\w./]*\bT5Config\.(\w+)\s*=\s*(.+)")
_BLOCK = re.compile(r"[\w./]*\bT5Config:\s*")
_INDENTED = re.compile(r"\s+(\w+)\s*=\s*(.+)")
_MACRO = re.compile(r"(\w+)\s*=\s*(.+)")


def t5_settings(text: str, where: str) -> dict[str, Any]:
    r"""Returns those of `T5Config`'s fields `FIELDS` that a gin file gives, a macro replaced by its value.

    A macro without a value in the file is as if the field were not there. Raises `UserError`, naming `where` and the
    field, for a value that is not a Python literal.

    >>> t5_settings("network.T5Config.dropout_rate = %DROPOUT_RATE\nDROPOUT_RATE = 0.0", "config.gin")
    {'dropout_rate': 0.0}
    """
    given: dict[str, str] = {}
    macros: dict[str, str] = {}
    in_block = False
    for line in map(_without_comment, text.splitlines()):
        if not line:
            continue
        if binding := _BINDING.fullmatch(line):
            given[binding[1]], in_block = binding[2], False
        elif not line[0].isspace():
            in_block = bool(_BLOCK.fullmatch(line))
            if macro := _MACRO.fullmatch(line):
                macros[macro[1]] = macro[2]
        elif in_block and (binding := _INDENTED.fullmatch(line)):
            given[binding[1]] = binding[2]
    found = {}
    for field in FIELDS:
        value = given.get(field)
        for _ in range(len(macros) + 1):  # a macro may name a macro
            if value is not None and value.startswith("%"):
                value = macros.get(value[1:].rpartition(".")[2])
        if value is None or value.startswith("%"):
            continue
        try:
            found[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"{where}: 'T5Config.{field}' is {value}, expected a plain value; correct it") from None
    return found


def mlp_settings(activations: Any, where: str) -> tuple[str, bool]:
    """Returns `(activation, gated)` for T5X's `mlp_activations`: one name, or a name and `"linear"`.

    Raises `UserError` for anything else.

    >>> mlp_settings(("gelu", "linear"), "config.gin")
    ('gelu_new', True)
    """
    names = tuple(activations) if isinstance(activations, (list, tuple)) else (activations,)
    if names[1:] not in ((), ("linear",)) or names[:1] not in {(name,) for name in ACTIVATIONS}:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"{where}: 'mlp_activations' is {activations!r}, expected one of {known}, alone or with 'linear'"
        )
    return ACTIVATIONS[names[0]], len(names) == 2


def _without_comment(line: str) -> str:
    return line.partition("#")[0].rstrip()
