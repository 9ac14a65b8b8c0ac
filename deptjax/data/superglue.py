"""SuperGLUE (Wang et al. 2019, arXiv 1905.00537): seven tasks, and ReCoRD as a source of transfer.

In WSC the noun and the pronoun are marked as in T5 (Raffel et al. 2020, arXiv 1910.10683): `* Mark * told # he #`.
"""

from __future__ import annotations

import html
import re
from typing import Any

from deptjax.data.paper_splits import PaperSplits
from deptjax.data.paper_tasks import LARGE_STEPS, PaperSettings, hub, paper_task
from deptjax.data.row_formats import Columns, RowFormat, column_number, column_text, register_row_format
from deptjax.errors import UserError

_BOOLEAN = ("false", "true")


def _superglue(name: str, kind: str = "small", **fields: Any) -> PaperSplits:
    return PaperSplits(hub("aps/super_glue", name), kind, **fields)


def _without_html(values: Columns, paper_compat: bool) -> dict[str, Any]:
    """Returns MultiRC's texts as plain text."""
    plain = _only_breaks_and_bold if paper_compat else _plain_text
    return {name: plain(column_text(values, name)) for name in ("paragraph", "question", "answer")}


def _only_breaks_and_bold(text: str) -> str:
    return re.sub("</?b>", "", text.replace("<br>", " "))


def _plain_text(text: str) -> str:
    spaced = re.sub(r"<br\s*/?>|</?p\b[^<>]*>", " ", text, flags=re.IGNORECASE)
    # A tag begins with a letter: "a < b" is none.
    return " ".join(html.unescape(re.sub(r"</?[A-Za-z][^<>]*>", "", spaced)).split())


def _marked(values: Columns, paper_compat: bool) -> dict[str, Any]:
    """Returns WSC's text with ` * ` around the noun (span 1) and ` # ` around the pronoun (span 2)."""
    text = column_text(values, "text")
    spans = [(int(column_number(values, f"span{n}_index")), column_text(values, f"span{n}_text")) for n in (1, 2)]
    if paper_compat:
        (noun_at, noun), (pronoun_at, pronoun) = spans
        text = _marked_by_pattern(text, noun, noun_at, "*")
        # The two marks are words as well, in front of whatever is behind the noun.
        return {"text": _marked_by_pattern(text, pronoun, pronoun_at + 2 * (noun_at < pronoun_at), "#")}
    marks = []
    for (at, span), mark in zip(spans, "*#", strict=True):
        start, end = _place(text, at, span)
        marks += [(start, f"{mark} "), (end, f" {mark}")]
    for place, mark in sorted(marks, reverse=True):  # from the back, so that places in front stay right
        text = text[:place] + mark + text[place:]
    return {"text": text}


def _place(text: str, index: int, span: str) -> tuple[int, int]:
    """Returns where the span lies that begins with word `index`: the words there, where the text reads otherwise."""
    words = list(re.finditer(r"\S+", text))[index : index + max(1, len(span.split()))]
    if index < 0 or not words:
        raise UserError(f"column 'text' has no word {index}, where '{span}' is said to be; mend the row")
    start = words[0].start()
    return start, start + len(span) if text.startswith(span, start) else words[-1].end()


def _marked_by_pattern(text: str, span: str, index: int, mark: str) -> str:
    """Returns the text marked as the paper's code does it: the span is read as a regular expression, not as a text."""
    try:
        return re.sub(rf"^((?:\S+\s){{{index}}})({span})", rf"\1{mark} \2 {mark}", text)
    except (re.error, IndexError, OverflowError) as error:
        raise UserError(
            f"'{span}' is no regular expression ({error}), as paper_compat needs it; leave that out"
        ) from None


def _record(values: Columns, paper_compat: bool) -> dict[str, Any]:
    """Returns ReCoRD's passage with its highlights as sentences, its entities in a line, and the first answer."""
    passage = re.sub(r"""([.?!"'])\n@highlight\n""", r"\1 ", column_text(values, "passage"))
    entities, answers = values.get("entities"), values.get("answers")
    columns: dict[str, Any] = {"passage": passage.replace("\n@highlight\n", ". ")}
    if isinstance(entities, (list, tuple)):
        columns["entities"] = ", ".join(map(str, entities))
    if isinstance(answers, (list, tuple)) and answers:
        columns["answer"] = str(answers[0])
        columns["answers"] = list(answers[:1] if paper_compat else answers)
    return columns


register_row_format("multirc", RowFormat(_without_html))
register_row_format("wsc", RowFormat(_marked))
register_row_format("record", RowFormat(_record))

TASKS = (
    paper_task(
        "multirc",
        _superglue("multirc"),
        "question: {question} answer: {answer} paragraph: {paragraph}",
        _BOOLEAN,
        ("f1", "multirc_em"),
        group="{question} {paragraph}",
        row_format="multirc",
        settings=PaperSettings(max_length=348),
    ),
    paper_task("boolq", _superglue("boolq"), "question: {question} passage: {passage}", _BOOLEAN),
    paper_task("wic", _superglue("wic"), "sentence1: {sentence1} sentence2: {sentence2} word: {word}", _BOOLEAN),
    paper_task("wsc", _superglue("wsc.fixed"), "text: {text}", _BOOLEAN, row_format="wsc"),
    paper_task(
        "cb",
        _superglue("cb"),
        "premise: {premise} hypothesis: {hypothesis}",
        ("entailment", "contradiction", "neutral"),
        ("macro_f1", "accuracy"),
    ),
    paper_task(
        "copa",
        _superglue("copa"),
        "premise: {premise} choice1: {choice1} choice2: {choice2}",
        ("choice1", "choice2"),
    ),
    paper_task(
        "superglue_rte",
        _superglue("rte"),
        "premise: {premise} hypothesis: {hypothesis}",
        ("entailment", "not_entailment"),
    ),
    paper_task(
        "record",
        _superglue("record", "large", row_each="answers"),
        "record query: {query} entities: {entities} passage: {passage}",
        metrics=("token_f1", "exact_match"),
        target="{answer}",
        references="answers",
        row_format="record",
        max_target_length=20,
        settings=PaperSettings(max_length=512, steps=LARGE_STEPS, batch_size=16, accumulate=2),
    ),
)
