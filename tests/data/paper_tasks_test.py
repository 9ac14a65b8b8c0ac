"""Every task of the paper on a few made-up rows with the columns of the real sets: text, labels, splits, metrics."""

from __future__ import annotations

import dataclasses
import pathlib
import unicodedata
from typing import Any, NamedTuple

import datasets
import pytest
import regex

from deptjax.data import glue, mrqa, others, superglue
from deptjax.data.mrqa import spaced_punctuation
from deptjax.data.paper_tasks import paper_settings
from deptjax.data.row_formats import RowFormat, register_row_format
from deptjax.data.sources import MemorySource
from deptjax.data.tasks import Task, get_task
from deptjax.data.templates import Row
from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor
from deptjax.methods import DePT
from deptjax.training.population import train_population
from deptjax.training.run import train
from tests.cases import backbone_of

PAPER = {task.name: task for module in (glue, superglue, mrqa, others) for task in module.TASKS}


class Case(NamedTuple):
    """One row as the hub has it, and what the task makes of it."""

    row: dict[str, Any]
    source: str
    target: str
    label: str = ""  # for tasks with labels
    varied: str = ""  # the column that `rows_of` changes


def pair(one: str, other: str, target: int, label: str, columns: str = "", **more: Any) -> Case:
    """Returns a case with two texts, whose columns are named like their words in the template."""
    first, second = columns.split() or (one, other)
    row = {first: "It rains .", second: "It is wet .", "label": target, "idx": 7, **more}
    return Case(row, f"{one}: It rains . {other}: It is wet .", str(target), label, first)


def answered(**more: Any) -> Case:
    row = {"question": "Who won (in 1999)?", "context": "Ann won, not Bob.", "answers": ["Ann", "Ann B."], **more}
    source = "question: Who won ( in 1999 ) ? context: Ann won , not Bob ."
    return Case(row, source, "Ann", varied="context")


WSC = {
    "text": "Mark told Pete many lies about himself, which he believed.",
    "span1_index": 0,
    "span1_text": "Mark",
    "span2_index": 8,
    "span2_text": "he",
    "label": 0,
}
CASES = {
    "cola": Case({"sentence": "They slept .", "label": 1}, "sentence: They slept .", "1", "acceptable", "sentence"),
    "sst2": Case({"sentence": "dull ", "label": 0}, "sentence: dull ", "0", "negative", "sentence"),
    "mrpc": pair("sentence1", "sentence2", 1, "equivalent"),
    "qqp": pair("question1", "question2", 0, "not_duplicate"),
    "mnli": pair("premise", "hypothesis", 2, "contradiction"),
    "qnli": pair("question", "sentence", 0, "entailment"),
    "rte": pair("sentence1", "sentence2", 1, "not_entailment"),
    "stsb": Case(
        {"sentence1": "A man plays .", "sentence2": "A dog runs .", "label": 3.5299999713897705},
        "sentence1: A man plays . sentence2: A dog runs .",
        "3.6",
        varied="sentence1",
    ),
    "boolq": pair("question", "passage", 1, "true"),
    "wic": Case(
        {"word": "bank", "sentence1": "A river bank .", "sentence2": "A bank note .", "start1": 8, "label": 0},
        "sentence1: A river bank . sentence2: A bank note . word: bank",
        "0",
        "false",
        "sentence1",
    ),
    "wsc": Case(WSC, "text: * Mark * told Pete many lies about himself, which # he # believed.", "0", "false", "text"),
    "cb": pair("premise", "hypothesis", 2, "neutral"),
    "copa": Case(
        {"premise": "It rained .", "choice1": "Wet .", "choice2": "Dry .", "question": "effect", "label": 0},
        "premise: It rained . choice1: Wet . choice2: Dry .",
        "0",
        "choice1",
        "premise",
    ),
    "superglue_rte": pair("premise", "hypothesis", 0, "entailment"),
    "multirc": Case(
        {
            "paragraph": "<b>Sent 1: </b>Ann &amp; Bob <i>ran</i>.<br><b>Sent 2: </b>2 < 3.<br/>",
            "question": "Who ran?",
            "answer": "Ann",
            "idx": {"paragraph": 3, "question": 14, "answer": 60},
            "label": 1,
        },
        "question: Who ran? answer: Ann paragraph: Sent 1: Ann & Bob ran. Sent 2: 2 < 3.",
        "1",
        "true",
        "paragraph",
    ),
    "record": Case(
        {
            "passage": "Ann ran.\n@highlight\nBob sat\n@highlight\nIt rained",
            "query": "@placeholder ran",
            "entities": ["Ann", "Bob"],
            "answers": ["Ann", "Bob"],
        },
        "record query: @placeholder ran entities: Ann, Bob passage: Ann ran. Bob sat. It rained",
        "Ann",
        varied="query",
    ),
    "squad": answered(answers={"text": ["Ann", "Ann B."], "answer_start": [0, 0]}, title="x"),
    "nq": answered(),
    "hotpotqa": answered(),
    "searchqa": answered(),
    "newsqa": answered(),
    "winogrande": Case(
        {"sentence": "Ann paid Bob as _ was rich .", "option1": "Ann", "option2": "Bob", "answer": "2"},
        "sentence: Ann paid Bob as _ was rich . option0: Ann option1: Bob",
        "1",
        "2",
        "sentence",
    ),
    "yelp_polarity": Case({"text": "Good food .", "label": 1}, "sentence: Good food .", "1", "positive", "text"),
    "scitail": pair("premise", "hypothesis", 0, "entailment", "sentence1 sentence2", gold_label="entailment"),
    "paws": pair("sentence1", "sentence2", 1, "paraphrase"),
}
NUMBERS = ("0.0", "1.4", "2.6", "4.8")


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """Returns rows that differ in their text, with all labels in turn."""
    case, labels = CASES[name], PAPER[name].labels or ()
    made = []
    for i in range(count):
        row = {**case.row, case.varied: f"{case.row[case.varied]} {i}"}
        if labels:
            row[PAPER[name].target.strip("{}")] = labels[i % len(labels)]
        elif name == "stsb":
            row["label"] = float(NUMBERS[i % len(NUMBERS)])
        made.append(row)
    return made


def task_on(name: str, train: int = 12, dev: int = 8, test: int = 6, **fields: Any) -> Task:
    """Returns the task with made-up official splits."""
    task = get_task(name, **fields)
    official = MemorySource(*(rows_of(name, count) for count in (train, dev, test)))
    return dataclasses.replace(task, source=dataclasses.replace(task.source, source=official))


def test_all_tasks_of_the_paper_are_here() -> None:
    assert PAPER.keys() == CASES.keys()
    assert len(PAPER) == 25


def test_the_page_has_each_task_as_it_is() -> None:
    page = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name, task in PAPER.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` | {task.source.source.title} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        settings = paper_settings(name)
        assert cells[2] == f"`{task.input}`"
        assert cells[3] == ", ".join(task.labels or ()) or not task.labels
        assert cells[4:6] == [", ".join(task.metrics), task.source.kind]
        assert cells[6:] == [str(settings["max_length"]), f"{settings['steps']:,}"]


def test_a_set_that_is_not_to_be_had_is_told_in_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"^nyu-mll/glue/cola is not in the cache ") as caught:
        get_task("cola").load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_text_and_label_of_a_row(name: str) -> None:
    task, case = PAPER[name], CASES[name]
    row = Row(case.row, "train row 1")
    assert task.source_text(row) == case.source
    assert task.target_text(row) == case.target
    assert task.label_of(row) == (case.label or case.target)
    request = {key: value for key, value in case.row.items() if key not in ("label", "answers", "answer", "idx")}
    if name not in ("multirc",):  # whose answer belongs to the text
        assert task.source_text(request) == case.source, "a request has no label"


@pytest.mark.parametrize("name", CASES)
def test_splits_and_metrics(name: str) -> None:
    kind = PAPER[name].source.kind
    data = task_on(name, train=1020 if kind == "large" else 12).load()
    sizes = {"small": (12, 4, 4), "large": (20, 1000, 6), "official": (12, 8, 6)}[kind]
    if name == "record":  # a training row for each answer
        sizes = (40, *sizes[1:])
    assert (len(data.train), len(data.dev), len(data.test)) == sizes
    truths = [data.task.label_of(row) for row in data.dev]
    scores = data.task.score(truths, data.dev)
    assert tuple(scores) == PAPER[name].metrics
    assert all(score == pytest.approx(1.0) for score in scores.values())
    wrong = data.task.score(["nothing of the kind"] * len(truths), data.dev)
    assert all(wrong[metric] < scores[metric] for metric in wrong)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_task_is_the_same_task(name: str) -> None:
    task = get_task(name, few_shot=16, paper_compat=True)
    assert Task.from_config(task.to_config()) == task


def test_settings() -> None:
    assert paper_settings("multirc") == {"max_length": 348, "steps": 30_000, "batch_size": 32, "accumulate": 1}
    assert paper_settings("nq") == {"max_length": 512, "steps": 300_000, "batch_size": 16, "accumulate": 2}
    assert all(s["batch_size"] * s["accumulate"] == 32 for s in map(paper_settings, PAPER))
    with pytest.raises(UserError, match="task 'trec6' is not one of the paper's"):
        paper_settings("trec6")


def texts_in_both(name: str, **changed: Any) -> tuple[str, str]:
    """Returns source and target of a row as they should be, and as the paper's code has them."""
    row = Row({**CASES[name].row, **changed})
    tasks = (get_task(name), get_task(name, paper_compat=True))
    right, papers = (f"{task.source_text(row)} -> {task.target_text(row)}" for task in tasks)
    return right, papers


def test_paper_compat_shows_winograndes_first_option_twice() -> None:
    right, papers = texts_in_both("winogrande")
    assert "option0: Ann option1: Bob" in right
    assert "option0: Ann option1: Ann" in papers


@pytest.mark.parametrize(
    ("score", "right", "papers"), [(3.53, "3.6", "3.5"), (3.25, "3.2", "3.2"), (5, "5.0", "5.0"), (0.1, "0.0", "0.1")]
)
def test_paper_compat_rounds_stsb_to_tenths(score: float, right: str, papers: str) -> None:
    assert [text.rpartition(" ")[2] for text in texts_in_both("stsb", label=score)] == [right, papers]


def test_paper_compat_leaves_html_in_multirc() -> None:
    right, papers = texts_in_both("multirc")
    assert "<i>" not in right
    assert "Sent 1: Ann &amp; Bob <i>ran</i>. Sent 2: 2 < 3.<br/>" in papers


def test_wsc_marks_by_words() -> None:
    text = "Dr. (A) saw Bo. He  ran."
    spans = {"span1_index": 0, "span1_text": "Dr. (A)", "span2_index": 4, "span2_text": "He"}
    right, papers = texts_in_both("wsc", text=text, **spans)
    assert right == "text: * Dr. (A) * saw Bo. # He #  ran. -> 0"
    # The brackets are read as a group of a pattern, which the text does not fit: the noun is not marked, and the
    # pronoun is looked for two words too late.
    assert papers == f"text: {text} -> 0"
    same, as_well = texts_in_both("wsc")
    assert same == as_well
    before, _ = texts_in_both("wsc", span1_index=4, span1_text="lies", span2_index=0, span2_text="Mark")
    assert before.startswith("text: # Mark # told Pete many * lies * about")


def test_wsc_marks_the_words_themselves_where_the_span_reads_otherwise() -> None:
    right, _ = texts_in_both("wsc", span1_text="mark")
    assert right.startswith("text: * Mark * told")
    nested, _ = texts_in_both("wsc", text="his dog ran", span1_text="his dog", span2_index=0, span2_text="his")
    assert nested.split(" -> ")[0].replace("*", "").replace("#", "").split() == ["text:", "his", "dog", "ran"]


def test_spaced_punctuation_is_t5s() -> None:
    """The classes of `regex`, on which T5's preprocessing is built, for every character that Python knows."""
    pattern = regex.compile(r"([^_\s\p{N}\p{L}\p{M}])")
    known = [chr(code) for code in range(0x20, 0x10000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    text = "".join(f"a{letter}" for letter in known)
    assert spaced_punctuation(text) == regex.sub(r"\s+", " ", pattern.sub(r" \1 ", text))
    assert spaced_punctuation("it's «A» (1,5)") == "it ' s « A » ( 1 , 5 ) "


def test_the_official_splits_by_their_names(tmp_path: pathlib.Path) -> None:
    """MNLI's dev split is the mismatched one: here from a folder with the splits of the hub."""
    names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    rows = rows_of("mnli", 6)
    splits = {name: [{**row, "premise": f"{name} {i}", "label": i % 3} for i, row in enumerate(rows)] for name in names}
    datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in splits.items()}).save_to_disk(tmp_path / "mnli")
    task = get_task("mnli")
    saved = dataclasses.replace(task.source.source, path=str(tmp_path / "mnli"))
    data = dataclasses.replace(task, source=dataclasses.replace(task.source, source=saved)).load()
    first = [part[0].values["premise"] for part in (data.train, data.dev, data.test)]
    assert first == ["train 0", "validation_mismatched 0", "validation_matched 0"]
    assert [data.task.label_of(row) for row in data.test[:3]] == ["entailment", "neutral", "contradiction"]


def test_a_few_shot_sample_of_stsb_has_two_halves() -> None:
    data = task_on("stsb", train=40, few_shot=8).load()
    low = [float(row.values["label"]) <= 2.5 for row in data.train]
    assert (len(low), sum(low)) == (8, 4)


def test_mistakes_in_rows_are_told() -> None:
    wsc, stsb = get_task("wsc"), get_task("stsb")
    with pytest.raises(UserError, match=r"^train row 2: column 'text' has no word 40, where 'he' is said to be"):
        wsc.source_text(Row({**WSC, "span2_index": 40}, "train row 2"))
    with pytest.raises(UserError, match="column 'span1_index' is missing; it must hold a text or a number"):
        wsc.source_text(Row({"text": "a b"}))
    with pytest.raises(UserError, match="column 'label' holds 'high'; it must hold a number"):
        stsb.label_of(Row({**CASES["stsb"].row, "label": "high"}))
    for bad in ("nan", "inf"):
        with pytest.raises(UserError, match=f"column 'span1_index' holds '{bad}'; it must hold a number"):
            wsc.source_text(Row({**WSC, "span1_index": bad}))
        with pytest.raises(UserError, match=f"column 'label' holds '{bad}'; it must hold a number"):
            stsb.label_of(Row({**CASES["stsb"].row, "label": bad}))
    unlabelled = {**CASES["stsb"].row, "label": None}
    assert stsb.source_text(unlabelled) == CASES["stsb"].source
    with pytest.raises(UserError, match=r"column 'label' is empty \(null\)"):
        stsb.label_of(Row(unlabelled))
    with pytest.raises(UserError, match=r"column 'text' is empty \(null\); it must hold a text or a number"):
        wsc.source_text(Row({**WSC, "text": None}))
    with pytest.raises(UserError, match=r"row_format 'wcs' is not known; .* Did you mean 'wsc'"):
        get_task("wsc", row_format="wcs")
    with pytest.raises(UserError, match="is no regular expression"):
        get_task("wsc", paper_compat=True).source_text(Row({**WSC, "span1_text": "Mark ("}))
    with pytest.raises(UserError, match="is no regular expression"):
        get_task("wsc", paper_compat=True).source_text(Row({**WSC, "span1_index": 10**12}))
    with pytest.raises(UserError, match=r"^label '7' is not one of 'unacceptable', 'acceptable'"):
        get_task("cola").label_of(Row({"sentence": "a", "label": 7}))


def test_a_row_is_formatted_once() -> None:
    calls = []

    def columns(values, paper_compat):
        calls.append(paper_compat)
        return {"text": f"<{values['text']}>"}

    register_row_format("counted", RowFormat(columns))
    rows = [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(4)]
    task = Task("t", MemorySource(rows, rows, rows), "{text}", labels=("a", "b"), row_format="counted")
    data = task.load()
    count = len(calls)
    assert [data.task.source_text(row) for row in data.train] == ["<t 0>", "<t 1>", "<t 2>", "<t 3>"]
    assert len(calls) == count


@pytest.mark.parametrize("name", ["wsc", "stsb"])
def test_trained_on_a_tiny_t5(name: str, tmp_path: pathlib.Path) -> None:
    """Labels by likelihood with computed columns, and free text; the prompt is then used on a row as the hub has it."""
    backbone, task = backbone_of("t5"), task_on(name, few_shot=8)
    method = DePT(prompt_length=3, rank=2, max_length=32)
    run = train(backbone, method, task, tmp_path, steps=2, batch_size=4, eval_every=2, buckets=1, progress=False)
    assert run.prompt is not None
    assert tuple(run.prompt.metrics) == tuple(f"dev/{metric}" for metric in task.metrics)
    assert run.prompt.task["few_shot"] == 8
    if task.labels:
        request = {key: value for key, value in CASES[name].row.items() if key != "label"}
        (answer,) = Predictor(backbone, run.prompt)([request])
        assert answer.text in task.labels


def test_all_tasks_are_tuned_in_one_run(tmp_path: pathlib.Path) -> None:
    """From rows to a prompt that is scored on the dev split: 25 members of one population, one task each."""
    settings = {"steps": 1, "batch_size": 2, "buckets": 1, "eval_examples": 4, "eval_batch_size": 4, "eval_every": 1}
    # Of a large set's training rows 1,000 become the dev split.
    tasks = [task_on(name, 1010 if PAPER[name].source.kind == "large" else 12) for name in PAPER]
    population = train_population(
        backbone_of("t5"),
        DePT(prompt_length=3, rank=2, max_length=12),  # texts are cut, so that most tasks share their programs
        None,
        tmp_path,
        [{"task": task} for task in tasks],
        loss="vocabulary",
        progress=False,
        **settings,
    )
    assert [member.ended for member in population.members] == ["finished"] * 25
    for task, member in zip(tasks, population.members, strict=True):
        assert member.task == task.name
        assert tuple(member.metrics) == tuple(f"dev/{metric}" for metric in task.metrics)
    assert set(population.prompts) == set(PAPER)
