"""`deptjax evaluate` and `deptjax predict`: what they read, what they write, and what they leave alone."""

from __future__ import annotations

import io
import json
import pathlib
import signal
import subprocess
import sys

import pytest

from deptjax.prompt import Prompt
from deptjax.testing import tiny_llama
from tests.cli.conftest import Command, Tuned, write_rows
from tests.cli.train_test import environment, program

TEXTS = ["the film was good", "the plot was very very bad", "the actor was good", "a bad story"]


@pytest.fixture
def texts(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file of bare texts."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


class Stdin:
    """A standard input that holds bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_evaluate_prints_the_metrics_of_the_task(deptjax: Command, tuned: Tuned) -> None:
    ended = deptjax("evaluate", "--prompt", tuned.prompt, "--json")
    assert ended.status == 0, ended.err
    scores = json.loads(ended.out)
    assert list(scores) == ["test/accuracy"]
    dev = json.loads(deptjax("evaluate", "--prompt", tuned.prompt, "--split", "dev", "--json").out)
    assert dev == Prompt.load(tuned.prompt).metrics
    table = deptjax("evaluate", "--prompt", tuned.prompt).out.split()
    assert table == ["test/accuracy", f"{scores['test/accuracy']:.4f}"]


def test_evaluate_takes_all_rows_of_a_test_file(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    file = write_rows(tmp_path / "more.jsonl", 10)
    ended = deptjax(
        "evaluate", "--prompt", tuned.prompt, "--test-file", file, "--json", "--metrics", "accuracy,macro_f1"
    )
    assert ended.status == 0, ended.err
    scores = json.loads(ended.out)
    assert list(scores) == ["test/accuracy", "test/macro_f1"]
    answers = deptjax("predict", "--prompt", tuned.prompt, file).out.splitlines()
    right = [json.loads(line)["prediction"] == json.loads(line)["label"] for line in answers]
    assert len(right) == 10
    assert scores["test/accuracy"] == pytest.approx(sum(right) / 10)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--split", "tset"], "argument --split: invalid choice: 'tset'"),
        (["--task", "trec7"], "no task is named 'trec7'"),
        (["--gin.TrainConfig.steps=3"], "evaluate takes no gin settings; use flags"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--test-file", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--test-file", "gone.jsonl", "--split", "dev"], "--test-file gives rows of the split test alone"),
    ],
)
def test_evaluate_tells_mistakes(deptjax: Command, tuned: Tuned, words: list[str], told: str) -> None:
    assert told in deptjax("evaluate", "--prompt", tuned.prompt, *words).error


def test_predict_lines_objects_and_standard_input_agree(
    deptjax: Command, tuned: Tuned, texts: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = deptjax("predict", "--prompt", tuned.prompt, texts, "--scores", "--batch-size", 2)
    assert bare.status == 0, bare.err
    answers = [json.loads(line) for line in bare.out.splitlines()]
    assert [set(answer) for answer in answers] == [{"prediction", "scores"}] * len(TEXTS)
    for answer in answers:
        assert answer["prediction"] == max(answer["scores"], key=answer["scores"].get)
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)

    objects = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    objects.write_text("\n\n".join(lines) + "\n")
    rows = [json.loads(line) for line in deptjax("predict", "--prompt", tuned.prompt, objects).out.splitlines()]
    assert rows == [
        {"id": i, "text": text, "prediction": answer["prediction"]}
        for i, (text, answer) in enumerate(zip(TEXTS, answers, strict=True))
    ]

    for file, as_objects in ((texts, False), (objects, True)):
        monkeypatch.setattr(sys, "stdin", Stdin(file.read_bytes()))
        told = [json.loads(line) for line in deptjax("predict", "--prompt", tuned.prompt, "-").out.splitlines()]
        assert told == (rows if as_objects else [{"prediction": answer["prediction"]} for answer in answers])


def test_predict_writes_a_file_and_overwrites_none(
    deptjax: Command, tuned: Tuned, texts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    words = ("predict", "--prompt", tuned.prompt, texts, "--output", output)
    assert deptjax(*words).error == f"--output {output} exists; choose another file, or add --overwrite"
    assert output.read_text() == "mine"
    ended = deptjax(*words, "--overwrite")
    assert (ended.status, ended.out) == (0, "")
    assert len(output.read_text().splitlines()) == len(TEXTS)
    assert {file.name for file in tmp_path.iterdir()} == {"out.jsonl", "texts.txt"}
    assert f"there is no folder {tmp_path / 'no'}; make it first" in deptjax(*words[:-1], tmp_path / "no" / "x").error
    assert f"--output {tmp_path} is a folder" in deptjax(*words[:-1], tmp_path).error


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "a film\n\na plot\n", "{file}, line 2: the text is empty; fill it or remove the line"),
        ("a.txt", "", "{file} is empty; it must hold at least one text"),
        ("a.txt", None, "{file}: no such file"),
        ("a.txt", b"a film\ncaf\xe9\n", "{file}, line 2: byte 0xe9 is not utf-8 text; name the file's encoding"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "{file}, line 2: broken JSON at column 8"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', "{file}, line 2: a str, not an object"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "{file}, line 2: no column 'text', which the input template"),
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "{file}, line 2: the text of column 'text' is empty"),
        ("a.jsonl", '{"text": "a", "prediction": 1}\n', "{file}, line 1: the answer has a field 'prediction' too"),
        ("a.csv", "text\na\n", "{file}: .csv is not read here; give JSON lines"),
    ],
)
def test_predict_names_the_line(
    deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path, name: str, content: str | bytes | None, told: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = deptjax("predict", "--prompt", tuned.prompt, file, "--output", tmp_path / "out.jsonl")
    assert told.format(file=file) in ended.error
    assert {left.name for left in tmp_path.iterdir()} <= {name}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_predict_reads_other_encodings(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path, encoding: str) -> None:
    file = tmp_path / "a.jsonl"
    row = {"text": "a café film"}
    file.write_bytes((json.dumps(row, ensure_ascii=False) + "\r\n").encode(encoding))
    ended = deptjax("predict", "--prompt", tuned.prompt, file, "--encoding", encoding)
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["text"] == row["text"]


def test_predict_names_the_line_of_standard_input(
    deptjax: Command, tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b'{"text": "a film"}\n{"text": 3'))
    assert "standard input, line 2: broken JSON" in deptjax("predict", "--prompt", tuned.prompt).error
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    assert "standard input is empty" in deptjax("predict", "--prompt", tuned.prompt).error


def test_predict_wants_objects_for_a_template_of_two_columns(
    deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path, texts: pathlib.Path
) -> None:
    import dataclasses

    prompt = Prompt.load(tuned.prompt)
    two = dataclasses.replace(prompt, task={**prompt.task, "input": "{text} {title}"}).save(tmp_path / "two")
    assert (
        "the prompt needs the columns text, title; give JSON lines" in deptjax("predict", "--prompt", two, texts).error
    )


def test_predict_without_its_model(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path, texts: pathlib.Path) -> None:
    import dataclasses

    lost = dataclasses.replace(Prompt.load(tuned.prompt), backbone=str(tmp_path / "gone")).save(tmp_path / "lost")
    error = deptjax("predict", "--prompt", lost, texts).error
    assert f"{lost} was tuned on '{tmp_path / 'gone'}'; name its place with --model" in error
    assert deptjax("predict", "--prompt", lost, texts, "--model", model_of(tuned)).status == 0
    assert Prompt.load(lost).fingerprint == tiny_llama(0).fingerprint


def model_of(tuned: Tuned) -> str:
    """The folder of the backbone of a run."""
    return Prompt.load(tuned.prompt).backbone


def test_a_reader_that_goes_away_is_no_error(tuned: Tuned, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("the film was good\n" * 20_000)
    with program("predict", "--prompt", tuned.prompt, file, "--batch-size", 4) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["prediction"] in ("negative", "positive")
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_the_program_tells_help_and_version() -> None:
    def said(*words: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", *words], env=environment(), capture_output=True, text=True, check=True, timeout=60
        )
        assert ended.stderr == ""
        return ended.stdout

    from deptjax.version import __version__

    help_text = said("deptjax.train", "--help")
    assert "--prompt-length" in help_text
    assert "examples:" in help_text
    assert said("deptjax.predict", "--version") == f"deptjax {__version__}\n"
    assert said("deptjax", "--version") == f"deptjax {__version__}\n"
    assert said("deptjax", "train", "--help") == help_text


def test_the_package_is_the_command_and_ends_with_its_status() -> None:
    words = [sys.executable, "-m", "deptjax", "trian"]
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("deptjax: error: there is no command 'trian'; there are train, ")
    assert ended.stderr.count("\n") == 1
