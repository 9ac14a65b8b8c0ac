"""A small model in a folder, a small task in files, and the commands run as a user runs them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from deptjax.cli.main import main
from tests.cli.folders import save_llama
from tests.logs import logging_as_before

TEMPLATE = r"{text}\nlabel :"


class Ended(NamedTuple):
    """How a command ended: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake; asserts that it is one line, the last one, and the status is 2."""
        assert self.status == 2, self
        told = [line for line in self.err.splitlines() if line.startswith("deptjax: error: ")]
        assert len(told) == 1, self.err
        assert self.err.splitlines()[-1] == told[0]
        assert "Traceback" not in self.err
        return told[0].removeprefix("deptjax: error: ")


Command = Callable[..., Ended]


@pytest.fixture(autouse=True)
def quiet_afterwards() -> Iterator[None]:
    """Leaves no trace of an entry point in the loggers."""
    with logging_as_before():
        yield


@pytest.fixture
def deptjax(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `deptjax WORDS` in this process."""

    def run(*words: object) -> Ended:
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Ended(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a tiny LLaMA."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file of 48 rows with two labels, `good` texts positive and `bad` texts negative."""
    file = tmp_path_factory.mktemp("rows") / "films.jsonl"
    write_rows(file, 48)
    return file


def write_rows(file: pathlib.Path, count: int) -> pathlib.Path:
    """Writes rows of a task that can be learnt."""
    things = ("film", "story", "plot", "actor")
    lines = []
    for i in range(count):
        text = f"the {things[i % 4]} was {'very ' * (i // 8)}{'good' if i % 2 else 'bad'}"
        lines.append(json.dumps({"text": text, "label": "positive" if i % 2 else "negative"}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def asked(model: pathlib.Path, rows: pathlib.Path, tmp_path: pathlib.Path) -> list[object]:
    """The words of a run of four steps."""
    return [
        "train",
        *("--model", model, "--task-file", rows, "--input", TEMPLATE, "--labels", "negative,positive"),
        *("--method", "dept", "--prompt-length", 3, "--rank", 2, "--max-length", 24, "--buckets", 1),
        *("--steps", 4, "--batch-size", 4, "--eval-batch-size", 4, "--eval-every", 2, "--workdir", tmp_path / "run"),
    ]


class Tuned(NamedTuple):
    """A finished run."""

    words: list[object]
    workdir: pathlib.Path

    @property
    def prompt(self) -> pathlib.Path:
        """Its prompt."""
        return self.workdir / "prompt"


@pytest.fixture(scope="session")
def tuned(model: pathlib.Path, rows: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A finished run that tests only read."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    words: list[object] = [
        "train",
        *("--model", model, "--task-file", rows, "--input", TEMPLATE, "--labels", "negative,positive"),
        *("--prompt_length=3", "--rank=2", "--max_length=24", "--steps=4", "--batch-size", 4, "--eval-batch-size", 4),
        *("--buckets", 1, "--eval-every", 2, "--quiet", "--workdir", workdir),
    ]
    assert main([str(word) for word in words]) == 0
    return Tuned(words, workdir)
