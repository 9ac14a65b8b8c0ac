"""Compares the speed of decoding with that of HF `generate` on one machine, in one run, both taking turns.

    python benchmarks/decode.py                                  # everything, about 10 minutes on two cores
    python benchmarks/decode.py --only "t5-small source 64"      # contests whose name holds a text
    python benchmarks/decode.py --table --write-page README.md # from the results of the last run, no measurement

Greedy decoding of 20 new tokens for a batch of 8, float32, random weights: without a prompt, with 100 vectors of prompt
tuning, with DePT m=20, and with a task of its own for every row. README.md beside this file says how it is measured.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)

from benchmarks import report  # noqa: E402
from benchmarks.command import FORMAT, Benchmark, available_threads, machine, save, say  # noqa: E402
from benchmarks.decode_cases import BATCH, MIXED, NEW_TOKENS, TITLES, Contest, contests  # noqa: E402
from benchmarks.worker import WorkerError, built  # noqa: E402
from deptjax.errors import UserError  # noqa: E402

Record = dict[str, Any]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = DECODE.parser(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only contests whose name holds TEXT")
    parser.add_argument("--rounds", type=int, help="timed batches of each side (default 5 to 7)")
    parser.add_argument("--threads", type=int, default=available_threads(), help="of each side (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works; no real numbers")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> Record:
    """Runs the contests that are asked for and keeps what was measured after each."""
    todo = [contest for contest in contests(quick=options.quick, rounds=options.rounds) if options.only in contest.key]
    if not todo:
        raise UserError(f"--only: no contest has '{options.only}' in its name")
    settings = {"quick": options.quick, "threads": options.threads}
    results: Record = {"format": FORMAT, "settings": settings, "machine": machine(), "versions": {}}
    results["contests"] = {}
    for number, contest in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {contest.key}"
        record = run(contest, options.threads, lambda what, head=head: say(f"{head}: {what}"))
        for decoder in record["decoders"]:
            results["versions"].update(decoder.pop("versions"))
        results["contests"][contest.key] = record
        save(options.output, results)
    return results


def run(contest: Contest, threads: int, tell: Any) -> Record:
    """Returns the record of one contest. Raises `WorkerError` when a side fails, or decodes too few tokens."""
    tell("building")
    with built(contest.decoders, threads) as pairs:
        for worker, record in pairs:
            tell(f"compiling {worker.entrant.name}")
            record.update(worker.ask("warm"), seconds=[], others=[])
        for number in range(1, contest.rounds + 1):
            tell(f"batches {number}/{contest.rounds}")
            for worker, record in pairs:
                answer = worker.ask("step")
                if answer["rows"] != worker.entrant.batch * worker.entrant.new_tokens:
                    raise WorkerError(f"{worker.entrant.name} decoded {answer['rows']} tokens")
                record["seconds"].append(round(answer["seconds"], 5))
                record["others"].append(round(answer["others"], 3))
    records = [record for _, record in pairs]
    return {"model": contest.model, "source": contest.source, "rounds": contest.rounds, "decoders": records}


def markdown(results: Record) -> str:
    """Returns the table, and what became of the aims."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    machine = results["machine"]
    lines = [
        f"Measured {machine['date']} on {machine['cpu']}, {results['settings']['threads']} threads, float32, random "
        f"weights; Python {machine['python']}, {versions}. Greedy, {NEW_TOKENS} new tokens, batch {BATCH}; medians "
        "over the rounds, ratios within a round.",
        "",
        "| model, source | prompt | deptjax tokens/s | HF generate tokens/s | deptjax / HF | time, to no prompt |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for contest in results["contests"].values():
        found = {decoder["name"]: decoder for decoder in contest["decoders"]}
        for method, title in TITLES.items():
            ours, theirs = found[f"deptjax {method}"], found.get(f"torch {method}")
            against = f"{_speed(theirs):,.0f} | {report.pair_ratio(theirs, ours):.2f}" if theirs else "cannot | -"
            prompt = "1.00" if method == "none" else f"{report.pair_ratio(ours, found['deptjax none']):.2f}"
            lines.append(
                f"| {contest['model']}, {contest['source']} | {title} | {_speed(ours):,.0f} | {against} | {prompt} |"
            )
    lines += ["", *_aims(results)]
    return "\n".join(lines)


def _speed(decoder: Record) -> float:
    spec = decoder["spec"]
    return spec["batch"] * spec["new_tokens"] / statistics.median(decoder["seconds"])


def _aims(results: Record) -> list[str]:
    """Returns a line for each aim, with the worst case of what was measured."""
    faster, dearer, mixed = [], [], []
    for contest in results["contests"].values():
        found = {decoder["name"]: decoder for decoder in contest["decoders"]}
        for method in ("pt100", "dept20"):
            ours, where = found[f"deptjax {method}"], f"{contest['model']}, {contest['source']}, {TITLES[method]}"
            faster.append((report.pair_ratio(found[f"torch {method}"], ours), where))
            dearer.append((report.pair_ratio(ours, found["deptjax none"]), where))
            mixed.append((report.pair_ratio(found[f"deptjax {method}{MIXED}"], ours), where))
    shown = (
        ("at least 3 times HF generate with the prompt", min(faster), 3.0, False),
        ("with a prompt at most 10 % slower than without", max(dearer), 1.1, True),
        ("a batch of mixed tasks at most 10 % slower than one of a single task", max(mixed), 1.1, True),
    )
    lines = []
    for text, (value, where), limit, at_most in shown:
        met = value <= limit if at_most else value >= limit
        lines.append(f"- {text}: {'met' if met else 'not met'}; {value:.2f} at worst ({where})")
    return lines


DECODE = Benchmark("decode", measure, markdown)

if __name__ == "__main__":
    sys.exit(DECODE.run(parse(None)))
