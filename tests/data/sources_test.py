"""Drawn splits share no text, are the same in every process, and have the sizes asked for."""

from __future__ import annotations

import logging

import pytest

from deptjax.data.sources import FileSource, MemorySource, draw_splits, hash_order, normalized, source_from_config
from deptjax.data.templates import Row
from deptjax.errors import UserError


def text_of(row: Row) -> str:
    return str(row.values["text"])


def texts(rows) -> set[str]:
    return {normalized(text_of(row)) for row in rows}


ROWS = [{"text": f"text {i % 97}" if i % 2 else f" TEXT  {i % 97}", "label": i % 3} for i in range(200)]


def test_drawn_splits_are_disjoint_complete_and_in_order():
    splits = MemorySource(ROWS, dev_size=0.1, test_size=30).splits(text_of)
    assert len(splits.test) == 30
    assert 18 <= len(splits.dev) <= 20  # texts come in twos and threes here, and stay together
    assert not texts(splits.train) & texts(splits.dev)
    assert not texts(splits.train) & texts(splits.test)
    assert not texts(splits.dev) & texts(splits.test)
    numbers = [int(row.origin.split()[-1]) for part in splits for row in part]
    assert sorted(numbers) == list(range(1, 201))
    assert [int(row.origin.split()[-1]) for row in splits.dev] == sorted(
        int(row.origin.split()[-1]) for row in splits.dev
    )


def test_the_seed_draws_and_the_order_of_rows_does_not():
    splits = MemorySource(ROWS, seed=5).splits(text_of)
    assert texts(splits.dev) == texts(MemorySource(ROWS[::-1], seed=5).splits(text_of).dev)
    assert texts(splits.dev) != texts(MemorySource(ROWS, seed=6).splits(text_of).dev)


def test_hash_order_is_pinned():
    assert hash_order(map(str, range(8)), 3) == [
        "0",
        "3",
        "2",
        "1",
        "6",
        "4",
        "5",
        "7",
    ]  # a change here moves everybody's splits


def test_given_files_are_kept_and_nothing_of_them_is_drawn(tmp_path, caplog):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"t{i},x\n" for i in range(40)))
    (tmp_path / "dev.csv").write_text("text,label\nT3,x\nnew,x\n")
    source = FileSource(train=str(tmp_path / "train.csv"), dev=str(tmp_path / "dev.csv"), test_size=36)
    with caplog.at_level(logging.WARNING):
        splits = source.splits(text_of)
    assert [text_of(row) for row in splits.dev] == ["T3", "new"]
    assert len(splits.test) == 36
    assert len(splits.train) == 4
    assert not texts(splits.dev) & texts(splits.test)
    assert "1 of 40 rows are also in dev or test" in caplog.text


def test_all_files_given(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}')
    source = FileSource(**{name: str(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "test")})
    assert [[text_of(row) for row in part] for part in source.splits(text_of)] == [["train"], ["dev"], ["test"]]


def test_too_few_rows_and_bad_sizes():
    rows = [Row({"text": text}) for text in ("a", "A", " a", "b")]
    with pytest.raises(
        UserError, match=r"t\.csv: 4 rows with 2 distinct texts are too few .* give dev= and test= files"
    ):
        draw_splits(rows, text_of, dev_size=1, test_size=1, seed=0, name="t.csv")
    for size in (1.5, -0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"dev_size={size} must be a share below 1, or a whole number of rows"):
            draw_splits(rows, text_of, dev_size=size, test_size=0, seed=0)
    drawn = draw_splits(rows, text_of, dev_size=1, test_size=0, seed=0)
    assert drawn.train
    assert drawn.dev
    assert not drawn.test


def test_config_round_trip_and_its_errors(tmp_path):
    source = FileSource(train=tmp_path / "a.csv", dev_size=7, quotes=False)
    assert source_from_config(source.to_config()) == source
    assert MemorySource(ROWS).to_config() is None
    assert source_from_config(None) is None
    with pytest.raises(UserError, match=r"'fil' is not known.*Did you mean 'file'"):
        source_from_config({"kind": "fil"})
    with pytest.raises(UserError, match=r"source kind \['file'\] is not known"):
        source_from_config({"kind": ["file"]})
    with pytest.raises(UserError, match="trian"):
        source_from_config({"kind": "file", "trian": "a"})
    with pytest.raises(UserError, match=r"format='jsnol'.*Did you mean 'jsonl'"):
        FileSource("a", format="jsnol")
    with pytest.raises(UserError, match="train: no rows"):
        MemorySource([])
