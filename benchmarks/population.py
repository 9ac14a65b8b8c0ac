"""Nine pairs of learning rates: one population against nine runs, one behind the other.

    python benchmarks/population.py                              # SmolLM2-135M on TREC-6, about 15 minutes on two cores
    python benchmarks/population.py --model t5-small --rounds 3  # T5-small's shape with random weights
    python benchmarks/population.py --table --write-page benchmarks/README.md  # the table of the last run

Both sides are the public functions, `train_population` and `train`, on the same rows with the same nine pairs (the grid
of DePT's authors is three rates of the prompt by three of the low-rank pair), each side in a process of its own, in
turn. Wall time is that of the calls: compiling and training, not loading the model; nothing is evaluated, and no
compiled program is kept from one process to the next.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)

from benchmarks.command import Benchmark, save, say  # noqa: E402
from benchmarks.worker import OtherWork, memory_mib, reset_peak  # noqa: E402
from deptjax.errors import UserError  # noqa: E402

Record = dict[str, Any]
SIDES = ("population", "single")
TITLES = {"population": "one population of nine", "single": "nine runs"}
MODELS = ("smollm2", "t5-small", "llama-tiny", "t5-tiny")
EARLY = 3  # the step whose losses are compared, beside the last one's
BY = (1 / 3, 1.0, 3.0)  # around each default rate


def main(argv: list[str] | None = None) -> int:
    """Measures, keeps the results, prints the table. Returns the exit status."""
    options = parse(argv)
    if options.side:
        print(json.dumps(run_side(options)))
        return 0
    return POPULATION.run(options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = POPULATION.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default %(default)s, with its real weights")
    parser.add_argument("--task", default="trec6", help="a registered task with labels (default %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of each run, at least 3 (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a member (default %(default)s)")
    parser.add_argument("--buckets", type=int, default=2, help="padded lengths, each a program (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often both sides run (default %(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> Record:
    """Runs both sides in turn, and begins with another in every round; writes the results and returns them."""
    if options.steps < EARLY:
        raise UserError(f"--steps is {options.steps}; it must be at least {EARLY}")
    runs: dict[str, list[Record]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            say(f"round {number + 1} of {options.rounds}: {TITLES[side]}")
            flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in COMMON]
            command = [sys.executable, str(pathlib.Path(__file__)), f"--side={side}", *flags]
            ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            if ended.returncode:
                raise UserError(f"the side '{side}' ended with status {ended.returncode}; what it said is above")
            runs[side].append(json.loads(ended.stdout.splitlines()[-1]))
        results = {**{name: getattr(options, name) for name in COMMON}, "runs": runs}
        save(options.output, results)  # what is measured is kept, round by round
    return results


COMMON = ("model", "task", "steps", "batch_size", "buckets")


def run_side(options: argparse.Namespace) -> Record:
    """Trains all nine pairs in this process, and returns what it took."""
    import jax

    from deptjax.data.tasks import get_task
    from deptjax.methods import DePT
    from deptjax.training.members import grid, member_name
    from deptjax.training.population import train_population
    from deptjax.training.run import train

    jax.config.update("jax_enable_compilation_cache", False)
    backbone, task = make_backbone(options.model), get_task(options.task)
    method = DePT(prompt_length=20, rank=None, max_length=64).resolve(backbone.width)
    rates = method.learning_rates(backbone.prompt_lr)
    members = grid(**{f"{group}_lr": [rate * by for by in BY] for group, rate in rates.items()})
    settings: Record = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "buckets": options.buckets,
        "eval_every": 0,
        "log_every": 1,
        "progress": False,
    }
    programs = Programs()
    with tempfile.TemporaryDirectory() as folder, programs, OtherWork() as others:
        place = pathlib.Path(folder)
        reset_peak()
        began = time.perf_counter()
        if options.side == "population":
            ended = train_population(backbone, method, task, place, members, **settings)
            each = [ended.seconds_per_step or 0.0]
            logs = [place / "members" / member.name for member in ended.members]
        else:
            logs = [place / member_name(member) for member in members]
            runs = [train(backbone, method, task, at, **settings, **own) for at, own in zip(logs, members, strict=True)]
            each = [run.seconds_per_step or 0.0 for run in runs]
        wall = time.perf_counter() - began
        losses = [[json.loads(line)["loss"] for line in (log / "metrics.jsonl").open()] for log in logs]
    return {
        "wall_s": wall,
        "step_s": statistics.median(each),
        "programs": programs.count,
        "compile_s": programs.seconds,
        "peak_mib": memory_mib("VmHWM"),
        "losses": losses,
        "others": others.share,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


class Programs:
    """Counts the training steps that are compiled while the `with` block runs, and the seconds of all compiling."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def __enter__(self) -> Programs:
        import jax

        def heard(event: str, seconds: float, **fields: Any) -> None:
            if event.endswith("backend_compile_duration"):
                self.seconds += seconds
                self.count += fields.get("fun_name") in ("step", "jit(step)")

        jax.monitoring.register_event_duration_secs_listener(heard)
        return self

    def __exit__(self, *error: object) -> None:
        pass


def make_backbone(model: str) -> Any:
    """Returns the real SmolLM2, or a model of random weights with T5's tokenizer."""
    logging.getLogger("deptjax").setLevel(logging.ERROR)
    if model == "smollm2":
        from deptjax.interop.load import load_backbone

        return load_backbone("packaged:smollm2-135m-instruct")
    from benchmarks.cases import SIZES
    from benchmarks.jax_side import cheap_params, make_config
    from deptjax.interop import packaged
    from deptjax.interop.tokenizers import load_tokenizer
    from deptjax.models.backbone import Backbone

    config = make_config(SIZES[model], scan=False)
    if model.endswith("tiny"):
        from deptjax.testing import tiny_tokenizer

        return Backbone(model, config, cheap_params(config), tiny_tokenizer())
    return Backbone(model, config, cheap_params(config), load_tokenizer(packaged.tokenizer_folder("t5")))


def markdown(results: Record) -> str:
    """Returns the table: medians over the rounds, and the ratio of nine runs to one population."""
    middle = {
        side: {
            name: statistics.median(run[name] for run in runs) for name in ("wall_s", "step_s", "compile_s", "peak_mib")
        }
        for side, runs in results["runs"].items()
    }
    first = results["runs"]["population"][0]
    lines = [
        f"{results['model']}, {results['task']}, DePT m=20, nine pairs of learning rates, {results['steps']} steps of "
        f"{results['batch_size']} rows a member; {first['device']}, jax {first['jax']}, "
        f"{len(results['runs']['single'])} round(s), other work at most "
        f"{max(run['others'] for runs in results['runs'].values() for run in runs):.0%} of the machine.",
        "",
        "| | wall time | of it compiling | programs of the step | a step of a member (median) | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for side in SIDES:
        own = middle[side]
        programs = results["runs"][side][0]["programs"]
        lines.append(
            f"| {TITLES[side]} | {own['wall_s']:.0f} s | {own['compile_s']:.0f} s | {programs} | "
            f"{own['step_s'] * 1000:.0f} ms | {own['peak_mib']:,.0f} MiB |"
        )
    ratio = {name: middle["single"][name] / middle["population"][name] for name in ("wall_s", "step_s", "peak_mib")}
    shown = {name: f"{value:.2f}" for name, value in ratio.items()}
    lines.append(f"| nine runs / population | {shown['wall_s']} | | | {shown['step_s']} | {shown['peak_mib']} |")
    pairs = [
        (own, other)
        for runs in zip(results["runs"]["population"], results["runs"]["single"], strict=True)
        for own, other in zip(runs[0]["losses"], runs[1]["losses"], strict=True)
    ]
    apart = [max(abs(own[at] - other[at]) for own, other in pairs) for at in (EARLY - 1, -1)]
    lines += [
        "",
        f"Member by member, the losses of both sides differ by at most {apart[0]:.0e} at step {EARLY} and by at most "
        f"{apart[1]:.0e} at the last one, where rounding has grown.",
    ]
    return "\n".join(lines)


POPULATION = Benchmark("population", measure, markdown)

if __name__ == "__main__":
    sys.exit(main())
