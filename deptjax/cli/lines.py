"""The input of `deptjax predict`: texts or JSON objects, one a line, read as a stream; mistakes name their line."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from deptjax.data.templates import Row
from deptjax.errors import UserError

_ENDS = 1 << 16  # bytes at either end of a file that are digested
_JSON_LINES = (".jsonl", ".ndjson")
_OTHER = (".json", ".csv", ".tsv", ".parquet")


class Lines:
    """The rows of a file, or of standard input.

    Args:
      path: a file, or `-`.
      format: `lines`, `jsonl`, or `None` to tell it: by a file's ending, by the first letter of standard input.
      encoding: of the text.
      columns: of the template; a bare text fills the only one. None where each row has a template of its own.

    Attributes:
      name: for messages.
      format: `lines` or `jsonl`.
      path: of the file; `None` for standard input.
      twice: whether `rows` may be called more than once, as on a file.

    Raises `UserError` for a file that cannot be read, an ending that means another format, bare texts where the
    template has several columns; and while reading, naming the line: an empty text, broken JSON, no object, a byte
    that is not of the encoding.
    """

    def __init__(self, path: str, format: str | None, encoding: str, columns: Sequence[str]) -> None:
        try:
            self._encoding = codecs.lookup(encoding).name
        except LookupError:
            raise UserError(f"--encoding '{encoding}' is not known; use utf-8, latin-1 or utf-16, say") from None
        self.path = None if path == "-" else pathlib.Path(path).expanduser()
        self._columns = tuple(columns)
        self._stdin: Iterator[bytes | str] | None = None
        self.name = "standard input" if self.path is None else str(self.path)
        # Pipes have a name too (`<(...)`), and can be read only once.
        self.twice = self.path is not None and (self.path.is_file() or not self.path.exists())
        self.format = format or self._told()
        if self.format == "lines" and not self._columns:
            raise UserError(
                f"{self.name}: a bare text names no task; say --task NAME, or give JSON lines that name theirs"
            )
        if self.format == "lines" and len(self._columns) > 1:
            there = ", ".join(self._columns)
            raise UserError(f"{self.name}: the prompt needs the columns {there}; give JSON lines with these")

    def rows(self) -> Iterator[Row]:
        """Yields the rows in their order; blank lines between JSON objects are left out."""
        for number, line in enumerate(self._lines(), 1):
            where = f"{self.name}, line {number}"
            text = self._decoded(line, where, first=number == 1)
            if self.format == "lines":
                if not text.strip():
                    raise UserError(f"{where}: the text is empty; fill it or remove the line")
                yield Row({self._columns[0]: text}, where)
            elif text.strip():
                yield Row(_object(text, where), where)

    def config(self) -> dict[str, Any] | None:
        """Returns what tells the file from others, JSON-ready: name, size, SHA-256 of the first and last 64 KiB.

        `None` where the input can be read only once.
        """
        if self.path is None or not self.twice:
            return None
        with self._read_errors(), self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = hashlib.sha256(file.read(_ENDS)).hexdigest()
            file.seek(max(0, size - _ENDS))
            tail = hashlib.sha256(file.read(_ENDS)).hexdigest()
        return {"name": self.path.name, "size": size, "head_sha256": head, "tail_sha256": tail}

    def _told(self) -> str:
        if self.path is not None:
            ending = self.path.suffix.lower()
            if ending in _OTHER:
                raise UserError(
                    f"{self.name}: {ending} is not read here; give JSON lines (.jsonl) or a text a line, or say which "
                    "of the two it is with --format jsonl or --format lines"
                )
            return "jsonl" if ending in _JSON_LINES else "lines"
        lines = self._lines()
        head: list[bytes | str] = []
        for line in lines:
            head.append(line)
            if line.strip():
                break
        self._stdin = itertools.chain(head, lines)
        begin = self._decoded(head[-1], self.name, first=True) if head else ""
        return "jsonl" if begin.lstrip().startswith("{") else "lines"

    def _lines(self) -> Iterator[bytes | str]:
        """Yields lines, as bytes where a line end is one byte: then a broken byte is found in its own line."""
        if self._stdin is not None:
            yield from self._stdin
            return
        with self._read_errors(), sys.stdin.buffer if self.path is None else self.path.open("rb") as file:
            if "\n".encode(self._encoding) == b"\n":
                yield from file
            else:
                yield from io.TextIOWrapper(file, encoding=self._encoding, newline="\n")

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{self.name}: no such file") from None
        except IsADirectoryError:
            raise UserError(f"{self.name} is a folder; name a file in it") from None
        except UnicodeError as error:
            raise UserError(f"{self.name} is not {self._encoding} text ({error}); name its --encoding") from None
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error.strerror}") from None

    def _decoded(self, line: bytes | str, where: str, first: bool) -> str:
        if isinstance(line, bytes):
            if first and self._encoding == "utf-8":
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                line = line.decode(self._encoding)
            except UnicodeDecodeError as error:
                guess = "utf-16" if line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
                raise UserError(
                    f"{where}: byte 0x{line[error.start]:02x} is not {self._encoding} text; name the file's encoding, "
                    f"such as --encoding {guess}"
                ) from None
        return line.rstrip("\r\n")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where}: the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: a {type(value).__name__}, not an object; each line must be like {{"text": "..."}}')
    return value
