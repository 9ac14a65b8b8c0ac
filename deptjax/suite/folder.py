"""A suite's folder: what was asked, the runs, and what is made of them.

suite.json                        what was asked: model, recipes, cells, command; grows when more is asked for
runs/TASK/METHOD/seed-N/          a run's own folder (see `deptjax.training.folder`)
runs/TASK/METHOD/seed-N.json      how the run ended: its test scores, or the line that says why it failed
results.json results.md report.html   made of the above, anew after every run
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from deptjax.checkpoint import disk_errors
from deptjax.errors import UserError
from deptjax.suite.plan import Cell, Plan
from deptjax.training.folder import differences, locked, write_json

FORMAT = 1


class SuiteFolder:
    """The paths of a suite, and its record of what was asked and how each run ended."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self.asked_file = self.path / "suite.json"

    @property
    def results(self) -> pathlib.Path:
        """All numbers."""
        return self.path / "results.json"

    @property
    def table(self) -> pathlib.Path:
        """The tables in Markdown."""
        return self.path / "results.md"

    @property
    def report(self) -> pathlib.Path:
        """The report as one HTML file."""
        return self.path / "report.html"

    def run(self, cell: Cell) -> pathlib.Path:
        """Returns the folder of a run."""
        return self.path / "runs" / str(cell)

    def record_file(self, cell: Cell) -> pathlib.Path:
        """Returns the file that says how a run ended."""
        return self.path / "runs" / f"{cell}.json"

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """Returns how a run ended, `None` where it has not; one whose folder was removed counts as not begun."""
        file = self.record_file(cell)
        if not file.exists():
            return None
        record = read_json(file)
        return None if record.get("status") == "done" and not (self.run(cell) / "result.json").exists() else record

    def write_record(self, cell: Cell, record: dict[str, Any]) -> None:
        """Writes how a run ended."""
        file = self.record_file(cell)
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, record)

    def is_done(self, cell: Cell) -> bool:
        """Returns whether a run has ended well. One that failed is run again."""
        return (self.record(cell) or {}).get("status") == "done"

    def asked(self) -> dict[str, Any]:
        """Returns what `suite.json` says. Raises `UserError` where there is none, or one of another format."""
        if not self.asked_file.exists():
            raise UserError(f"{self.path} holds no suite: it has no suite.json; name the workdir of one")
        asked = read_json(self.asked_file)
        if asked.get("format") != FORMAT:
            raise UserError(
                f"{self.asked_file} has format {asked.get('format')}, expected {FORMAT}; it was written by another"
                " version of deptjax, or by something else: choose another workdir"
            )
        return asked

    def cells(self) -> tuple[Cell, ...]:
        """Returns all runs that were ever asked for here, in the order of the asking."""
        return tuple(Cell.parse(text) for text in self.asked()["cells"])

    @contextlib.contextmanager
    def claimed(self, plan: Plan, model: dict[str, Any], command: str) -> Iterator[None]:
        """Keeps other suites out while runs are made, and writes down what is asked, beside what was asked before.

        Raises `UserError` for a folder that is in use, cannot be written, holds something else, or holds runs of the
        same task and method with other settings.
        """
        with disk_errors(self.path):
            if not self.asked_file.exists() and self._holds_something():
                raise UserError(f"{self.path} is not empty and holds no suite of deptjax; choose another workdir")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = locked(self.path / ".lock", "a suite")
        with contextlib.closing(lock):
            with disk_errors(self.path):
                write_json(self.asked_file, self._together(plan, model, command))
            yield

    def _holds_something(self) -> bool:
        # A suite cut off before it wrote what is asked has at most these two.
        ours = (".lock", ".suite.json.")
        return self.path.exists() and any(not entry.name.startswith(ours) for entry in self.path.iterdir())

    def _together(self, plan: Plan, model: dict[str, Any], command: str) -> dict[str, Any]:
        recipes = {f"{r.task.name}/{r.method.kind}": r.to_config() for r in plan.recipes}
        recipes = json.loads(json.dumps(recipes))
        old: dict[str, Any] = self.asked() if self.asked_file.exists() else {"model": model, "recipes": {}, "cells": []}
        told = differences({"model": old["model"]}, {"model": model})
        if told and any((self.path / "runs").glob("*/*/seed-*/")):
            raise UserError(f"{self.path} holds runs with another model ({told}); choose another workdir")
        for name, recipe in recipes.items():
            begun = any((self.path / "runs" / name).glob("seed-*/"))
            if begun and name in old["recipes"] and (told := differences(old["recipes"][name], recipe)):
                raise UserError(
                    f"{self.path / 'runs' / name} holds runs with other settings ({told}); choose another workdir,"
                    " or remove that folder"
                )
        cells = dict.fromkeys([*old["cells"], *map(str, plan.cells)])
        return {
            "format": FORMAT,
            "name": plan.name,
            "command": command,
            "model": model,
            "recipes": {**old["recipes"], **recipes},
            "cells": list(cells),
        }


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises `UserError` for a file that holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}; it is damaged") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}, expected an object; it was not written by deptjax")
    return found
