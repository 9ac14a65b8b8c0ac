"""Tasks: templates, labels, what a saved prompt stores, and errors that name row and column."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from deptjax.data.sources import FileSource, MemorySource
from deptjax.data.tasks import Task, get_task, register_task, task_names
from deptjax.data.templates import Row, Template
from deptjax.errors import UserError

ROW = Row({"question": "Who?", "label": 1, "flag": True}, "a.csv, line 2")


def make(**fields) -> Task:
    return Task(**{"name": "t", "source": None, "input": "{text}\nType:", **fields})


def rows(*labels, text="text {}"):
    return MemorySource([{"text": text.format(i), "label": label} for i, label in enumerate(labels)])


def test_template_renders_columns_braces_and_suffix():
    template = Template("{{x}} {question} is {flag}/{label}: ")
    assert template.render(ROW) == "{x} Who? is true/1: "
    assert template.columns == ("question", "flag", "label")
    assert template.suffix == ": "
    assert Template("{question}").suffix == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no column", "names no column"),
        ("{}", "bare column name"),
        ("{a:>3}", "bare column name"),
        ("{a!r}", "bare column name"),
        ("{a", "is not a template"),
        ("a}", "is not a template"),
    ],
)
def test_template_errors(text, expected):
    with pytest.raises(UserError, match=expected):
        make(input=text)
    with pytest.raises(UserError, match="target template"):
        make(target=text)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"txet": "b", "n": 1}, "f, line 3: no column 'text', .* the columns are 'txet', 'n'. Did you mean 'txet'?"),
        ({"text": None}, r"f, line 3: column 'text' is empty \(null\)"),
        ({"text": ["b"]}, "f, line 3: column 'text' is a list"),
        ({"text": " \t"}, "f, line 3: the text of column 'text' is empty"),
    ],
)
def test_rows_that_do_not_fit_the_template(values, expected):
    with pytest.raises(UserError, match=expected):
        make().source_text(Row(values, "f, line 3"))


def test_one_of_two_columns_may_be_blank():
    task = make(input="{title} {body}")
    assert task.source_text({"title": "", "body": "b"}) == " b"
    with pytest.raises(UserError, match="columns 'title', 'body' are all empty"):
        task.source_text({"title": "", "body": " "})
    with pytest.raises(UserError, match="needs the columns title, body"):
        task.source_text("b")
    assert make().source_text("b") == "b\nType:"


def test_labels_verbalizers_and_back():
    task = make(labels=("0", 1, True), verbalizers={"0": "bad"})
    assert task.labels == ("0", "1", "true")
    assert task.texts == ("bad", "1", "true")
    assert task.target_text(Row({"label": 0})) == "bad"
    assert task.label_index(Row({"label": True})) == 2
    assert task.label_from_text(" bad ") == "0"
    assert task.label_from_text("else") == "else"
    assert task.metrics == ("accuracy",)
    assert task.score(["0", "x"], [Row({"label": 0}), Row({"label": 1})]) == {"accuracy": 0.5}


def test_a_label_outside_the_set_names_line_and_set(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nb,pos\nc,postive\n")
    task = make(source=FileSource(str(tmp_path / "a.csv"), dev_size=0, test_size=0), labels=("neg", "pos", "positive"))
    with pytest.raises(
        UserError, match=r"a\.csv, line 3: label 'postive' is not one of 'neg', .*Did you mean 'positive'"
    ):
        task.load()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"labels": ("a", "a")}, "'a' is named twice"),
        ({"labels": ("a",)}, "one label, 'a'"),
        ({"labels": ("a", " ")}, "a label is empty"),
        ({"labels": "ab"}, "lists of texts"),
        ({"labels": ("aa", "b"), "verbalizers": {"ab": "x"}}, "'ab' is not one of 'aa', 'b'.*verbalizers"),
        ({"labels": ("a", "b"), "verbalizers": {"a": "b"}}, "2 labels have the text 'b'"),
        ({"labels": ("a", "b"), "positive_label": "c"}, "'c' is not one of"),
        ({"verbalizers": {"a": "b"}}, "verbalizers need labels"),
        ({"metrics": ("acuracy",)}, "'acuracy' is not one of .* Did you mean 'accuracy'"),
        ({"max_target_length": 0}, "max_target_length=0"),
    ],
)
def test_task_errors(fields, expected):
    with pytest.raises(UserError, match=expected):
        make(**fields)


def test_labels_are_inferred_when_few_and_repeated(caplog):
    with caplog.at_level(logging.WARNING):
        data = make(source=rows(*[2, True, "a"] * 10)).load()
    assert data.task.labels == ("2", "a", "true")
    assert data.task.metrics == ("accuracy",)
    assert "inferred from the rows: 2, a, true" in caplog.text
    assert len(data.train) + len(data.dev) + len(data.test) == 30


@pytest.mark.parametrize("labels", [range(30), [0, 0, 1] * 2 + [2], [i // 2 for i in range(42)], ["same"] * 9])
def test_other_targets_are_free_text(labels, caplog):
    with caplog.at_level(logging.WARNING):
        task = make(source=rows(*labels)).load().task
    assert task.labels == ()
    assert task.metrics == ("exact_match",)
    assert "taken for free text" in caplog.text
    assert task.label_index(Row({"label": "x"})) == -1


def test_named_free_text_is_not_inferred():
    assert make(source=rows(0, 1, 0, 1, 0, 1), labels=()).load().task.labels == ()


def test_an_empty_target_is_named():
    with pytest.raises(UserError, match="train row 2: the text of column 'label' is empty"):
        make(source=rows("a", "", "a", "b", "b", "b")).load()


def test_config_round_trip_through_json():
    task = make(
        source=FileSource("a.jsonl", dev="b.jsonl"),
        labels=("a", "b"),
        verbalizers={"a": "x"},
        metrics=("f1",),
        positive_label="a",
    )
    assert Task.from_config(json.loads(json.dumps(task.to_config()))) == task
    free = make(source=rows(1, 2), labels=())
    again = Task.from_config(free.to_config())
    assert again.source is None
    assert again.labels == ()
    with pytest.raises(UserError, match="has no source"):
        again.load()


def test_config_errors():
    with pytest.raises(UserError, match=r"'inptu' is not a field .* Did you mean 'input'"):
        Task.from_config({"name": "t", "inptu": "{a}"})
    with pytest.raises(UserError, match="field 'input' is missing"):
        Task.from_config({"name": "t"})


def test_registry():
    assert {"trec6", "sms_spam", "movie_sentiment"} <= set(task_names())
    with pytest.raises(UserError, match=r"no task is named 'trec'.*Did you mean 'trec6'"):
        get_task("trec")
    trec6 = get_task("trec6")
    assert register_task(trec6) is trec6
    with pytest.raises(UserError, match="registered already"):
        register_task(make(name="trec6"))


def test_accepted_answers_come_from_the_rows():
    rows = [
        {"question": "who", "answers": {"text": ["Ada Lovelace", "Lovelace"], "answer_start": [0, 4]}, "first": "x"},
        {"question": "when", "answers": ("in 1843", "1843"), "first": "y"},
        {"question": "why", "answers": [], "first": "z"},
    ]
    task = Task(
        name="squad",
        source=MemorySource(rows, dev=rows, test=rows),
        input="{question}",
        target="{first}",
        labels=(),
        metrics=("exact_match", "token_f1"),
        references="answers",
    )
    data = task.load()
    assert [task.accepted(row) for row in data.dev] == [("Ada Lovelace", "Lovelace"), ("in 1843", "1843"), ("",)]
    assert task.score(["Lovelace", "1843", ""], data.dev) == {"exact_match": 1.0, "token_f1": 1.0}
    assert task.score(["Ada", "x", "y"], data.dev)["token_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert Task.from_config({**task.to_config(), "source": None}) == dataclasses.replace(task, source=None)
    for bad, message in [
        ({"first": "x"}, r"^row 1: no column 'answers', which task 'squad' names as references; .* question, first"),
        ({"first": "x", "answers": "Ada"}, r"^row 1: column 'answers' is not a list of texts, nor a dict with one"),
        ({"first": "x", "answers": {"text": [3]}}, r"^row 1: column 'answers' is not a list of texts"),
    ]:
        with pytest.raises(UserError, match=message):
            task.accepted(Row({"question": "who", **bad}, "row 1"))


def test_groups_come_from_the_rows():
    rows = [
        {"text": f"{p} {q} {a}", "paragraph": p, "question": q, "label": a % 2}
        for p in range(2)
        for q in range(2)
        for a in range(3)
    ]
    task = Task(
        name="multirc",
        source=MemorySource(rows, dev=rows, test=rows),
        input="{text}",
        labels=("0", "1"),
        metrics=("multirc_f1a", "multirc_em"),
        group="{paragraph}-{question}",
    )
    data = task.load()
    said = ["0", "1", "0"] * 3 + ["0", "1", "1"]
    assert task.score(said, data.dev) == pytest.approx({"multirc_f1a": 2 * 4 / (2 * 4 + 1), "multirc_em": 3 / 4})
    with pytest.raises(UserError, match=r"task 'multirc': metric 'multirc_em' needs group="):
        dataclasses.replace(task, group=None)
    with pytest.raises(UserError, match=r"no column 'pararaph', which the group template"):
        dataclasses.replace(task, group="{pararaph}").load()
