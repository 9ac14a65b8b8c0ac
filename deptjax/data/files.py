"""Reads rows from JSON lines, CSV, TSV and Parquet files, and says what is wrong with one in one line."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from deptjax.data.templates import Row
from deptjax.errors import UserError

FORMATS = ("jsonl", "csv", "tsv", "parquet")
_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}


def read_rows(
    path: str | os.PathLike[str], *, format: str | None = None, encoding: str = "utf-8", quotes: bool = True
) -> tuple[Row, ...]:
    """Returns the rows of a file, each with its place in the file.

    Args:
        path: the file; `~` stands for the home folder.
        format: one of `FORMATS`, or None to tell it from the file's ending.
        encoding: of JSON lines, CSV and TSV; a UTF-8 byte order mark is accepted.
        quotes: whether `"` quotes fields in CSV and TSV.

    Raises `UserError`, naming file, line and field: a missing, empty or unreadable file, an unknown ending, text in
    another encoding, broken JSON, a line that is not an object, a duplicate column, a row with too many or too few
    fields, a damaged Parquet file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if format is None:
        format = _ENDINGS.get(path.suffix.lower())
        if format is None:
            raise UserError(
                f"{path}: the ending '{path.suffix}' names no known format; rename the file to end in one of "
                f"{sorted(_ENDINGS)}, or set format= to one of {FORMATS}"
            )
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not data.strip():
        raise UserError(f"{path} is empty; it must hold at least one row")
    if format == "parquet":
        rows = tuple(_parquet(path, data))
    elif format == "jsonl":
        rows = tuple(_json_lines(path, _decode(path, data, encoding)))
    else:
        rows = tuple(_separated(path, _decode(path, data, encoding), "," if format == "csv" else "\t", quotes))
    if not rows:
        raise UserError(f"{path} has no rows; it must hold at least one")
    return rows


def _decode(path: Path, data: bytes, encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise UserError(f"{path}: encoding '{encoding}' is not known; use utf-8, latin-1 or utf-16, say") from None
    skipped = len(codecs.BOM_UTF8) if name.startswith("utf-8") and data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[skipped:].decode("utf-8" if skipped else name)
    except UnicodeDecodeError as error:
        at = error.start + skipped
        line = data.count(b"\n", 0, at) + 1
        guess = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin-1"
        raise UserError(
            f"{path}, line {line}: byte 0x{data[at]:02x} at offset {at} is not {encoding} text; save the file as "
            f"UTF-8, or name its encoding, such as encoding='{guess}'"
        ) from None


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # Only "\n" ends a line: U+2028 and its like may stand inside a JSON text, and `str.splitlines` would cut there.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line, object_pairs_hook=functools.partial(_distinct, where))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
        except RecursionError:
            raise UserError(f"{where}: the JSON is nested too deeply") from None
        except UserError:  # of a field that is given twice
            raise
        except ValueError:  # Python's bound on what it reads as a number
            raise UserError(f"{where}: a number has thousands of digits; write it as a text") from None
        if not isinstance(value, dict):
            raise UserError(
                f'{where}: a {type(value).__name__}, not an object; each line must be like {{"text": "..."}}'
            )
        yield Row(value, where)


def _distinct(where: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: field '{twice}' is given twice; keep one of them")
    return row


def _separated(path: Path, text: str, delimiter: str, quotes: bool) -> Iterator[Row]:
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        strict=True,
    )
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # a quoted field may hold line ends: the record starts here, and ends later
        where = f"{path}, line {line}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = '; close the quote, or set quotes=False where " is plain text' if quotes else ""
            raise UserError(f"{where}: {error}{hint}") from None
        if not fields:  # a blank line
            continue
        if header is None:
            header = [name.strip() for name in fields]
            for name in header:
                if not name:
                    raise UserError(
                        f"{where}: a column of the header has no name; the first line must name the columns"
                    )
                if header.count(name) > 1:
                    raise UserError(f"{where}: column '{name}' is twice in the header; rename one of them")
            continue
        if len(fields) != len(header):
            raise UserError(
                f"{where}: {len(fields)} fields, but the header names {len(header)} columns; "
                f"quote texts that hold {'a comma' if delimiter == ',' else 'a tab'}, and fill missing fields"
            )
        yield Row(dict(zip(header, fields, strict=True)), where)


def _parquet(path: Path, data: bytes) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # slow to import, and only this format needs it

    try:
        table = parquet.read_table(io.BytesIO(data))
        columns = table.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())  # Arrow's messages span lines
        raise UserError(
            f"{path} is not a readable Parquet file, perhaps cut short; write it again ({reason})"
        ) from None
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: column '{name}' is there twice; rename one of them")
    for number, values in enumerate(columns, 1):
        yield Row(values, f"{path}, row {number}")
