"""Questions on a text, answered by words of it: SQuAD, and four sets in the form of MRQA.

SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250. MRQA 2019 (Fisch et al., arXiv 1910.09753): Natural Questions, HotpotQA,
SearchQA, NewsQA. Punctuation stands apart from words, as in T5's preprocessing; the target is the first answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from deptjax.data.paper_splits import PaperSplits
from deptjax.data.paper_tasks import LARGE_STEPS, PaperSettings, hub, paper_task
from deptjax.data.row_formats import Columns, RowFormat, column_text, register_row_format

_SETTINGS = PaperSettings(max_length=512, steps=LARGE_STEPS, batch_size=16, accumulate=2)


def spaced_punctuation(text: str) -> str:
    """Returns the text with spaces around all but letters, numbers, accents and underscores, and no two in a row.

    >>> spaced_punctuation("Who (in 1999)?")
    'Who ( in 1999 ) ? '
    """
    return re.sub(r"\s+", " ", text.translate(_SPACED))


class _Spaced(dict[int, str]):
    """What each character becomes, found when it is first met: contexts are long, and `translate` is quick."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        # Marks, the accents that are characters of their own, are not of Python's class \w.
        kept = re.match(r"[\w\s]", letter) or unicodedata.category(letter).startswith("M")
        self[code] = letter if kept else f" {letter} "
        return self[code]


_SPACED = _Spaced()


def _question(values: Columns, paper_compat: bool) -> dict[str, Any]:
    """Returns question, context and answers with punctuation apart; `answer` is the first answer."""
    tidy = spaced_punctuation if paper_compat else lambda text: spaced_punctuation(text).strip()
    columns: dict[str, Any] = {name: tidy(column_text(values, name)) for name in ("question", "context")}
    answers = values.get("answers")
    if isinstance(answers, Mapping):  # SQuAD's own form: {"text": [...], "answer_start": [...]}
        answers = answers.get("text")
    if isinstance(answers, (list, tuple)) and answers:
        # A prediction is compared with the first answer alone, or with the best of all (the official measure).
        columns["answers"] = [tidy(str(answer)) for answer in (answers[:1] if paper_compat else answers)]
        columns["answer"] = columns["answers"][0]
    return columns


register_row_format("question", RowFormat(_question))


def _answers(name: str, path: str) -> Any:
    return paper_task(
        name,
        PaperSplits(hub(path), "large"),
        "question: {question} context: {context}",
        metrics=("exact_match", "token_f1"),
        target="{answer}",
        references="answers",
        row_format="question",
        max_target_length=20,
        settings=_SETTINGS,
    )


TASKS = (
    _answers("squad", "rajpurkar/squad"),
    _answers("nq", "lucadiliello/naturalquestionsshortqa"),
    _answers("hotpotqa", "lucadiliello/hotpotqa"),
    _answers("searchqa", "lucadiliello/searchqa"),
    _answers("newsqa", "lucadiliello/newsqa"),
)
