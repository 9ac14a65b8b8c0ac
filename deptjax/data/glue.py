"""GLUE (Wang et al. 2019, arXiv 1804.07461): eight tasks, as the paper of DePT has them.

STS-B is free text, a number such as `3.4`: the similarity rounded to the nearest 0.2, as T5 has it (Raffel et al. 2020,
arXiv 1910.10683). The paper's code rounds to 0.1 (`paper_compat`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deptjax.data.paper_splits import PaperSplits
from deptjax.data.paper_tasks import LARGE_STEPS, PaperSettings, hub, paper_task
from deptjax.data.row_formats import Columns, RowFormat, column_number, register_row_format

_LONG = PaperSettings(steps=LARGE_STEPS)
_ENTAILMENT = ("entailment", "not_entailment")
_FEW_SHOT_BOUNDARY = 2.5  # of STS-B's scores from 0 to 5, which stand for two classes in a few-shot sample


def _glue(name: str, kind: str) -> PaperSplits:
    return PaperSplits(hub("nyu-mll/glue", name), kind)


def _rounded_similarity(values: Columns, paper_compat: bool) -> dict[str, Any]:
    if values.get("label") is None:
        return {}
    similarity = column_number(values, "label")
    # The paper's code writes round(5 x / 5, 1) where T5 has round(5 x) / 5.
    if paper_compat:
        rounded = np.round(5 * float(np.float32(similarity)) / 5, 1)  # of float32, as which the set has its scores
    else:
        rounded = np.round(5 * similarity) / 5
    return {"label": str(float(rounded))}


def _few_shot_half(target: str) -> str:
    return "low" if float(target) <= _FEW_SHOT_BOUNDARY else "high"


register_row_format("stsb", RowFormat(_rounded_similarity, _few_shot_half))

TASKS = (
    paper_task("cola", _glue("cola", "small"), "sentence: {sentence}", ("unacceptable", "acceptable"), ("matthews",)),
    paper_task("sst2", _glue("sst2", "large"), "sentence: {sentence}", ("negative", "positive")),
    paper_task(
        "mrpc",
        _glue("mrpc", "small"),
        "sentence1: {sentence1} sentence2: {sentence2}",
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
    ),
    paper_task(
        "stsb",
        _glue("stsb", "small"),
        "sentence1: {sentence1} sentence2: {sentence2}",
        metrics=("pearson", "spearman"),
        row_format="stsb",
        max_target_length=8,
    ),
    paper_task(
        "qqp",
        _glue("qqp", "large"),
        "question1: {question1} question2: {question2}",
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        settings=_LONG,
    ),
    paper_task(
        "mnli",
        PaperSplits(hub("nyu-mll/glue", "mnli", dev="validation_mismatched", test="validation_matched"), "official"),
        "premise: {premise} hypothesis: {hypothesis}",
        ("entailment", "neutral", "contradiction"),
        settings=_LONG,
    ),
    paper_task(
        "qnli", _glue("qnli", "large"), "question: {question} sentence: {sentence}", _ENTAILMENT, settings=_LONG
    ),
    paper_task("rte", _glue("rte", "small"), "sentence1: {sentence1} sentence2: {sentence2}", _ENTAILMENT),
)
