"""The paper's splits: the shuffle against torch's own, and which official rows go where."""

from __future__ import annotations

import pytest
import torch

from deptjax.data.paper_splits import PaperSplits, torch_permutation
from deptjax.data.sources import FileSource, MemorySource, Splits, source_from_config
from deptjax.errors import UserError


def official(train: int, dev: int, test: int) -> MemorySource:
    """Returns official splits of so many rows, each with a text of its own."""
    sizes = {"train": train, "validation": dev, "test": test}
    return MemorySource(*([{"text": f"{name} {i}"} for i in range(size)] for name, size in sizes.items()))


def texts(rows) -> list[str]:
    return [row.values["text"] for row in rows]


def divided(kind: str, *sizes: int, **fields) -> Splits:
    return PaperSplits(official(*sizes), kind, **fields).splits(str)


@pytest.mark.parametrize(("count", "seed"), [(0, 42), (1, 42), (2, 42), (277, 42), (9815, 42), (67349, 42), (100, 7)])
def test_the_shuffle_is_torchs(count: int, seed: int) -> None:
    theirs = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    assert torch_permutation(count, seed) == theirs


def test_small_sets_halve_their_validation_rows() -> None:
    splits = divided("small", 6, 277, 5)
    order = torch.randperm(277, generator=torch.Generator().manual_seed(42)).tolist()
    assert texts(splits.train) == [f"train {i}" for i in range(6)]
    assert texts(splits.dev) == [f"validation {i}" for i in order[:138]]
    assert texts(splits.test) == [f"validation {i}" for i in order[138:]]


def test_large_sets_take_a_thousand_of_their_training_rows() -> None:
    splits = divided("large", 1500, 3, 4)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(42)).tolist()
    assert texts(splits.dev) == [f"train {i}" for i in order[:1000]]
    assert texts(splits.train) == [f"train {i}" for i in order[1000:]]
    assert texts(splits.test) == [f"test {i}" for i in range(4)]
    assert divided("large", 1500, 3, 4, train_rows=120).train == splits.train[:120]


def test_official_splits_are_left_alone() -> None:
    assert [len(part) for part in divided("official", 5, 4, 3)] == [5, 4, 3]


def test_another_seed_is_another_draw() -> None:
    assert divided("small", 2, 50, 2, seed=1) != divided("small", 2, 50, 2)


def test_a_row_for_each_answer() -> None:
    rows = [{"q": "a", "answers": ["x", "y"]}, {"q": "b", "answers": []}]
    splits = PaperSplits(MemorySource(rows, rows, rows), "official", row_each="answers").splits(str)
    assert [row.values["answers"] for row in splits.train] == [["x"], ["y"], []]
    assert splits.test[0].values["answers"] == ["x", "y"]


def test_config() -> None:
    source = PaperSplits(FileSource("train.jsonl", "dev.jsonl", "test.jsonl"), "large", train_rows=9)
    assert source_from_config(source.to_config()) == source
    assert PaperSplits(official(2, 2, 2), "small").to_config() is None


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"kind 'smal' is not one of small, large, official\. Did you mean 'small'"):
        divided("smal", 2, 2, 2)
    with pytest.raises(UserError, match="1000 training rows are too few to take 1000 from, with some left"):
        divided("large", 1000, 2, 2)
    with pytest.raises(UserError, match="1 validation rows are too few to take 1 from"):
        divided("small", 2, 1, 2)
    with pytest.raises(UserError, match="source 'glue' is no source of rows"):
        PaperSplits("glue", "small")
    with pytest.raises(UserError, match="seed=-1 must be from 0 to 4294967295"):
        divided("small", 2, 4, 2, seed=-1)
    with pytest.raises(UserError, match="train_rows=0 must be at least 1"):
        divided("small", 2, 4, 2, train_rows=0)
