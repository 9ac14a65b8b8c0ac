"""Flags and gin files of the paper's tasks, as far as the task that they mean; nothing is loaded."""

from __future__ import annotations

import json
import pathlib

import pytest

from deptjax.cli import flags, settings
from deptjax.data.loaded import loaded_once
from deptjax.data.paper_tasks import paper_settings
from deptjax.data.sources import MemorySource
from deptjax.data.suites import suite
from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError
from deptjax.methods import DePT

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "tasks"
PAPER = [
    *suite("glue"),
    *suite("superglue"),
    *suite("mrqa"),
    *suite("others"),
    "squad",
    "record",
    "copa",
    "superglue_rte",
]


def given(*words: str, gin: tuple[str, ...] = ()) -> settings.Settings:
    parser = flags.Parser("deptjax train", "", "", "")
    for add in (flags.add_task, flags.add_method, flags.add_training):
        add(parser)
    options, bindings = parser.parse(words)
    return settings.merged(list(gin), bindings, flags.given_by_flags(options, parser))


def task_of(*words: str) -> Task:
    return settings.make_task(given(*words))


def test_few_shot_and_paper_compat() -> None:
    assert task_of("--task", "cola", "--few-shot", "16", "--few-shot-seed", "3", "--paper-compat") == get_task(
        "cola", few_shot=16, few_shot_seed=3, paper_compat=True
    )
    assert task_of("--task", "cola") == get_task("cola")
    with pytest.raises(UserError, match=r"--few-shot: few_shot 'k' is not a whole number or none"):
        task_of("--task", "cola", "--few-shot", "k")


def test_few_shot_of_ones_own_rows(tmp_path: pathlib.Path) -> None:
    rows = [{"text": f"row {i}", "label": ("no", "yes")[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = task_of("--task-file", str(tmp_path / "rows.jsonl"), "--input", "{text}", "--few-shot", "4")
    data = task.load()
    assert sorted(map(data.task.label_of, data.train)) == ["no", "no", "yes", "yes"]


@pytest.mark.parametrize(("k", "compat"), [(4, True), (32, True), (32, False)])
def test_rows_that_are_read_once_are_sampled_once(k: int, compat: bool) -> None:
    """`train` loads the task again, from the rows that are kept: it must find the sample that was drawn first."""
    rows = [{"text": f"row {i}", "label": ("no", "yes", "maybe")[i % 3]} for i in range(200)]
    task = Task("t", MemorySource(rows, rows, rows), "{text}", few_shot=k, paper_compat=compat)
    data, again = loaded_once(task)
    assert again.load() == data
    assert data.train == task.load().train
    assert len(data.train) == (30 if compat and k == 32 else k)
    assert again.labels == ("maybe", "no", "yes")


@pytest.mark.parametrize("name", PAPER)
def test_the_gin_file_of_a_task_has_the_papers_settings(name: str) -> None:
    found = given(gin=(str(CONFIGS / f"{name}.gin"),))
    assert settings.make_task(found) == get_task(name)
    method = settings.make_method(found)
    config = settings.make_config(found, method)
    wanted = paper_settings(name)
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert method == DePT(max_length=wanted["max_length"])


@pytest.mark.parametrize("fields", [{}, {"few_shot": 4, "paper_compat": True}])
def test_the_kept_gin_file_means_the_same_task(fields: dict[str, object], tmp_path: pathlib.Path) -> None:
    task = get_task("wsc", **fields)
    method = DePT()
    (tmp_path / "config.gin").write_text(settings.as_gin({}, method, task, settings.make_config({}, method)))
    assert settings.make_task(given(gin=(str(tmp_path / "config.gin"),))) == task


def test_start_parts_are_a_list() -> None:
    found = given("--start-from", "runs/mnli/prompt", "--start-parts", "prompt,lora_a")
    config = settings.make_config(found, DePT())
    assert (config.start_from, config.start_parts) == ("runs/mnli/prompt", ("prompt", "lora_a"))
    assert settings.changed_from_default(config) == {
        "start_from": "runs/mnli/prompt",
        "start_parts": ("prompt", "lora_a"),
    }
    with pytest.raises(UserError, match="start_parts is given, and no start_from"):
        settings.make_config(given("--start-parts", "prompt"), DePT())


def test_the_kept_gin_file_starts_from_the_same_parts(tmp_path: pathlib.Path) -> None:
    method = DePT()
    config = settings.make_config(given("--start-from", "a", "--start-parts", "lora_a"), method)
    (tmp_path / "config.gin").write_text(settings.as_gin({}, method, get_task("cola"), config))
    assert settings.make_config(given(gin=(str(tmp_path / "config.gin"),)), method) == config
