"""Every mistake in a file is one line that names the file, the line, and the field."""

from __future__ import annotations

import json
import pathlib

import pyarrow as pa
import pytest
from pyarrow import parquet

from deptjax.data.files import read_rows
from deptjax.errors import UserError


def write(folder: pathlib.Path, name: str, content: str | bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def complaint(path: pathlib.Path, **options: object) -> str:
    with pytest.raises(UserError) as raised:
        read_rows(path, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_four_formats_give_the_same_rows(tmp_path):
    rows = [{"text": 'a, "b"\tc', "label": "x"}, {"text": "d\u2028e", "label": "y"}]
    jsonl = write(tmp_path, "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    csv = write(tmp_path, "a.csv", 'text,label\r\n"a, ""b""\tc",x\r\nd\u2028e,y\r\n')
    tsv = write(tmp_path, "a.tsv", 'text\tlabel\n"a, ""b""\tc"\tx\nd\u2028e\ty\n')
    table = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), table)
    for path in (jsonl, csv, tsv, table):
        assert [dict(row.values) for row in read_rows(path)] == rows
    assert [row.origin for row in read_rows(csv)] == [f"{csv}, line 2", f"{csv}, line 3"]
    assert read_rows(table)[1].origin == f"{table}, row 2"


def test_a_row_is_named_by_the_line_it_starts_on(tmp_path):
    path = write(tmp_path, "a.csv", 'text\n"two\nlines"\nlast\n')
    assert [row.origin[-6:] for row in read_rows(path)] == ["line 2", "line 4"]
    path = write(tmp_path, "a.jsonl", '\n{"text": "b"}\n')
    assert read_rows(path)[0].origin.endswith("line 2")


def test_byte_order_mark_and_encoding(tmp_path):
    assert dict(read_rows(write(tmp_path, "a.csv", b"\xef\xbb\xbftext\nb\n"))[0].values) == {"text": "b"}
    path = write(tmp_path, "b.csv", "text\nok\ncaf\u00e9\n".encode("latin-1"))
    message = complaint(path)
    assert "line 3" in message
    assert "0xe9 at offset 11" in message
    assert "encoding='latin-1'" in message
    assert read_rows(path, encoding="latin-1")[1].values["text"] == "caf\u00e9"
    path = write(tmp_path, "c.jsonl", b"\xef\xbb\xbf" + b'{"a": 1}\n{"a": "\xff"}')
    assert "line 2: byte 0xff at offset 19" in complaint(path)
    assert "utf-16" in complaint(write(tmp_path, "d.csv", "text\nb".encode("utf-16")))
    assert "'utf-9' is not known" in complaint(path, encoding="utf-9")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "b"}\n{"text": }\n', "line 2: broken JSON at column 10"),
        ("a.jsonl", '{"text": "b"}\n["b"]\n', "line 2: a list, not an object"),
        ("a.jsonl", '{"text": "b", "text": "c"}', "line 1: field 'text' is given twice"),
        ("a.jsonl", "[" * 100_000, "line 1: the JSON is nested too deeply"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1: a number has thousands of digits; write it as a text"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", " \n\n", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,label\nb,x\nb,x,y\n", "line 3: 3 fields, but the header names 2 columns"),
        ("a.csv", "text,label\nb\n", "line 2: 1 fields, but the header names 2 columns"),
        ("a.csv", "text,text\nb,x\n", "line 1: column 'text' is twice in the header"),
        ("a.csv", "text,\nb,x\n", "line 1: a column of the header has no name"),
        ("a.tsv", 'text\tlabel\n"b\tx\nc\ty\n', "line 2: unexpected end of data; close the quote, or set quotes=False"),
        ("a.txt", "b", "the ending '.txt' names no known format"),
        ("a.parquet", b"PAR1 and then nothing of use", "is not a readable Parquet file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, expected):
    assert expected in complaint(write(tmp_path, name, content))


def test_parquet_cut_short(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"text": "b" * 99}]), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "is not a readable Parquet file" in complaint(path)


def test_no_file_and_a_folder(tmp_path):
    assert complaint(tmp_path / "none.csv").endswith("none.csv: no such file")
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in complaint(tmp_path / "folder.csv")
    assert "is a folder; name a file in it" in complaint(tmp_path)


def test_quotes_can_be_plain_text(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"b\tx\n')
    assert read_rows(path, quotes=False)[0].values["text"] == '"b'


def test_format_overrides_the_ending(tmp_path):
    assert read_rows(write(tmp_path, "a.txt", '{"text": "b"}'), format="jsonl")[0].values == {"text": "b"}
