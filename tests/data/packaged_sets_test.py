"""The packaged sets as they come out of the real package: sizes, labels, disjoint and fixed splits."""

from __future__ import annotations

import collections
import hashlib

import pytest

from deptjax.data.packaged_sets import PackagedSource
from deptjax.data.sources import normalized
from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError

# Everybody's numbers are about the same test rows: a change of a hash makes old scores incomparable.
SETS = {
    "trec6": (
        (4080, 300, 1000),
        {"person": 1215, "number": 858, "description": 1152, "entity": 1245, "location": 824, "abbreviation": 86},
        "504bc7cfb463e848",
    ),
    "sms_spam": ((3211, 300, 1000), {"ham": 3954, "spam": 557}, "5bcc4f0b610b892b"),
    "movie_sentiment": ((7871, 300, 1000), {"negative": 4574, "positive": 4597}, "b8fe303af4ee94ae"),
    "amazon_sentiment": ((1747, 200, 500), {"positive": 1508, "negative": 939}, "bf45264d7d52472c"),
    "tweet_sentiment": ((1907, 200, 500), {"positive": 1800, "negative": 807}, "a8b5b2f9b7724a4f"),
    "nyt_sentiment": ((2231, 200, 500), {"negative": 1756, "positive": 1175}, "a438352931aaa8aa"),
    "sarcasm": ((27198, 300, 1000), {"no": 14950, "yes": 13548}, "03a60b3ce3ca24cb"),
    "quartz": ((2542, 300, 1000), {"A": 1921, "B": 1921}, "e87523665db2afb0"),
    "social_iqa": ((1503, 200, 500), {"A": 717, "B": 746, "C": 740}, "ef8e951f20df295f"),
    "bbc_topics": (
        (1396, 200, 500),
        {"business": 501, "sports": 500, "entertainment": 365, "politics": 397, "tech": 333},
        "b33539442901eb2c",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_packaged_set(name):
    sizes, labels, test_hash = SETS[name]
    data = get_task(name).load()
    column = data.task.input_template.columns[0]
    assert (len(data.train), len(data.dev), len(data.test)) == sizes
    texts = [normalized(row.values[column]) for part in (data.train, data.dev, data.test) for row in part]
    assert len(set(texts)) == len(texts)
    counts = collections.Counter(row.values["label"] for part in (data.train, data.dev, data.test) for row in part)
    assert counts == labels
    assert set(data.task.labels) == set(labels)
    test = "\n".join(normalized(row.values[column]) for row in data.test)
    assert hashlib.sha256(test.encode()).hexdigest()[:16] == test_hash


def rows_of(name: str) -> dict[str, dict[str, object]]:
    """Returns a set's rows by the text of the column that their template names first."""
    data = get_task(name).load()
    column = data.task.input_template.columns[0]
    return {row.values[column]: row.values for row in (*data.train, *data.dev, *data.test)}


def test_rows_of_every_reader():
    question = "Eric adds more resistors to the series circuit. The resistance"
    assert rows_of("quartz")[question] == {"question": question, "a": "increases", "b": "decreases", "label": "A"}
    question = "bailey was a nice person so she called the family together. What will happen to Others?"
    choices = {"a": "talk to the family", "b": "hate bailey", "c": "thank bailey"}
    assert rows_of("social_iqa")[question] == {"question": question, **choices, "label": "C"}
    headlines = rows_of("sarcasm")
    assert headlines["dad clarifies this not a food stop"]["label"] == "yes"
    assert headlines["eat your veggies: 9 deliciously different recipes"]["label"] == "no"
    assert rows_of("tweet_sentiment")["LMAO, AMAZING!"]["label"] == "positive"
    assert not any("&amp;" in text for text in rows_of("tweet_sentiment"))
    news = rows_of("bbc_topics")["Ad sales boost Time Warner profit"]
    assert (news["label"], news["text"][:37]) == ("business", "Quarterly profits at US media giant T")
    assert "(£600m)" in news["text"]
    assert not any("Â£" in row["text"] or "\ufffd" in row["text"] for row in rows_of("bbc_topics").values())


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
