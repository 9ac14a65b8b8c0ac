"""Few-shot sampling: sizes and balance of the default, and the paper's code sampler step by step."""

from __future__ import annotations

import collections

import datasets
import numpy as np
import pytest

from deptjax.data.few_shot import few_shot_rows
from deptjax.data.sources import MemorySource
from deptjax.data.tasks import Task, get_task
from deptjax.data.templates import Row
from deptjax.errors import UserError

LABELS = {2: ("no", "yes"), 3: ("no", "maybe", "yes")}


def rows_of(classes: int, count: int = 300) -> list[Row]:
    """Returns rows whose label is not balanced: the first class has half of them."""
    random = np.random.default_rng(1)
    weights = np.array([2.0, *[1.0] * (classes - 1)])
    drawn = random.choice(LABELS[classes], count, p=weights / weights.sum())
    return [Row({"text": f"text {i}", "label": str(label)}) for i, label in enumerate(drawn)]


def sample(classes: int, k: int, seed: int = 42, **fields) -> list[str]:
    """Returns the labels of a sample, in its order."""
    rows = few_shot_rows(
        rows_of(classes), k, seed=seed, class_of=lambda row: str(row.values["label"]), classes=LABELS[classes], **fields
    )
    assert len({row.values["text"] for row in rows}) == len(rows)
    return [str(row.values["label"]) for row in rows]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("k", [4, 16, 32])
def test_k_rows_as_balanced_as_can_be(classes: int, k: int) -> None:
    counts = collections.Counter(sample(classes, k))
    assert counts.total() == k
    assert max(counts.values()) - min(counts.values()) == (1 if k % classes else 0)
    assert [counts[label] for label in LABELS[classes]] == sorted(counts.values(), reverse=True)


def test_the_order_is_that_of_the_library_datasets() -> None:
    rows = rows_of(2)
    theirs = datasets.Dataset.from_list([dict(row.values) for row in rows]).shuffle(seed=42)["text"]
    drawn = few_shot_rows(rows, 40, seed=42, class_of=None, classes=())
    assert [row.values["text"] for row in drawn] == list(theirs)[:40]


def test_the_seed_decides_which_rows() -> None:
    drawn = [
        few_shot_rows(rows_of(2), 16, seed=seed, class_of=lambda row: str(row.values["label"]), classes=LABELS[2])
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("seed", range(6))
def test_the_papers_sampler_with_two_classes(seed: int) -> None:
    """The first k - 1 rows fill both shares as far as they come; the k-th is the next row, whatever its label."""
    labels = [row.values["label"] for row in rows_of(2)]
    order = [labels[i] for i in np.random.default_rng(seed).permutation(len(labels))]
    counts, expected = {"no": 0, "yes": 0}, []
    for label in order:
        if sum(counts.values()) == 4:
            break
        if counts[label] < 2 or sum(counts.values()) == 3:
            counts[label] += 1
            expected.append(label)
    assert sample(2, 4, seed, paper_compat=True) == expected


def test_the_papers_sampler_loses_the_balance_or_two_rows() -> None:
    uneven = [collections.Counter(sample(2, 4, seed, paper_compat=True)) for seed in range(20)]
    assert {tuple(sorted(counts.values())) for counts in uneven} == {(2, 2), (1, 3)}
    assert collections.Counter(sample(3, 32, paper_compat=True)) == dict.fromkeys(LABELS[3], 10)
    assert [len(sample(3, k, paper_compat=True)) for k in (4, 16)] == [4, 16]


def test_without_classes_the_first_of_the_order() -> None:
    rows = rows_of(2)
    drawn = few_shot_rows(rows, 5, seed=3, class_of=None, classes=())
    assert list(drawn) == [rows[i] for i in np.random.default_rng(3).permutation(len(rows))[:5]]


def test_a_task_samples_its_training_rows_alone() -> None:
    rows = [dict(row.values) for row in rows_of(3)]
    task = Task("t", MemorySource(rows, rows[:9], rows[:8]), "{text}", labels=LABELS[3], few_shot=6)
    data = task.load()
    assert (len(data.train), len(data.dev), len(data.test)) == (6, 9, 8)
    assert collections.Counter(map(task.label_of, data.train)) == dict.fromkeys(LABELS[3], 2)
    assert Task.from_config({**task.to_config(), "source": None}).few_shot == 6
    assert "few_shot_seed" not in task.to_config()


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="few_shot=2 is less than one row for each of 3 classes; ask for at least 3"):
        sample(3, 2)
    with pytest.raises(UserError, match="few_shot=400 is more than the 300 training rows"):
        sample(2, 400)
    with pytest.raises(UserError, match=r"few_shot=300: the training rows lack \d+ of 'yes'; ask for fewer"):
        sample(2, 300)
    with pytest.raises(UserError, match="few_shot=0 must be at least 1"):
        get_task("cola", few_shot=0)
    with pytest.raises(UserError, match="few_shot_seed=-1 must be 0 or more"):
        get_task("cola", few_shot_seed=-1)
    with pytest.raises(UserError, match=r"'few_shots' is not a field of a task .* Did you mean 'few_shot'"):
        get_task("cola", few_shots=4)
