"""Measures deptjax on one NVIDIA GPU, beside torch + HF peft where these can be imported.

    python benchmarks/gpu.py                        # everything; a machine of one GPU, about an hour
    python benchmarks/gpu.py --resume --limit-s 540 # goes on where it was stopped, and stops itself before 540 seconds
    python benchmarks/gpu.py --only "llama2-7b"     # contests whose name holds a text
    python benchmarks/gpu.py --check                # are the numbers right on this device?
    python benchmarks/gpu.py --quick                # a smoke test on tiny models, on the CPU
    python benchmarks/gpu.py --table --write-page docs/performance.md      # from the last results, no measurement

README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)

from benchmarks import gpu_cases, gpu_report  # noqa: E402
from benchmarks.cases import Contest, Entrant  # noqa: E402
from benchmarks.command import FORMAT, Benchmark, available_threads, machine, resumed, save, say  # noqa: E402
from benchmarks.compare import check_parameters  # noqa: E402
from benchmarks.matmul import Products  # noqa: E402
from benchmarks.worker import NoAnswerYet, OutOfMemory, Worker, WorkerError, environment_of  # noqa: E402
from deptjax.errors import UserError, nearest  # noqa: E402
from deptjax.models.fused_attention import IMPLEMENTATIONS  # noqa: E402
from deptjax.models.remat import REMAT  # noqa: E402

Record = dict[str, Any]
TORCH = ("torch", "transformers", "peft")
RATE_TURNS = 9  # turns of products, of which the median counts
SPARE = 5.0  # seconds of the limit for ending the processes and writing the results


def main(argv: list[str] | None = None) -> int:
    """Measures, keeps the results, prints the table. Returns the exit status: 1 for a failure, 2 for a mistake."""
    options = parse(argv)
    return check(options) if options.check else GPU.run(options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = GPU.parser(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only contests whose name holds TEXT, as 't5-3b'")
    parser.add_argument("--steps", type=int, help="timed turns of each side (default 5; tiny models 2)")
    parser.add_argument("--limit-s", type=float, metavar="SECONDS", help="stop before so many seconds are over")
    parser.add_argument(
        "--attention", type=names, default=(None,), metavar="A,B", help="implementations to compare (default: auto)"
    )
    parser.add_argument(
        "--remat", type=names, default=("none",), metavar="A,B", help="policies to compare (default: none)"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave torch's side out")
    parser.add_argument("--device", choices=("gpu", "cpu"), help="default gpu, and cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works; no real numbers")
    parser.add_argument("--check", action="store_true", help="measure nothing: compare results with those of the CPU")
    parser.add_argument("--resume", action="store_true", help="keep what --output already holds under equal settings")
    options = parser.parse_args(argv)
    options.device = options.device or ("cpu" if options.quick else "gpu")
    return options


def names(text: str) -> tuple[str, ...]:
    """Returns the names in a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


class Deadline:
    """The time that is left; there is always some without a limit."""

    def __init__(self, seconds: float | None):
        self._began = time.perf_counter()
        self._ends = math.inf if seconds is None else self._began + seconds - SPARE

    def left(self) -> float | None:
        """Returns seconds, perhaps negative, or `None` without a limit."""
        return None if self._ends == math.inf else self._ends - time.perf_counter()

    def allows(self, seconds: float) -> bool:
        """Returns whether something that takes so long can still be done."""
        return time.perf_counter() + seconds <= self._ends

    def elapsed(self) -> float:
        """Returns seconds since the start."""
        return time.perf_counter() - self._began


def measure(options: argparse.Namespace) -> Record:
    """Runs the contests that are asked for, until they are done or the time is over. Returns all results."""
    todo, results = plan(options)
    kept = {c.key for c in todo if is_of(results["contests"].get(c.key), c)}
    if kept:
        say(f"kept from {options.output}: {len(kept)} of {len(todo)} contests")
    # What failed is tried again when all else is done.
    todo = sorted((c for c in todo if c.key not in kept), key=lambda contest: contest.key in results["contests"])
    deadline, longest = Deadline(options.limit_s), 0.0
    try:
        rate = matmul_rate(options.device, options.quick, deadline) if todo else {}
        results["device"] = rate.pop("device", results.get("device"))
        for number, contest in enumerate(todo, 1):
            if not deadline.allows(longest):
                raise NoAnswerYet(contest.key)
            began = time.perf_counter()
            head = f"[{number}/{len(todo)}] {contest.key}"
            record = run(contest, deadline, lambda what, head=head: say(f"{head}: {what}"))
            for entrant in record["entrants"]:
                results["versions"].update(entrant.pop("versions", {}))
            results["contests"][contest.key] = {**record, **rate}
            save(options.output, results)
            longest = time.perf_counter() - began  # the next model is as large or larger
    except NoAnswerYet as late:
        say(f"stopped before the limit of {options.limit_s:g} s, at {late}; go on with --resume")
    say(f"measured for {deadline.elapsed() / 60:.1f} minutes; the numbers are in {options.output}")
    save(options.output, results)
    return results


def plan(options: argparse.Namespace) -> tuple[list[Contest], Record]:
    """Returns the contests that are asked for, and the results so far. Raises `UserError` for a mistake."""
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps is {options.steps}; it must be at least 1")
    if options.limit_s is not None and options.limit_s <= SPARE:
        raise UserError(f"--limit-s is {options.limit_s:g}; it must be more than {SPARE:g}")
    check_names("--attention", options.attention, IMPLEMENTATIONS)
    check_names("--remat", options.remat, REMAT)
    missing = [name for name in TORCH if importlib.util.find_spec(name) is None]
    sides = gpu_cases.Sides(options.device, options.attention, options.remat, not missing and not options.no_torch)
    todo = [
        contest
        for contest in gpu_cases.contests(sides, quick=options.quick, rounds=options.steps)
        if options.only in contest.key
    ]
    if not todo:
        raise UserError(f"--only: no contest has '{options.only}' in its name")
    settings = {"quick": options.quick, "device": options.device}
    results: Record = {"format": FORMAT, "settings": settings, "machine": machine(), "versions": {}}
    results.update(device=None, contests={}, no_torch="left out" if options.no_torch else ", ".join(missing))
    if options.resume and options.output.exists():
        found = resumed(options.output, settings)
        results = {**results, "versions": found["versions"], "contests": found["contests"], "device": found["device"]}
    return todo, results


def check_names(flag: str, given: Sequence[str | None], known: Sequence[str]) -> None:
    """Raises `UserError` for a name that is not known; `None` is the default."""
    for name in given:
        if name is not None and name not in known:
            raise UserError(f"{flag}: '{name}' is not one of {', '.join(known)}.{nearest(name, known)}")


def is_of(record: Record | None, contest: Contest) -> bool:
    """Returns whether a record holds this contest, measured as far as the card's memory allows."""
    if record is None or record["rounds"] != contest.rounds:
        return False
    if any("error" in entrant and not entrant.get("out_of_memory") for entrant in record["entrants"]):
        return False
    return tuple(Entrant(**entrant["spec"]) for entrant in record["entrants"]) == contest.entrants


def matmul_rate(device: str, quick: bool, deadline: Deadline) -> Record:
    """Returns `rate`, the floating-point operations a second of products of square bf16 matrices, and the `device`.

    Raises `UserError` when there is no device to measure on.
    """
    products = Products(device, width=256 if quick else 8192)
    say(f"measuring {products.name}")
    worker = Worker(products, available_threads())
    try:
        what = worker.ask("build", deadline.left(), entrant=dataclasses.asdict(products), threads=available_threads())
        worker.ask("warm", deadline.left())
        seconds = [worker.ask("step", deadline.left())["seconds"] for _ in range(RATE_TURNS)]
    except WorkerError as error:
        remedy = "install jax for it, pip install 'deptjax[gpu]', or add --device cpu"
        raise UserError(f"--device {device}: jax cannot compute there ({error}); {remedy}") from error
    finally:
        worker.close()
    kept = {name: what[name] for name in ("kind", "memory_mib", "platform")}
    return {"device": {**kept, "driver": driver()}, "rate": products.flops / statistics.median(seconds)}


def driver() -> str | None:
    """Returns the version of NVIDIA's driver, or `None` where there is none to ask."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return asked.stdout.splitlines()[0].strip() if asked.stdout.strip() else None
    return None


def run(contest: Contest, deadline: Deadline, tell: Callable[[str], None]) -> Record:
    """Returns the record of one contest; an entrant that failed has its `error` there instead of numbers.

    Entrants on the card together take turns. One that had too little memory beside the others then runs alone, after
    them. Raises `NoAnswerYet` when the time is over.
    """
    found: dict[Entrant, Record] = {}
    waves = gpu_cases.waves(contest)
    for wave in waves:
        found.update(run_together(wave, contest.rounds, deadline, tell))
        if len(wave) > 1:
            waves.extend((entrant,) for entrant in wave if found[entrant].get("out_of_memory"))
    records = [found[entrant] for entrant in contest.entrants]
    flops = [record["flops"] for record in records if "flops" in record]
    measured = [record for record in records if "error" not in record]
    try:
        check_parameters(measured)
    except WorkerError as error:  # unequal work is no comparison
        for record in measured:
            record["error"] = str(error)
    return {
        "title": contest.title,
        "rounds": contest.rounds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "flops": flops[0] if flops else None,
        "entrants": records,
    }


def run_together(
    entrants: Sequence[Entrant], rounds: int, deadline: Deadline, tell: Callable[[str], None]
) -> dict[Entrant, Record]:
    """Returns the records of entrants that are on the card together: built at once, warmed up alone, timed in turn."""
    records: dict[Entrant, Record] = {
        entrant: {"name": entrant.name, "spec": dataclasses.asdict(entrant), "together": len(entrants)}
        for entrant in entrants
    }
    threads = available_threads()
    with contextlib.ExitStack() as stack:
        workers = {}
        for entrant in entrants:
            workers[entrant] = Worker(entrant, threads)
            stack.callback(workers[entrant].close)
            workers[entrant].send("build", entrant=dataclasses.asdict(entrant), threads=threads)

        def every(what: str, ask: Callable[[Worker, Record], None]) -> None:
            """Asks every worker that is left, one behind the other; one that fails leaves, and its memory with it."""
            for entrant, worker in list(workers.items()):
                tell(f"{what} {entrant.name}")
                try:
                    ask(worker, records[entrant])
                except WorkerError as error:
                    records[entrant].update(error=str(error), out_of_memory=isinstance(error, OutOfMemory))
                    workers.pop(entrant).close()

        every("building", lambda worker, record: record.update(worker.answer(deadline.left())))
        every("compiling", lambda worker, record: warm(worker, record, deadline))
        for number in range(1, rounds + 1):
            every(f"turn {number}/{rounds}", lambda worker, record: step(worker, record, deadline))
        peak = "device_peak" if entrants[0].device == "gpu" else "peak"
        every("memory of", lambda worker, record: record.update(worker.ask(peak, deadline.left())))
    return records


def warm(worker: Worker, record: Record, deadline: Deadline) -> None:
    """Compiles and takes the first steps; deptjax's side also says how many operations a step has."""
    record.update(worker.ask("warm", deadline.left()), seconds=[], losses=[])
    if worker.entrant.side == "deptjax":
        record.update(worker.ask("flops", deadline.left()))


def step(worker: Worker, record: Record, deadline: Deadline) -> None:
    """Takes a turn, and keeps the seconds of one step of it. Raises `WorkerError` for a loss that is not finite."""
    answer = worker.ask("step", deadline.left())
    if not math.isfinite(answer["loss"]):
        raise WorkerError(f"{worker.entrant.name}: the loss is {answer['loss']}")
    record["seconds"].append(round(answer["seconds"] / worker.entrant.batches, 6))
    record["losses"].append(round(answer["loss"], 5))


def check(options: argparse.Namespace) -> int:
    """Runs the checks of `gpu_check` in a process of its own, on the device, and returns its exit status."""
    quick = ["--quick"] if options.quick else []
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", options.device, *quick]
    try:
        return subprocess.run(
            command, cwd=ROOT, env=environment_of(options.device), timeout=options.limit_s, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        say(f"gpu: error: --limit-s {options.limit_s:g} was over before all checks were done; raise it")
        return 2


GPU = Benchmark("gpu", measure, gpu_report.markdown, gpu_report.failures)

if __name__ == "__main__":
    sys.exit(main())
