"""The quickstart from its first line to its last, on a tiny model and the real questions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import pytest

from deptjax import quickstart
from deptjax.cli.main import main
from deptjax.data.packaged_sets import TREC6
from deptjax.testing import tiny_llama
from tests.logs import logging_as_before
from tests.tiny_folders import save_tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
# By hand, from the sizes of the tiny model: D 24, 2 layers, 24 numbers a query and 12 a value.
TRAINABLE = {
    "majority": 0,
    "zero_shot": 0,
    "dept": 20 * 24 + (56 + 24) * 30,
    "prompt_tuning": 53 * 24,
    "lora": 2 * 8 * ((24 + 24) + (24 + 12)),
}


@pytest.fixture(scope="module", autouse=True)
def quiet_afterwards() -> Iterator[None]:
    """Leaves no trace of an entry point in the loggers."""
    with logging_as_before():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a tiny LLaMA that knows the words of the template, the labels and the three questions."""
    texts = " ".join([*TREC6.labels, TREC6.input, quickstart.TEXT, *quickstart.QUESTIONS, "Where Nile"])
    return save_tiny(tiny_llama, tmp_path_factory.mktemp("quickstart") / "tiny", texts)


@pytest.fixture(autouse=True)
def small(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's own constants, made small: the tiny model, and one program a step instead of four."""
    monkeypatch.setattr(quickstart, "MODEL", str(model))
    monkeypatch.setattr(quickstart, "BUCKETS", 1)


class Stdin:
    """A standard input that holds bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def scores(workdir: pathlib.Path) -> dict[str, dict[str, float | None]]:
    """Returns results.json after a look at every number in it."""
    rows = json.loads((workdir / "results.json").read_text())
    for name, row in rows.items():
        assert list(row) == ["accuracy", "trainable", "seconds_per_step", "peak_mib"]
        assert isinstance(row["accuracy"], float)
        assert 0 <= row["accuracy"] <= 1
        assert row["accuracy"] * 16 == round(row["accuracy"] * 16)  # of 16 questions
        assert type(row["trainable"]) is int
        assert row["trainable"] == TRAINABLE[name]
        tuned = name not in ("majority", "zero_shot")
        assert (
            (isinstance(row["seconds_per_step"], float) and row["seconds_per_step"] > 0)
            if tuned
            else (row["seconds_per_step"] is None)
        )
        measured = name != "majority"
        assert (isinstance(row["peak_mib"], float) and row["peak_mib"] > 50) if measured else row["peak_mib"] is None
    return rows


def test_it_compares_and_its_last_line_is_a_command_that_works(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "my runs"
    words = ["--steps", "2", "--compare", "--eval-examples", "16", "--workdir", str(workdir)]
    assert quickstart.main(words) == 0
    printed = capsys.readouterr().out
    rows = scores(workdir)
    assert list(rows) == ["majority", "zero_shot", "dept", "prompt_tuning", "lora"]

    assert "4,080 questions to learn from, 300 to choose by, 16 held out; 6 classes." in printed
    assert "Accuracy on 16 held-out questions\n" in printed
    assert re.search(r"^ +accuracy +trainable +s/step +peak MiB$", printed, re.MULTILINE)
    for name, row in rows.items():
        seconds, peak = (r"\d+\.\d\d" if row["seconds_per_step"] else "-", r"[\d,]+" if row["peak_mib"] else "-")
        line = rf"^{re.escape(quickstart.TITLES[name])} +{100 * row['accuracy']:.1f} % +{row['trainable']:,} +"
        assert re.search(rf"{line}{seconds} +{peak}$", printed, re.MULTILINE), (name, printed)

    answers = re.findall(r"^  (.+ \?) +-> (\w+) \((\d+) %\)$", printed, re.MULTILINE)
    assert tuple(question for question, _, _ in answers) == quickstart.QUESTIONS
    for _, label, percent in answers:
        assert label in TREC6.labels
        assert 100 / 6 - 1 < int(percent) <= 100

    (folder, kib), *others = re.findall(r"^The prompt is in (.+) \((\d+) KiB\)", printed, re.MULTILINE)
    assert not others
    assert pathlib.Path(folder) == workdir / "dept-2-steps" / "prompt"
    size = sum(file.stat().st_size for file in pathlib.Path(folder).iterdir())
    assert int(kib) == round(size / 1024) > TRAINABLE["dept"] * 4 // 1024

    (said, command) = re.findall(r'^  echo "(.+)" \| (.+)$', printed, re.MULTILINE)[0]
    program, *asked = shlex.split(command)
    assert pathlib.Path(program).name == "deptjax"
    assert asked == ["predict", "--prompt", folder]
    monkeypatch.setattr(sys, "stdin", Stdin(f"{said}\n".encode()))
    assert main([*asked, "--scores"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    assert set(answer["scores"]) == set(TREC6.labels)
    assert answer["prediction"] == max(answer["scores"], key=answer["scores"].get)


def test_without_compare_dept_stands_beside_the_two_that_need_no_tuning(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "2", "--eval-examples", "16", "--workdir", str(tmp_path)]
    assert quickstart.main(words) == 0
    assert list(scores(tmp_path)) == ["majority", "zero_shot", "dept"]
    printed = capsys.readouterr().out
    assert "LoRA" not in printed
    assert "prompt tuning" not in printed
    assert {entry.name for entry in tmp_path.iterdir()} == {"results.json", "dept-2-steps"}

    # The same command again takes no step, and keeps what was measured.
    before = scores(tmp_path)["dept"]
    assert quickstart.main(words) == 0
    assert scores(tmp_path)["dept"] == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--steps", "-3"], "--steps is -3; it must be at least 1"),
        (["--eval-examples", "0"], "--eval-examples is 0; it must be at least 1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_before_anything_is_loaded(
    words: list[str],
    told: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quickstart, "MODEL", "./no/such/model")  # loading it would be told instead
    assert quickstart.main([*words, "--workdir", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"deptjax: error: {told}\n")
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_the_way_is_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "MODEL", str(tmp_path / "gone"))
    assert quickstart.main(["--workdir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"deptjax: error: '{tmp_path / 'gone'}': there is no such file or folder; check the path"


def test_ctrl_c_stops_it_after_a_step_with_the_status_of_the_signal(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    code = (
        "import sys; from deptjax import quickstart; quickstart.MODEL, quickstart.BUCKETS = sys.argv[1], 1;"
        "sys.exit(quickstart.main(sys.argv[2:]))"
    )
    words = ["--steps", "100000", "--eval-examples", "16", "--workdir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model), *words],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "dept-100000-steps" / "metrics.jsonl"
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        began = time.monotonic()
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < 120
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.fullmatch(r"Stopped after step \d+\. The same command goes on from here\.", out.splitlines()[-1])
    assert not (tmp_path / "results.json").exists()
    assert "Traceback" not in err
