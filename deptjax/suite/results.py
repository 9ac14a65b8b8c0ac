"""The numbers of a suite: those of every run, read from the runs' folders, and their means over the seeds."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from deptjax.errors import UserError
from deptjax.suite.folder import FORMAT, SuiteFolder, read_json
from deptjax.suite.plan import Cell

Numbers = dict[str, Any]
ALONE = "a process of its own"
AFTER_OTHERS = "a process that had made other runs"
WITH_OTHERS = "a process and all runs it had made"
IN_POPULATION = "a population, all of its members together"
AVERAGE = "average"  # stands for all tasks together, where a task's name stands otherwise


def read_results(workdir: str | pathlib.Path) -> Numbers:
    """Returns the content of `results.json`, made from what is in the folder of a suite.

    `runs` has one entry a run that was asked for: `task`, `method`, `seed`, `status` (`done`, `failed` or `missing`);
    of a failed one `error`, and `traceback` where nobody expected it; of one that is done `dev` and `test` (scores of
    the best prompt by the name of the metric, that which selects it first), `best_step`, `trainable_parameters`,
    `seconds_per_step` (median), `peak_mib` and `peak_of` (what it is the peak of), `wall_seconds` (of the last call,
    where a run was interrupted), `device`, and `curve` (`[step, value]` pairs by name, of the loss and each metric on
    the dev split).
    `summary` has one entry a task and method, and one a method over all tasks (see `summarized`).

    Raises `UserError` for a folder that holds no suite, or a file in it that is damaged.
    """
    folder = SuiteFolder(workdir)
    asked = folder.asked()
    runs = [_run(folder, cell) for cell in folder.cells()]
    return {
        "format": FORMAT,
        "name": asked["name"],
        "command": asked["command"],
        "model": asked["model"],
        "recipes": asked["recipes"],
        "runs": runs,
        "summary": summarized(runs),
    }


def _run(folder: SuiteFolder, cell: Cell) -> Numbers:
    named: Numbers = {"task": cell.task, "method": cell.method, "seed": cell.seed}
    record = folder.record(cell)
    if record is None:
        return {**named, "status": "missing"}
    if record["status"] != "done":
        return {**named, **record}
    result = read_json(folder.run(cell) / "result.json")
    try:
        return {**named, **_done(folder, cell, record, result)}
    except KeyError as error:
        raise UserError(
            f"{folder.record_file(cell)} or {folder.run(cell) / 'result.json'} has no field {error}: it was changed, or"
            " written by another version; remove both and run the suite again"
        ) from None


def _done(folder: SuiteFolder, cell: Cell, record: Numbers, result: Numbers) -> Numbers:
    return {
        "status": "done",
        "dev": _without_split(result["metrics"]),
        "test": _without_split(record["test"]),
        "best_step": result["best_step"],
        "trainable_parameters": result["trainable_parameters"],
        "seconds_per_step": result["seconds_per_step"],
        "peak_mib": result["peak_mib"],
        **{name: record[name] for name in ("peak_of", "wall_seconds", "device")},
        "curve": read_curve(folder.run(cell) / "metrics.jsonl"),
    }


def _without_split(scores: Numbers) -> Numbers:
    """Returns scores by the bare name of the metric: `{"accuracy": 0.9}` of `{"test/accuracy": 0.9}`."""
    return {name.partition("/")[2]: score for name, score in scores.items()}


def read_curve(file: pathlib.Path) -> dict[str, list[list[float]]]:
    """Returns the `[step, value]` pairs of the loss and of each dev metric in a run's log.

    What is not finite is left out, and so is a line that was cut off by a crash.
    """
    curve: dict[str, list[list[float]]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        for name, value in line.items():
            if (name == "loss" or name.startswith("dev/")) and value is not None:
                curve.setdefault(name, []).append([line["step"], value])
    return curve


def summarized(runs: Iterable[Numbers]) -> list[Numbers]:
    """Returns the means of runs over their seeds.

    One entry a task and method with `n` runs that are done and `of` asked for; `test` and `dev`, the `mean` and sample
    standard deviation `sd` (n - 1 below the sum; `None` of a single one) of each metric; the median `seconds_per_step`
    over the runs, the largest `peak_mib`, and `trainable_parameters`, as many as the largest run has.

    And where there are several tasks, one entry a method with the task `average`: of the first metric of each task,
    averaged over the tasks for each seed that is done on all of them, `score`'s mean and deviation over these seeds;
    `seeds` are asked for.
    """
    runs = list(runs)
    tasks, methods = (list(dict.fromkeys(run[name] for run in runs)) for name in ("task", "method"))
    summary = []
    for task in tasks:
        for method in methods:
            cells = [run for run in runs if (run["task"], run["method"]) == (task, method)]
            if cells:
                summary.append({"task": task, "method": method, **_of_cells(cells)})
    if len(tasks) > 1:
        for method in methods:
            cells = [run for run in runs if run["method"] == method]
            summary.append({"task": AVERAGE, "method": method, **_of_cells(cells), **_over_tasks(cells, tasks)})
    return summary


def _of_cells(cells: Sequence[Numbers]) -> Numbers:
    done = [cell for cell in cells if cell["status"] == "done"]
    seconds = [cell["seconds_per_step"] for cell in done if cell["seconds_per_step"] is not None]
    one_task = len({cell["task"] for cell in cells}) == 1
    entry: Numbers = {"n": len(done), "of": len(cells)}
    for split in ("dev", "test"):
        names = dict.fromkeys(name for cell in done if one_task for name in cell[split])
        entry[split] = {name: mean_and_sd([cell[split].get(name) for cell in done]) for name in names}
    entry["score"] = next(iter(entry["test"].values()), None)
    entry["trainable_parameters"] = max((cell["trainable_parameters"] for cell in done), default=None)
    entry["seconds_per_step"] = statistics.median(seconds) if seconds else None
    entry["peak_mib"] = max((cell["peak_mib"] for cell in done), default=None)
    return entry


def _over_tasks(cells: Sequence[Numbers], tasks: Sequence[str]) -> Numbers:
    """Returns a method's score over all tasks, of the seeds done on all of them, and how many seeds are asked for."""
    scores: dict[int, list[float]] = {}
    for cell in cells:
        score = main_score(cell)
        if score is not None:
            scores.setdefault(cell["seed"], []).append(score)
    averages = [statistics.fmean(of_seed) for of_seed in scores.values() if len(of_seed) == len(tasks)]
    return {"score": mean_and_sd(averages) if averages else None, "seeds": len({cell["seed"] for cell in cells})}


def main_score(cell: Numbers) -> float | None:
    """Returns the first test metric of a run, `None` where it is not done or has no finite score."""
    return next(iter(cell.get("test", {}).values()), None)


def mean_and_sd(values: Sequence[float | None]) -> Numbers:
    """Returns `mean`, sample standard deviation `sd` (`None` of fewer than two) and `n` of the values that are numbers.

    >>> mean_and_sd([0.25, 0.5, 0.75, None])
    {'mean': 0.5, 'sd': 0.25, 'n': 3}
    >>> mean_and_sd([0.5])
    {'mean': 0.5, 'sd': None, 'n': 1}
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }
