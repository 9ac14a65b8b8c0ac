"""Settings from gin files and `--gin.NAME=VALUE`, read with gin-config's own parser.

    include "../methods/dept.gin"        # relative to the file that says so
    prompt_lr = 0.3                      # a macro
    TrainConfig.prompt_lr = %prompt_lr   # a binding
    DePT:                                # several bindings of one name
      prompt_length = 20

Bound are the library's own names: `train` (method, task, workdir), `load_backbone`, `TrainConfig`, `Task`, the sources
(`FileSource`, `HFSource`, `TFDSSource`, `SeqioSource`) and the classes of the methods. What is parsed is returned as
values with their place, nothing is called and nothing global is changed: so files, bindings and flags can be laid over
each other, and a mistake names its line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser

from deptjax.cli.fields import BINDING, FILE, Given
from deptjax.errors import UserError, nearest

Bindings = dict[tuple[str, str], Given]
Scoped = dict[frozenset[str], Bindings]  # by the names in front: `trec6/lora/TrainConfig.steps` has two
Known = Mapping[str, Sequence[str]]  # what may be bound: the fields of each name


@dataclasses.dataclass(frozen=True)
class Macro:
    """A use of `%name`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """A use of `@Name` or `@Name()`."""

    name: str


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


class _Named(io.StringIO):
    """Text that knows its file's name, which the parser puts into its messages."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def read_gin(files: Sequence[str], bindings: Sequence[str], known: Known) -> Bindings:
    """Returns what gin files and bindings set, by (name, field); the later wins.

    Args:
      files: paths, in the order given.
      bindings: `"prompt_lr=0.3"`, `"DePT.rank=8"`, the texts behind `--gin.`.
      known: the fields of each name that may be bound.

    Raises:
      UserError: for a file that is missing, a syntax error (with its line), an unknown name or field, a macro that is
        not defined, and a macro that nobody uses.
    """
    return _read(files, bindings, known, scopes=False)[frozenset()]


def read_scoped_gin(files: Sequence[str], bindings: Sequence[str], known: Known) -> Scoped:
    """Returns what gin files and bindings set, by scope: names in front, as in `lora/TrainConfig.steps = 100`.

    Arguments and errors are those of `read_gin`. Which scopes there are is for the caller to check.
    """
    return _read(files, bindings, known, scopes=True)


def _read(files: Sequence[str], bindings: Sequence[str], known: Known, scopes: bool) -> Scoped:
    reader = _Reader(known, scopes)
    for file in files:
        reader.read(pathlib.Path(file), f"--gin-file {file}", ())
    for binding in bindings:
        reader.bind(binding)
    return reader.resolved()


class _Reader:
    def __init__(self, known: Known, scopes: bool) -> None:
        self._known, self._scopes = known, scopes
        self._bound: Scoped = {frozenset(): {}}
        self._macros: dict[str, Given] = {}

    def read(self, file: pathlib.Path, asked: str, parents: tuple[pathlib.Path, ...]) -> None:
        if file.resolve() in parents:
            raise UserError(f"{asked}: {file} includes itself")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"{asked}: cannot read {file}: {reason}") from None
        with _syntax_errors(str(file)):
            for statement in config_parser.ConfigParser(_Named(text, str(file)), _Delegate()):
                where = f"{file}, line {statement.location.line_num}"
                if isinstance(statement, config_parser.IncludeStatement):
                    self.read(file.parent / statement.filename, where, (*parents, file.resolve()))
                elif isinstance(statement, config_parser.ImportStatement):
                    self._import(statement.module, where)
                elif isinstance(statement, config_parser.BindingStatement):
                    name = ".".join(filter(None, (statement.selector, statement.arg_name)))
                    self._set("/".join(filter(None, (statement.scope, name))), Given(statement.value, where, FILE))

    def bind(self, binding: str) -> None:
        name, equals, text = binding.partition("=")
        origin = f"--gin.{name.strip()}"
        if not equals or not name.strip():
            raise UserError(f"--gin.{binding}: no value; write --gin.NAME=VALUE")
        self._set(name.strip(), Given(_value(text.strip(), origin), origin, BINDING))

    def _set(self, name: str, given: Given) -> None:
        *scope, name = name.split("/")
        owner, dot, field = name.rpartition(".")
        if scope and not (dot and self._scopes):
            whole = "/".join((*scope, name))
            raise UserError(f"{given.origin}: '{whole}' has a scope, and no setting here has one; write {name}")
        if not dot:
            self._macros[name] = given
            return
        owner = owner.rpartition(".")[2]  # `deptjax.methods.DePT.rank` means the same as `DePT.rank`
        if owner not in self._known:
            raise UserError(
                f"{given.origin}: '{owner}' is no name that can be set; there are {', '.join(self._known)}."
                f"{nearest(owner, self._known)}"
            )
        if field not in self._known[owner]:
            there = ", ".join(self._known[owner]) or "none"
            raise UserError(
                f"{given.origin}: {owner} has no field '{field}'; it has: {there}.{nearest(field, self._known[owner])}"
            )
        self._bound.setdefault(frozenset(scope), {})[owner, field] = given

    def _import(self, module: str, where: str) -> None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{where}: cannot import {module}: {error}") from None

    def resolved(self) -> Scoped:
        used: set[str] = set()
        values = {
            scope: {key: self._resolve(given, used) for key, given in bound.items()}
            for scope, bound in self._bound.items()
        }
        for name, given in self._macros.items():
            if name not in used:
                fields = [f"{owner}.{name}" for owner, there in self._known.items() if name in there]
                hint = f" Did you mean '{fields[0]}'?" if fields and not used else nearest(name, [*used, *fields])
                raise UserError(f"{given.origin}: nothing uses the macro '{name}'.{hint}")
        return values

    def _resolve(self, given: Given, used: set[str]) -> Given:
        return dataclasses.replace(given, value=self._plain(given.value, given.origin, used, ()))

    def _plain(self, value: Any, origin: str, used: set[str], inside: tuple[str, ...]) -> Any:
        """Returns a value with its macros replaced."""
        if isinstance(value, Macro):
            if value.name not in self._macros:
                raise UserError(
                    f"{origin}: the macro '{value.name}' has no value; set {value.name} in a gin file, or "
                    f"--gin.{value.name}=VALUE.{nearest(value.name, self._macros)}"
                )
            if value.name in inside:
                raise UserError(f"{origin}: the macro '{value.name}' is defined by itself")
            used.add(value.name)
            return self._plain(self._macros[value.name].value, origin, used, (*inside, value.name))
        if isinstance(value, (list, tuple)):
            return type(value)(self._plain(item, origin, used, inside) for item in value)
        if isinstance(value, dict):
            return {k: self._plain(item, origin, used, inside) for k, item in value.items()}
        return value


def _value(text: str, origin: str) -> Any:
    """Returns the value of a binding; a bare word such as `cosine` or `runs/x` is a text, quotes or not."""
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        value = parser.parse_value()
        if parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            return value
        reason = "more text behind the value"
    except (SyntaxError, tokenize.TokenError) as error:
        reason = str(error.args[0]).split("\n")[0]
    if re.match(r"""[^\[({'"@%]""", text):
        return text
    raise UserError(f"{origin}: {text!r} is not a value gin can read ({reason})")


@contextlib.contextmanager
def _syntax_errors(file: str) -> Iterator[None]:
    try:
        yield
    except SyntaxError as error:  # its `lineno` is set from the place that the parser hands over
        found = (error.text or "").strip()
        shown = f": {found}" if found else ""
        reason = " ".join((error.msg or "").split())
        raise UserError(f"{error.filename or file}, line {error.lineno}: not gin: {reason}{shown}") from None
    except tokenize.TokenError as error:
        message, place = error.args
        raise UserError(f"{file}, line {place[0]}: not gin: {message}; close the bracket or quote") from None
