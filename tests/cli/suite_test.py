"""`deptjax suite`: what is missing is run, a crash is survived, a failure is told, settings reach their runs."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.suite.run import failure
from tests.cli.conftest import Command, write_rows
from tests.cli.train_test import environment

GIN = """
suite.tasks = ("films", "plays")
suite.methods = ("prompt_tuning", "lora")
suite.seeds = (0, 1)
Task.input = "{{text}}\\nlabel :"
Task.labels = ("negative", "positive")
films/FileSource.train = "{films}"
plays/FileSource.train = "{plays}"
plays/TrainConfig.max_length = 20
TrainConfig:
  steps = 12
  batch_size = 4
  eval_batch_size = 8
  eval_every = 6
  checkpoint_every = 4
  log_every = 1
  buckets = 1
  max_length = 24
TrainConfig.prompt_lr = 0.02
PromptTuning.prompt_length = 3
LoRA.rank = 2
lora/TrainConfig.low_rank_lr = 0.01
plays/lora/TrainConfig.low_rank_lr = 0.02
"""
OF_THE_CLOCK = ("seconds_per_step", "wall_seconds", "peak_mib", "peak_of", "command")
LORA = ("--tasks", "films", "--methods", "lora", "--seeds", 0)


@pytest.fixture(scope="module", autouse=True)
def _every_program_is_kept() -> Iterator[None]:
    """Each run forgets what those before it compiled; a tiny model's programs are then found on the disk."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the rows of two tasks, and a gin file of a suite over them."""
    folder = tmp_path_factory.mktemp("suite")
    films, plays = (write_rows(folder / f"{name}.jsonl", count) for name, count in (("films", 40), ("plays", 48)))
    (folder / "suite.gin").write_text(GIN.format(films=films, plays=plays))
    return folder


@pytest.fixture
def asked(files: pathlib.Path, model: pathlib.Path) -> list[object]:
    """The words of the suite, but for its folder."""
    return ["suite", "--gin-file", files / "suite.gin", "--model", model, "--quiet"]


def without_the_clock(value: Any) -> Any:
    """Returns results without what is another at each run."""
    if isinstance(value, dict):
        return {k: without_the_clock(v) for k, v in value.items() if k not in OF_THE_CLOCK}
    return [without_the_clock(item) for item in value] if isinstance(value, list) else value


def results_of(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def start(*words: object) -> subprocess.Popen[str]:
    """Starts the command as a process of its own, which finds the programs that were compiled here."""
    code = (
        f"import jax; jax.config.update('jax_compilation_cache_dir', {jax.config.jax_compilation_cache_dir!r});"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
        "import sys; from deptjax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_suite_that_was_killed_ends_like_one_that_was_not(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path
) -> None:
    asked = [*asked, "--tasks", "films"]
    whole = deptjax(*asked, "--workdir", tmp_path / "whole")
    assert whole.status == 0, whole.err
    wanted = results_of(tmp_path / "whole")
    assert [run["status"] for run in wanted["runs"]] == ["done"] * 4

    broken = tmp_path / "broken"
    log = broken / "runs" / "films" / "lora" / "seed-0" / "metrics.jsonl"
    process = start(*asked, "--workdir", broken)
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and len(log.read_text().splitlines()) >= 6):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=60)
    (done, *others) = results_of(broken)["runs"]
    assert done["status"] == "done"
    assert {run["status"] for run in others} == {"missing"}
    first = (broken / "runs" / "films" / "prompt_tuning" / "seed-0.json").stat().st_mtime_ns

    ended = deptjax(*asked, "--workdir", broken)
    assert ended.status == 0, ended.err
    assert without_the_clock(results_of(broken)) == without_the_clock(wanted)
    assert (broken / "runs" / "films" / "prompt_tuning" / "seed-0.json").stat().st_mtime_ns == first
    check_what_is_told(whole.out, tmp_path / "whole")

    ended = deptjax(*asked, "--population", "--workdir", tmp_path / "together")
    assert ended.status == 0, ended.err
    for own, alone in zip(results_of(tmp_path / "together")["runs"], wanted["runs"], strict=True):
        assert {name: own[name] for name in ("test", "dev", "best_step")} == {
            name: alone[name] for name in ("test", "dev", "best_step")
        }
        for name, points in alone["curve"].items():
            np.testing.assert_allclose(own["curve"][name], points, rtol=1e-4)
    check_that_what_is_trained_is_only_scored(deptjax, [*asked, "--population", "--workdir", tmp_path / "together"])


def check_that_what_is_trained_is_only_scored(deptjax: Command, words: list[object]) -> None:
    """Of a population that was stopped while its members were scored."""
    folder = pathlib.Path(str(words[-1]))
    wanted, method = results_of(folder), folder / "runs" / "films" / "lora"
    (method / "seed-1.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in [*method.glob("*/metrics.jsonl"), *method.glob("*.json")]}
    populations = sorted(folder.glob("populations/*/*/*"))
    assert deptjax(*words).status == 0
    assert without_the_clock(results_of(folder)) == without_the_clock(wanted)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert sorted(folder.glob("populations/*/*/*")) == populations
    shutil.rmtree(method)  # as the suite says, for other settings
    assert deptjax(*words).status == 0
    assert without_the_clock(results_of(folder)) == without_the_clock(wanted)


def test_some_of_the_test_rows_are_scored(deptjax: Command, asked: list[object], tmp_path: pathlib.Path) -> None:
    words = [*asked, *LORA, "--workdir", tmp_path / "suite", "--test-examples", 1]
    assert deptjax(*words).status == 0
    (run,) = results_of(tmp_path / "suite")["runs"]
    assert run["test"]["accuracy"] in (0.0, 1.0)
    record = tmp_path / "suite" / "runs" / "films" / "lora" / "seed-0.json"
    whole = record.read_text()
    record.write_text(whole.replace("wall_seconds", "seconds"))
    assert f"{record} or " in deptjax("suite", "--report-only", "--workdir", tmp_path / "suite").error
    record.write_text(whole)
    assert "test_examples was 1, is now 2" in deptjax(*words[:-1], 2).error
    assert "--population trains several" in deptjax(*words, "--population", "--isolate").error


def check_what_is_told(out: str, folder: pathlib.Path) -> None:
    lines = out.splitlines()
    assert lines[0].startswith("| method | films accuracy | trained parameters |")
    assert [line.split()[1] for line in lines[2:4]] == ["prompt_tuning", "lora"]
    assert lines[-1] == str(folder / "report.html")
    assert lines[0] in (folder / "results.md").read_text()
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_a_run_that_fails_is_told_and_the_others_go_on(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "suite"
    ended = deptjax(
        *(*asked, "--tasks", "films", "--methods", "prompt_tuning,lora", "--seeds", 0, "--workdir", folder),
        *("--gin.TrainConfig.prompt_lr=1e38", "--steps", 20, "--gin.prompt_tuning/TrainConfig.warmup_steps=0"),
    )
    prompt_tuning, lora = results_of(folder)["runs"]
    assert prompt_tuning["status"] == "failed"
    assert prompt_tuning["error"].startswith("the loss is not a finite number at step ")
    assert lora["status"] == "done"
    first = f"films/prompt_tuning/seed-0: {prompt_tuning['error']}"
    assert ended.error.startswith(f"1 of 2 runs failed, the first is {first}")
    assert "| prompt_tuning | – |" in ended.out
    assert "the loss is not a finite number" in (folder / "report.html").read_text()

    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert deptjax("suite", "--report-only", "--workdir", folder).error == ended.error
    assert (folder / "report.html").read_bytes() == before


def test_more_may_be_asked_for_and_other_settings_are_refused(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path
) -> None:
    words = [*asked, *LORA, "--steps", 2, "--eval-every", 0, "--workdir", tmp_path / "suite"]
    assert deptjax(*words, "--isolate").status == 0
    first = results_of(tmp_path / "suite")["runs"]
    more = deptjax(*words, "--tasks", "plays,films")
    assert more.status == 0
    assert more.out.startswith("| method | films accuracy | plays accuracy | average |")
    both = results_of(tmp_path / "suite")["runs"]
    assert [run["task"] for run in both] == ["films", "plays"]
    assert both[0] == first[0]
    for task, length, rate in (("films", 24, 0.01), ("plays", 20, 0.02)):  # each has the settings that name it
        run = tmp_path / "suite" / "runs" / task / "lora" / "seed-0"
        config = json.loads((run / "config.json").read_text())
        assert (config["train"]["max_length"], config["learning_rates"]) == (length, {"low_rank": rate})
        assert "LoRA.rank = 2" in (run / "config.gin").read_text()
    told = deptjax(*words, "--rank", 3, "--steps", 4).error
    assert "runs/films/lora holds runs with other settings (method.rank was 2, is now 3; train.steps was 2" in told
    told = deptjax(*words, "--model", tmp_path / "other").error
    assert "holds runs with another model (model.name_or_path was" in told


def test_a_signal_stops_the_suite_and_the_same_command_goes_on(asked: list[object], tmp_path: pathlib.Path) -> None:
    words = [*asked, *LORA, "--isolate", "--workdir", tmp_path / "suite", "--steps", 100_000, "--eval-every", 0]
    process = start(*words)
    log = tmp_path / "suite" / "runs" / "films" / "lora" / "seed-0" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == "deptjax: stopped; run the same command again to go on"
    assert results_of(tmp_path / "suite")["runs"][0]["status"] == "missing"
    assert any((log.parent / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--suite", "packagd"), "Did you mean 'packaged'?"),
        (("--suite", "packaged", "--tasks", "films"), "--suite and --tasks both name the tasks; keep one"),
        (("--tasks", "films,trek6"), "no task is named 'trek6'"),
        (("--tasks", "films,films"), "method 'prompt_tuning' on task 'films' is named twice"),
        (("--methods", "lora,deppt"), "Did you mean 'dept'?"),
        (("--methods", ""), "no methods; name some with --methods dept,lora"),
        (("--seeds", "0,1,0"), "seed 0 is named twice; keep one"),
        (("--seeds", "0,one"), "--seeds: seed 'one' is not a whole number"),
        (("--seed", 3), "--seed: TrainConfig.seed is of a single run; name them with --seeds or suite.seeds"),
        (("--method", "lora"), "there is no flag --method. Did you mean '--methods'?"),
        (("--max-length", 20, "--prefix-length", 3), "--prefix-length: method 'prompt_tuning' has no such field"),
        (("--backbone-lr", 0.1), "--backbone-lr: method 'prompt_tuning' trains no such parameters"),
        (("--gin.lora/PromptTuning.prompt_length=3",), "PromptTuning.prompt_length is not for the method 'lora'"),
        (("--gin.flims/TrainConfig.steps=3",), "the scope 'flims' is neither a task nor a method of this suite. Did"),
        (("--gin.trec6/TrainConfig.steps=3",), "--gin.trec6/TrainConfig.steps is for no run of this suite"),
        (("--gin.films/load_backbone.dtype=bfloat16",), "is one for all runs; leave its scope out"),
        (("--gin.train.method=lora",), "train.method is of a single run; name them with --methods"),
        (
            ("--gin.films/TrainConfig.steps=3", "--gin.lora/TrainConfig.steps=4"),
            "both set TrainConfig.steps of one run; say which holds with films/lora/TrainConfig.steps",
        ),
        (("--gin.films/FileSource.dev=none.jsonl",), "there is no file none.jsonl"),
        (("--cell", "films/lora/seed-9"), "films/lora/seed-9 is no run of this suite"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path, flags: tuple[object, ...], told: str
) -> None:
    assert told in deptjax(*asked, *flags, "--workdir", tmp_path / "suite").error
    assert not (tmp_path / "suite").exists()


def test_a_folder_of_something_else_is_left_alone(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and holds no suite" in deptjax(*asked, "--workdir", tmp_path).error
    assert "holds no suite: it has no suite.json" in deptjax("suite", "--report-only", "--workdir", tmp_path).error
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "suite.json").write_text('{"mine": 1}')
    assert "suite.json has format None, expected 1" in deptjax(*asked, "--workdir", tmp_path).error
    assert (tmp_path / "suite.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("how", [[], ["--population"], ["--isolate"]])
def test_a_model_that_is_not_there_is_not_the_failure_of_a_run(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path, how: list[str]
) -> None:
    ended = deptjax(*asked, *LORA, *how, "--model", tmp_path / "none", "--workdir", tmp_path / "suite")
    assert ended.status == 2
    assert f"{tmp_path / 'none'}" in ended.err
    assert [run["status"] for run in results_of(tmp_path / "suite")["runs"]] == ["missing"]


def test_what_nobody_expected_is_written_down_with_its_place() -> None:
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError as error:
        record = failure(error)
    assert record["error"] == "RuntimeError: two lines (not expected; the run's .json says where)"
    assert "in test_what_nobody_expected" in record["traceback"]
    assert failure(MemoryError()) == {
        "status": "failed",
        "error": "out of memory; lower batch_size and eval_batch_size, or max_length",
    }
