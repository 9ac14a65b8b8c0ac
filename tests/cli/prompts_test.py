"""`deptjax predict` with several prompts: which of them answers a row, and texts that are generated."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from deptjax.prompt import Prompt
from tests.cli.conftest import Command, Ended, Tuned

FILMS = [f"the film number {i} was good" for i in range(7)]
NEWS = [{"title": f"news {i}", "body": "very bad " * (i % 3) + "bad"} for i in range(5)]


def variant(tuned: Tuned, folder: pathlib.Path, **task: Any) -> pathlib.Path:
    """Saves the tuned prompt for another task."""
    prompt = Prompt.load(tuned.prompt)
    return dataclasses.replace(prompt, task={**prompt.task, **task}).save(folder)


@pytest.fixture
def news(tuned: Tuned, tmp_path: pathlib.Path) -> pathlib.Path:
    """A prompt for a task of two columns."""
    labels = ["film", "story", "actor"]
    return variant(tuned, tmp_path / "news" / "prompt", name="news", input="{title} {body} :", labels=labels)


@pytest.fixture
def writer(tuned: Tuned, tmp_path: pathlib.Path) -> pathlib.Path:
    """A prompt for a task of free text."""
    free = {"labels": [], "metrics": ["exact_match"], "max_target_length": 5}
    return variant(tuned, tmp_path / "writer" / "prompt", name="writer", **free)


def written(file: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    """Writes rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answers(ended: Ended) -> list[dict[str, Any]]:
    """Returns the answers of a command that ended well."""
    assert ended.status == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def mixed(field: str, films: str) -> list[dict[str, Any]]:
    """Returns rows of two tasks by turns."""
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(FILMS):
        rows.append({field: films, "text": text})
        rows += [{field: "news", **NEWS[i]}] if i < len(NEWS) else []
    return rows


@pytest.mark.parametrize(("name", "field"), [(None, "task"), ("my-films", "task"), (None, "kind")])
def test_each_row_is_answered_by_the_prompt_of_its_task(
    deptjax: Command, tuned: Tuned, news: pathlib.Path, tmp_path: pathlib.Path, name: str | None, field: str
) -> None:
    films = name or "films"
    rows = mixed(field, films)
    prompt = tuned.prompt if name is None else f"{name}={tuned.prompt}"
    words = ["--prompt", prompt, "--prompt", news, "--scores", "--batch-size", 4]
    words += [] if field == "task" else ["--task-field", field]
    together = answers(deptjax("predict", *words, written(tmp_path / "rows.jsonl", rows)))
    assert [
        {key: value for key, value in row.items() if key not in ("prediction", "scores")} for row in together
    ] == rows
    for task, place in ((films, tuned.prompt), ("news", news)):
        own = written(tmp_path / f"{task}.jsonl", [row for row in rows if row[field] == task])
        alone = answers(deptjax("predict", "--prompt", place, own, "--scores"))
        mine = [row for row in together if row[field] == task]
        assert [row["prediction"] for row in mine] == [row["prediction"] for row in alone]
        for ours, theirs in zip(mine, alone, strict=True):
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
    assert {tuple(row["scores"]) for row in together} == {("negative", "positive"), ("film", "story", "actor")}


def test_task_names_that_of_all_rows(
    deptjax: Command, tuned: Tuned, news: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("predict", "--prompt", tuned.prompt, "--prompt", news)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(FILMS) + "\n")
    alone = answers(deptjax("predict", "--prompt", tuned.prompt, file))
    assert answers(deptjax(*words, file, "--task", "films")) == alone
    assert f"{file}: a bare text names no task; say --task NAME, or give JSON lines" in deptjax(*words, file).error
    told = "--task: no prompt is for task 'flims'; there are: films, news. Did you mean 'films'?"
    assert deptjax(*words, file, "--task", "flims").error == told
    assert "both say which task a row is of" in deptjax(*words, file, "--task", "news", "--task-field", "x").error


def test_one_prompt_does_not_look_at_a_column_named_task(
    deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path
) -> None:
    file = written(tmp_path / "rows.jsonl", [{"text": FILMS[0], "task": 7}])
    assert answers(deptjax("predict", "--prompt", tuned.prompt, file))[0]["task"] == 7
    asked = deptjax("predict", "--prompt", tuned.prompt, file, "--task-field", "task")
    assert asked.error == f"{file}, line 1: field 'task' is 7; it must hold the name of a task"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"task": "mews", "title": "x", "body": "y"},
            "no prompt is for task 'mews'; there are: films, news. Did you mean",
        ),
        (
            {"tsk": "news", "text": "x"},
            "no field 'task', which names the row's task; --task-field names another, --task",
        ),
        ({"tsk": "news", "text": "x"}, "Did you mean 'tsk'?"),
        ({"task": ["news"], "text": "x"}, "field 'task' is ['news']; it must hold the name of a task"),
        ({"task": "news", "text": "x"}, "no column 'title', which the input template '{title} {body} :' names"),
        ({"task": "films", "title": "x"}, "no column 'text', which the input template"),
    ],
)
def test_a_row_that_no_prompt_can_answer_is_told_before_any_work(
    deptjax: Command, tuned: Tuned, news: pathlib.Path, tmp_path: pathlib.Path, row: dict[str, Any], told: str
) -> None:
    file = written(tmp_path / "rows.jsonl", [*mixed("task", "films"), row])
    ended = deptjax("predict", "--prompt", tuned.prompt, "--prompt", news, "--model", tmp_path / "nowhere", file)
    assert ended.error.startswith(f"{file}, line 13: ")
    assert told in ended.error


def test_prompts_that_do_not_go_together(
    deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path, news: pathlib.Path
) -> None:
    again = variant(tuned, tmp_path / "again")
    error = deptjax("predict", "--prompt", tuned.prompt, "--prompt", again, "x").error
    assert error.startswith(f"--prompt {again} and {tuned.prompt} are both for task 'films'; give one another name")
    assert "write --prompt NAME=DIR" in deptjax("predict", "--prompt", "=x", "x").error
    prompt = Prompt.load(news)
    other = dataclasses.replace(prompt, fingerprint={**prompt.fingerprint, "layers": 99}).save(tmp_path / "other")
    file = written(tmp_path / "rows.jsonl", mixed("task", "films"))
    assert f"{other} was tuned on" in deptjax("predict", "--prompt", tuned.prompt, "--prompt", other, file).error


def test_a_folder_may_have_an_equals_sign_in_its_name(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    odd = variant(tuned, tmp_path / "rate=0.3")
    file = written(tmp_path / "rows.jsonl", [{"text": FILMS[0]}])
    assert len(answers(deptjax("predict", "--prompt", odd, file))) == 1
    assert len(answers(deptjax("predict", "--prompt", f"films={odd}", file))) == 1


def test_generated_texts_follow_the_flags(deptjax: Command, writer: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = written(tmp_path / "rows.jsonl", [{"text": text} for text in FILMS])
    words = ("predict", "--prompt", writer, file)
    greedy = answers(deptjax(*words))
    assert all(set(row) == {"text", "prediction"} for row in greedy)
    assert answers(deptjax(*words, "--num-beams", 1)) == greedy  # the length is the task's where none is given
    longer = answers(deptjax(*words, "--max-new-tokens", 9, "--min-new-tokens", 9))
    assert all(len(a["prediction"]) > len(b["prediction"]) for a, b in zip(longer, greedy, strict=True))
    beams = answers(deptjax(*words, "--num-beams", 3, "--num-return", 2, "--early-stopping", "never"))
    for row in beams:
        first, second = row["candidates"]
        assert row["prediction"] == first["text"].strip()
        assert first["score"] >= second["score"]
    word = greedy[0]["prediction"].split()[1]
    assert word not in answers(deptjax(*words, "--stop", word, "--stop", r"\n"))[0]["prediction"]
    sampled = [answers(deptjax(*words, "--sample", "--temperature", 3, "--seed", seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_flags_of_generation_that_mean_nothing_are_told(
    deptjax: Command, tuned: Tuned, writer: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = written(tmp_path / "rows.jsonl", [{"text": FILMS[0], "candidates": 1}])
    words = ("predict", "--prompt", writer, file)
    error = deptjax("predict", "--prompt", tuned.prompt, file, "--num-beams", 2).error
    assert error == "--num-beams: nothing is generated here, for the answers are labels; leave it out"
    told = "--top-p is 0.5, but nothing is sampled; set --sample, or leave --top-p out"
    assert deptjax(*words, "--top-p", 0.5).error == told
    told = "--max-new-tokens is 0, expected a whole number of at least 1"
    assert deptjax(*words, "--max-new-tokens", 0).error == told
    told = "--num-return is 2, but there are 1 beams; set --num-beams or --sample"
    assert deptjax(*words, "--num-return", 2).error == told
    told = "--temperature is 0.0, expected a number above 0; greedy is --no-sample"
    assert deptjax(*words, "--sample", "--temperature", 0).error == told
    assert "--num-beams: num_beams 'x' is not a whole number" in deptjax(*words, "--num-beams", "x").error
    assert "--early-stopping is 'soon', expected" in deptjax(*words, "--num-beams", 2, "--early-stopping", "soon").error
    told = f"{file}, line 1: the answer has a field 'candidates' too; rename that of the input"
    assert deptjax(*words, "--num-beams", 2, "--num-return", 2).error == told
    assert len(answers(deptjax(*words))) == 1
