"""Compares deptjax with torch + HF peft on one machine, in one run, both taking their steps in turn.

    python benchmarks/compare.py                                 # everything, about 25 minutes on two cores
    python benchmarks/compare.py --sections shared --steps 3     # a part of it
    python benchmarks/compare.py --resume                        # goes on where a run was interrupted
    python benchmarks/compare.py --table --write-page README.md    # from the results of the last run, no measurement

README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import math
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)

from benchmarks import cases, collectives, report  # noqa: E402
from benchmarks.command import FORMAT, Benchmark, available_threads, machine, resumed, save, say  # noqa: E402
from benchmarks.worker import WorkerError, built  # noqa: E402
from deptjax.errors import UserError, nearest  # noqa: E402

Record = dict[str, Any]
COLLECTIVES = "collectives"  # the section that is compiled and counted, and not timed
SECTIONS = (*cases.SECTIONS, COLLECTIVES)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = COMPARE.parser(__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="only contests whose name holds TEXT, as 't5-small'")
    parser.add_argument(
        "--steps", type=int, help="timed steps of each side in train, short and shared (default 5 to 9)"
    )
    parser.add_argument("--threads", type=int, default=available_threads(), help="of each side (default %(default)s)")
    parser.add_argument("--scan", action="store_true", help="scan deptjax's layers: compiles sooner, may step slower")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works; no real numbers")
    parser.add_argument("--resume", action="store_true", help="keep what --output already holds under equal settings")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> Record:
    """Runs the contests that are asked for. Returns all results; those that failed have their `error` there."""
    sections = tuple(options.sections.split(","))
    for section in sections:
        if section not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise UserError(f"--sections: '{section}' is not one of {known}.{nearest(section, SECTIONS)}")
    for name in ("steps", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if options.threads > available_threads():
        raise UserError(f"--threads is {options.threads}, and {available_threads()} processors are available; lower it")
    todo = cases.contests(sections, quick=options.quick, steps=options.steps)
    todo = [cases.with_scan(contest) for contest in todo] if options.scan else todo
    todo = [contest for contest in todo if options.only in contest.key]
    counted = COLLECTIVES in sections and not options.only
    if not todo and not counted:
        raise UserError(f"--only: no contest of {', '.join(sections)} has '{options.only}' in its name")
    settings = {"quick": options.quick, "threads": options.threads, "scan": options.scan}
    results: Record = {"format": FORMAT, "settings": settings, "machine": machine(), "versions": {}}
    results["contests"] = {}
    if options.resume and options.output.exists():
        results = resumed(options.output, settings)
    kept = {c.key for c in todo if is_of(results["contests"].get(c.key), c)}
    if kept:
        say(f"kept from {options.output}: {len(kept)} of {len(todo)} contests")
    todo = [contest for contest in todo if contest.key not in kept]
    if counted and not results.get(COLLECTIVES):
        say("compiling steps for eight devices, to count their collectives")
        try:
            results[COLLECTIVES] = collectives.measure()
            results["contests"].pop(COLLECTIVES, None)
        except RuntimeError as error:
            results["contests"][COLLECTIVES] = {"section": COLLECTIVES, "title": COLLECTIVES, "error": str(error)}
        save(options.output, results)
    clock = Clock(todo)
    for number, contest in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {contest.key}"
        try:
            record = run(contest, options.threads, lambda what, head=head: say(f"{head}: {what}{clock.left()}"))
        except WorkerError as error:
            record = {"section": contest.section, "title": contest.title, "error": str(error)}
        for entrant in record.get("entrants", ()):
            results["versions"].update(entrant.pop("versions"))
        results["contests"][contest.key] = record
        clock.done(contest)
        save(options.output, results)
    say(f"measured in {clock.elapsed() / 60:.1f} minutes; the numbers of every step are in {options.output}")
    return results


def failures(results: Record) -> list[str]:
    """Returns a line for each contest that failed."""
    return [f"{key}: {contest['error']}" for key, contest in results["contests"].items() if "error" in contest]


def is_of(record: Record | None, contest: cases.Contest) -> bool:
    """Returns whether a record holds the results of exactly this contest."""
    if record is None or "error" in record:
        return False
    # Fields that came after a result was written had their default values then.
    specs = tuple(cases.Entrant(**entrant["spec"]) for entrant in record["entrants"])
    return record["rounds"] == contest.rounds and specs == contest.entrants


def run(contest: cases.Contest, threads: int, tell: Any) -> Record:
    """Returns the record of one contest: every step's seconds and loss, memory, trainable parameters.

    All entrants are built first, together; then each is compiled and warmed up alone; then they take steps in turn.
    Raises `WorkerError` when one of them fails, when a loss is not finite, or when two sides of one method do not
    train the same number of parameters.
    """
    tell("building")
    with built(contest.entrants, threads) as pairs:
        records = [record for _, record in pairs]
        check_parameters(records)
        for worker, record in pairs:
            tell(f"compiling {worker.entrant.name}")
            record.update(worker.ask("warm"))
            record.update(worker.ask("reset"))
            record.update(seconds=[], cpu_seconds=[], losses=[], others=[], rows=0)
        for number in range(1, contest.rounds + 1):
            tell(f"steps {number}/{contest.rounds}")
            for worker, record in pairs:
                answer = worker.ask("step")
                if not math.isfinite(answer["loss"]):
                    raise WorkerError(f"{worker.entrant.name}: the loss is {answer['loss']}")
                record["seconds"].append(round(answer["seconds"], 5))
                record["cpu_seconds"].append(round(answer["cpu"], 5))
                record["others"].append(round(answer["others"], 3))
                record["losses"].append(round(answer["loss"], 5))
                record["rows"] += answer["rows"]
        for worker, record in pairs:
            record.update(worker.ask("peak"))
    return {
        "section": contest.section,
        "title": contest.title,
        "rounds": contest.rounds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "entrants": records,
    }


def check_parameters(records: list[Record]) -> None:
    """Raises `WorkerError` when entrants with the same method train different numbers of parameters."""
    counts: dict[str, int] = {}
    for record in records:
        method = record["spec"]["method"]
        if counts.setdefault(method, record["parameters"]) != record["parameters"]:
            raise WorkerError(f"{method} trains {counts[method]} parameters on one side and {record['parameters']}")


class Clock:
    """How long is left, from the contests done and a guess of how the others compare with them."""

    def __init__(self, contests: list[cases.Contest]):
        self._left, self._done, self._began = sum(contest.weight for contest in contests), 0.0, time.perf_counter()

    def done(self, contest: cases.Contest) -> None:
        """Counts a contest."""
        self._left -= contest.weight
        self._done += contest.weight

    def elapsed(self) -> float:
        """Returns seconds since the start."""
        return time.perf_counter() - self._began

    def left(self) -> str:
        """Returns `" (about 3 min left)"`, or nothing before the first contest is done."""
        if not self._done:
            return ""
        minutes = self.elapsed() * self._left / self._done / 60
        return f" (about {max(math.ceil(minutes), 1)} min left)"


COMPARE = Benchmark("compare", measure, report.markdown, failures)

if __name__ == "__main__":
    sys.exit(COMPARE.run(parse(None)))
