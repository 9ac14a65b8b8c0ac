"""The packaged sets as they come out of the real package: sizes, labels, disjoint and fixed splits."""

from __future__ import annotations

import collections
import hashlib

import pytest

from deptjax.data.packaged_sets import PackagedSource
from deptjax.data.sources import normalized
from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError


@pytest.mark.parametrize(
    ("name", "train", "column", "labels", "test_hash"),
    [
        (
            "trec6",
            4080,
            "question",
            {"person": 1215, "number": 858, "description": 1152, "entity": 1245, "location": 824, "abbreviation": 86},
            "504bc7cfb463e848",
        ),
        ("sms_spam", 3211, "text", {"ham": 3954, "spam": 557}, "5bcc4f0b610b892b"),
        ("movie_sentiment", 7871, "text", {"negative": 4574, "positive": 4597}, "b8fe303af4ee94ae"),
    ],
)
def test_packaged_set(name, train, column, labels, test_hash):
    data = get_task(name).load()
    assert (len(data.train), len(data.dev), len(data.test)) == (train, 300, 1000)
    texts = [normalized(row.values[column]) for part in (data.train, data.dev, data.test) for row in part]
    assert len(set(texts)) == len(texts)
    counts = collections.Counter(row.values["label"] for part in (data.train, data.dev, data.test) for row in part)
    assert counts == labels
    # Everybody's numbers are about the same test rows: a change here makes old scores incomparable.
    test = "\n".join(normalized(row.values[column]) for row in data.test)
    assert hashlib.sha256(test.encode()).hexdigest()[:16] == test_hash
    assert set(data.task.labels) == set(labels)


def test_known_rows():
    data = get_task("trec6").load()
    labels = {row.values["question"]: row.values["label"] for row in (*data.train, *data.dev, *data.test)}
    assert labels["How did serfdom develop in and then leave Russia ?"] == "description"
    assert labels["What does BUD stand for ?"] == "abbreviation"
    row = data.test[0]
    assert data.task.source_text(row) == f"{row.values['question']}\nType:"


def test_another_template_sees_the_same_split():
    given = get_task("sms_spam")
    other = Task("other", given.source, input="SMS: {text}", labels=given.labels)
    assert other.load().test == given.load().test


def test_config_and_errors():
    task = get_task("trec6")
    assert Task.from_config(task.to_config()) == task
    with pytest.raises(UserError, match=r"no packaged set is named 'trec'.*Did you mean 'trec6'"):
        PackagedSource("trec")
