"""What all benchmarks' commands do: measure or read the last results, print the table, put it into a page."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.worker import WorkerError
from deptjax.errors import UserError

FORMAT = 1  # of the files of results; one without a format has this one
Record = dict[str, Any]


def _none(results: Record) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark by its name: how it measures, how it shows results, and what of them failed, a line each."""

    name: str
    measure: Callable[[argparse.Namespace], Record]
    markdown: Callable[[Record], str]
    failures: Callable[[Record], list[str]] = _none

    @property
    def output(self) -> pathlib.Path:
        """The file of results beside the benchmark."""
        return pathlib.Path(__file__).with_name(f"{self.name}.json")

    @property
    def markers(self) -> tuple[str, str]:
        """The lines of a page between which the table stands."""
        return f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->"

    def parser(self, doc: str | None) -> argparse.ArgumentParser:
        """Returns a parser with what every benchmark can be asked for; `doc` is that of its file."""
        parser = argparse.ArgumentParser(f"{self.name}.py", description=(doc or "").split("\n")[0])
        parser.add_argument("--output", type=pathlib.Path, default=self.output, help="JSON (default %(default)s)")
        parser.add_argument("--table", action="store_true", help="measure nothing, print the table of --output")
        parser.add_argument("--write-page", type=pathlib.Path, metavar="FILE", help="also put the table into this file")
        return parser

    def run(self, options: argparse.Namespace) -> int:
        """Measures, keeps the results, prints the table. Returns the exit status: 1 for a failure, 2 for a mistake."""
        try:
            results = load(options.output) if options.table else self.measure(options)
            text = self.markdown(results)
            if options.write_page is not None:
                write_between(options.write_page, text, *self.markers)
            print(text)
        except (UserError, WorkerError) as error:
            say(f"{self.name}: error: {error}")
            return 2 if isinstance(error, UserError) else 1
        except KeyboardInterrupt:
            kept = f"; what was measured is in {options.output}. Go on with --resume." if "resume" in options else "."
            say(f"\nInterrupted{kept}")
            return 130
        failed = self.failures(results)
        for line in failed:
            say(f"{self.name}: not measured: {line}")
        return 1 if failed else 0


def load(path: pathlib.Path) -> Record:
    """Returns the results in a file. Raises `UserError` when there are none that this version reads."""
    if not path.exists():
        raise UserError(f"{path} does not exist; measure first, or name another --output")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it and measure again") from error
    if results.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; remove it and measure again")
    return results


def resumed(path: pathlib.Path, settings: Record) -> Record:
    """Returns the results in a file. Raises `UserError` when they were measured under other settings."""
    found = load(path)
    if found["settings"] != settings:
        raise UserError(f"{path} was measured with {found['settings']}, not {settings}; drop --resume")
    return found


def save(path: pathlib.Path, results: Record) -> None:
    """Writes the results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def write_between(path: pathlib.Path, text: str, begin: str, end: str) -> None:
    """Replaces what stands between the two markers in a file. Raises `UserError` when they are not there once each."""
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file that holds {begin} and {end}")
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise UserError(f"{path} must hold the lines {begin} and {end} once each, in this order; add them")
    before, rest = old.split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def available_threads() -> int:
    """Returns the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> Record:
    """Returns what the numbers depend on: processor, cores, memory, system, Python."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def say(text: str) -> None:
    """Prints a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)
