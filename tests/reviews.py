"""A task that a tiny backbone can learn: the sentiment of made-up film reviews."""

from __future__ import annotations

import dataclasses

import numpy as np

from deptjax.data.sources import MemorySource
from deptjax.data.tasks import Task
from deptjax.prompt import Prompt
from tests.cases import Case

WORDS = {"positive": ("good", "great", "fine", "bright", "happy"), "negative": ("bad", "awful", "dull", "sad")}
FILLER = "a the film story plot actor scene ending is was very it this that and".split()


def review_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Returns reviews of 3 to 12 words, one of which tells the label."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = ("positive", "negative")[i % 2]
        words = [str(w) for w in random.choice(FILLER, random.integers(2, 12))]
        words.insert(int(random.integers(0, len(words) + 1)), str(random.choice(WORDS[label])))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def review_task(train: int = 48, dev: int = 16, **fields: object) -> Task:
    """Returns the task, with the rows in memory."""
    source = MemorySource(review_rows(train), review_rows(dev, seed=1), review_rows(dev, seed=2))
    settings = {"input": "text : {text}\nlabel :", "target": "{label}", "labels": ("negative", "positive")}
    return Task(name="reviews", source=source, **{**settings, **fields})


def review_prompt(case: Case, max_length: int = 13, **fields: object) -> Prompt:
    """Returns a case's moved parameters as a prompt for the task, without its rows."""
    return case.prompt(dataclasses.replace(review_task(**fields), source=None).to_config(), max_length)
