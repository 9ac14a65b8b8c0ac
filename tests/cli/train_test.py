"""`deptjax train`: flags, the folder it leaves, resuming, and the same by gin."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli.conftest import Command, Tuned

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "runs").glob("*.gin"))


def environment() -> dict[str, str]:
    """The environment of a program that finds the package where this file is."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def program(*words: object) -> subprocess.Popen[str]:
    """Starts `python -m deptjax.NAME` as a process of its own."""
    name, *flags = map(str, words)
    # Where the tests themselves run as a background job, Ctrl-C is ignored by them and by all they start.
    heeds = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    return subprocess.Popen(
        [sys.executable, "-c", f"{heeds}; runpy.run_module('deptjax.{name}', run_name='__main__')", *flags],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_leaves_a_prompt_its_settings_and_its_scores(deptjax: Command, asked: list[object], tmp_path) -> None:
    ended = deptjax(*asked)
    assert ended.status == 0, ended.err
    run = tmp_path / "run"
    assert ended.out.startswith(f"{run / 'prompt'}: step ")
    assert "dev/accuracy" in ended.out
    config = json.loads((run / "config.json").read_text())
    assert config["method"]["prompt_length"] == 3
    assert config["train"]["steps"] == 4
    assert config["task"]["input"] == "{text}\nlabel :"
    assert json.loads((run / "prompt" / "prompt.json").read_text())["method"]["rank"] == 2

    again = deptjax(*asked)
    assert (again.status, again.out) == (0, ended.out)


def test_the_kept_gin_file_gives_the_same_run(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    ended = deptjax("train", "--gin_file", tuned.workdir / "config.gin", f"--workdir={tmp_path / 'again'}", "--quiet")
    assert ended.status == 0, ended.err
    ours, theirs = ((d / "prompt" / "prompt.safetensors").read_bytes() for d in (tmp_path / "again", tuned.workdir))
    assert ours == theirs


def test_a_run_of_another_configuration_is_not_resumed(deptjax: Command, tuned: Tuned) -> None:
    before = (tuned.workdir / "config.json").read_bytes()
    error = deptjax(*tuned.words, "--steps", 6, "--prompt-lr", 0.2).error
    assert "learning_rates.prompt was" in error
    assert "train.steps was 4, is now 6" in error
    assert "choose another workdir" in error
    assert (tuned.workdir / "config.json").read_bytes() == before


def test_there_are_configs() -> None:
    """Without one, the test below would be passed over in silence."""
    assert CONFIGS, "configs/runs holds no .gin file"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_a_step(
    deptjax: Command, config: pathlib.Path, model, rows, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # includes are found from anywhere
    ended = deptjax(
        *("train", "--gin-file", config, "--model", model, "--task-file", rows, "--labels", "negative,positive"),
        *("--input", r"{text}\nlabel :", "--gin.TrainConfig.max_length=24", "--steps", 1, "--batch-size", 2),
        *("--eval-every", 0, "--buckets", 1, "--workdir", tmp_path / "run"),
        # By the budget, 40 vectors and 256 rows leave no rank on a model so small.
        *(["--rank", 2, "--max-length", 24] if "methods/dept.gin" in config.read_text() else []),
        *(["--verbalizers", "negative=bad,positive=good"] if "verbalizers" in config.read_text() else []),
    )
    assert ended.status == 0, ended.err
    assert (tmp_path / "run" / "prompt" / "prompt.safetensors").exists()
    first = config.read_text().splitlines()
    assert any(line.startswith("#     ") and config.name in line for line in first)
    assert any(line.startswith("# Time and score:") for line in first)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_a_step_and_the_same_command_goes_on(
    asked: list[object], tmp_path: pathlib.Path, deptjax: Command, number: signal.Signals
) -> None:
    words = [
        *asked,
        "--steps",
        100_000,
        "--eval-every",
        0,
        "--log-every",
        1,
        "--prompt-lr",
        1e-6,
        "--low-rank-lr",
        1e-6,
    ]
    process = program(*words)
    log = tmp_path / "run" / "metrics.jsonl"
    began = time.monotonic()
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < 120
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = err.splitlines()[-1]
    assert last.startswith("deptjax: stopped after step ")
    assert last.endswith("; run the same command again to go on")
    step = int(last.split("step ")[1].split(";")[0])
    assert [d.name for d in (tmp_path / "run" / "checkpoints").iterdir() if d.name == str(step)]


HUGE = ("--prompt-lr", "1e38", "--steps", 20, "--warmup-steps", 0)  # overflows after some steps


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (("--eval-every", 1), "the prompt of step 1 is kept in"),
        (("--eval-every", 0, "--checkpoint-every", 4), r"the prompt (of step [48]|before step \d+) is kept in"),
        (("--eval-every", 0), r"no good prompt was there to be kept|the prompt before step \d+ is kept in"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_a_good_prompt(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path, flags: tuple[object, ...], kept: str
) -> None:
    error = deptjax(*asked, *HUGE, *flags).error
    # When the numbers overflow, and whether a gradient does before the loss, is a matter of rounding, so of jax.
    assert re.search(r"the loss is not a finite number at step \d+ \(learning rates there: prompt_lr ", error)
    assert "low_rank_lr" in error
    assert re.search(kept, error)
    prompt = tmp_path / "run" / "prompt"
    assert prompt.exists() == ("is kept in" in error)
    if prompt.exists():
        tensors = load_file(prompt / "prompt.safetensors")
        assert all(np.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("room", [600, 4000])  # bytes a file: too few for the settings, for a checkpoint
def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_when_there_is_room(
    deptjax: Command, asked: list[object], room: int
) -> None:
    """A limit on the size of files stands for a disk that is full: the kernel refuses the write in the same way."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from deptjax.cli.main import main; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2);"
        "sys.exit(main(sys.argv[2:]))"
    )
    words = [str(word) for word in asked]
    ended = subprocess.run(
        [sys.executable, "-c", code, str(room), *words], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    *before, last = ended.stderr.splitlines()
    assert last.startswith("deptjax: error: no room on the disk while writing ")
    assert all(line.startswith("step ") for line in before)
    assert deptjax(*asked).status == 0
