"""The four other tasks of DePT's paper: WinoGrande, Yelp-2, SciTail and PAWS-Wiki.

WinoGrande: Sakaguchi et al. 2020, arXiv 1907.10641. Yelp-2: Zhang et al. 2015, arXiv 1509.01626. SciTail: Khot et al.
2018. PAWS: Zhang et al. 2019, arXiv 1904.01130.
"""

from __future__ import annotations

from typing import Any

from deptjax.data.paper_splits import PaperSplits
from deptjax.data.paper_tasks import LARGE_STEPS, PaperSettings, hub, paper_task
from deptjax.data.row_formats import Columns, RowFormat, column_text, register_row_format

YELP_TRAIN_ROWS = 100_000


def _options(values: Columns, paper_compat: bool) -> dict[str, Any]:
    """Returns WinoGrande's second option: the paper's code shows the first one twice, and the second never."""
    return {"option2": column_text(values, "option1" if paper_compat else "option2")}


register_row_format("winogrande", RowFormat(_options))

TASKS = (
    paper_task(
        "winogrande",
        PaperSplits(hub("allenai/winogrande", "winogrande_xl"), "large"),
        "sentence: {sentence} option0: {option1} option1: {option2}",
        ("1", "2"),  # which option fills the gap; spoken as 0 and 1
        target="{answer}",
        row_format="winogrande",
    ),
    paper_task(
        "yelp_polarity",
        PaperSplits(hub("fancyzhx/yelp_polarity", dev="test", test="test"), "large", train_rows=YELP_TRAIN_ROWS),
        "sentence: {text}",
        ("negative", "positive"),
        settings=PaperSettings(steps=LARGE_STEPS),
    ),
    paper_task(
        "scitail",
        PaperSplits(hub("allenai/scitail", "snli_format"), "small"),
        "premise: {sentence1} hypothesis: {sentence2}",
        ("entailment", "neutral"),
        target="{gold_label}",
    ),
    paper_task(
        "paws",
        PaperSplits(hub("google-research-datasets/paws", "labeled_final", test="test"), "official"),
        "sentence1: {sentence1} sentence2: {sentence2}",
        ("different", "paraphrase"),
    ),
)
