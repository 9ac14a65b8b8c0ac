"""What every method of a suite costs: seconds a step, seconds for 1,000 predictions, memory; beside its test scores.

    deptjax suite --gin-file configs/suites/methods_smollm2.gin --workdir runs/methods     # the scores
    python benchmarks/methods.py --suite runs/methods                                      # what they cost
    python benchmarks/methods.py --suite runs/methods --resume                             # goes on; reads scores anew
    python benchmarks/methods.py --table --write-page docs/methods.md --write-pages docs/methods

Sizes and settings are those of the suite's file, and so is the work: rows of its first task. Each measurement is a
process of its own, one behind the other, all methods once before the next round. A step is the median of `--steps`
steps as `deptjax.train` reports it, and memory the least of the rounds' peaks. Predictions are those of `Predictor` for
texts that it has not seen, behind as many others that made it compile; an encoder reads each text within the time.
"""

from __future__ import annotations

import argparse
import json
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

from benchmarks.command import Benchmark, Record, load, machine, resumed, save, say, write_between  # noqa: E402
from benchmarks.worker import OtherWork  # noqa: E402
from deptjax.errors import UserError  # noqa: E402
from deptjax.suite.results import AVERAGE, read_results  # noqa: E402
from deptjax.suite.table import NONE, count_text, score_text  # noqa: E402

SUITE_FILE = "configs/suites/methods_smollm2.gin"
REFERENCE = "prompt_tuning"
COMMON = ("gin_file", "steps", "predictions")
COSTS = ("step_s", "predict_s", "peak_mib")


def main(argv: list[str] | None = None) -> int:
    """Measures, keeps the results, prints the table. Returns the exit status."""
    options = parse(argv)
    if options.method:
        try:
            print(json.dumps(run_side(options)))
        except UserError as error:
            say(f"methods: {options.method}: {error}")
            return 2
        return 0
    status = METHODS.run(options)
    if status == 0 and options.write_pages is not None:
        results = load(options.output)
        for kind in results["methods"]:
            write_between(options.write_pages / f"{kind}.md", markdown(results, [kind]), *METHODS.markers)
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = METHODS.parser(__doc__)
    parser.add_argument("--gin-file", default=SUITE_FILE, help="the suite's file (default %(default)s)")
    parser.add_argument("--suite", metavar="DIR", help="the suite's folder, for its scores")
    parser.add_argument("--steps", type=int, default=24, help="of each run, at least 2 (default %(default)s)")
    parser.add_argument("--predictions", type=int, default=200, help="timed texts (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each method is run (default %(default)s)")
    parser.add_argument("--only", metavar="A,B", help="these methods (default: the suite's)")
    parser.add_argument("--resume", action="store_true", help="keep what --output holds and measure what it lacks")
    parser.add_argument("--write-pages", type=pathlib.Path, metavar="DIR", help="also a method's line into DIR/NAME.md")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def suite_of(options: argparse.Namespace, methods: str | None) -> Any:
    """Returns the settings of the suite, as `deptjax suite` reads them, with `methods` in place of the file's own."""
    from deptjax.cli.fields import FLAG, Given
    from deptjax.cli.scopes import SUITE, SuiteSettings

    named = {} if methods is None else {(SUITE, "methods"): Given(methods, "--only", FLAG)}
    return SuiteSettings([str(options.gin_file)], [], named)


def measure(options: argparse.Namespace) -> Record:
    """Runs every method in each round; writes the results after each and returns them."""
    if options.steps < 2 or options.predictions < 1 or options.rounds < 1:
        raise UserError("--steps must be at least 2, --predictions and --rounds at least 1")
    from deptjax.methods.base import method_to_config

    recipes: dict[str, Any] = {}  # those of the first task
    for recipe in suite_of(options, options.only).plan("unused").recipes:
        recipes.setdefault(recipe.method.kind, recipe.method)
    settings = chosen_settings(options)
    fresh: Record = {"settings": settings, "machine": machine(), "methods": {}, "scores": []}
    results = resumed(options.output, settings) if options.resume else fresh
    for number in range(options.rounds):
        for kind, method in recipes.items():
            config = method_to_config(method)
            own = results["methods"].setdefault(kind, {"method": config, "runs": []})
            if own["method"] != json.loads(json.dumps(config)):
                raise UserError(f"{options.output} has '{kind}' of other sizes; drop --resume")
            if len(own["runs"]) <= number:
                say(f"round {number + 1} of {options.rounds}: {kind}")
                own["runs"].append(_in_a_process(options, kind))
                save(options.output, results)  # what is measured is kept, run by run
    if options.suite is not None:
        results["scores"] = read_results(options.suite)["summary"]
        results["one_label"] = _one_label(options)
    save(options.output, results)
    return results


def _one_label(options: argparse.Namespace) -> dict[str, float]:
    """Returns, for each task of the suite, the best score of an answer that is the same for all rows."""
    found: dict[str, float] = {}
    for recipe in suite_of(options, REFERENCE).plan("unused").recipes:
        data = recipe.task.load()
        rows = data.test[: recipe.test_examples]
        scored = [data.task.score([label] * len(rows), rows) for label in data.task.labels or ()]
        found[recipe.task.name] = max((next(iter(scores.values())) for scores in scored), default=0.0)
    return found


def chosen_settings(options: argparse.Namespace) -> Record:
    """Returns what all measurements of one table share."""
    return {name: getattr(options, name) for name in COMMON}


def _in_a_process(options: argparse.Namespace, kind: str) -> Record:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen_settings(options).items()]
    command = [sys.executable, str(pathlib.Path(__file__)), f"--method={kind}", *flags]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise UserError(f"the method '{kind}' ended with status {ended.returncode}; what it said is above")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def run_side(options: argparse.Namespace) -> Record:
    """Tunes one method in this process and answers texts with it; returns what it took."""
    import jax

    from deptjax.data.loaded import loaded_once
    from deptjax.inference.predictor import Predictor
    from deptjax.interop.load import load_backbone
    from deptjax.training.run import train

    asked = suite_of(options, options.method)
    recipe = asked.plan("unused").recipes[0]
    backbone = load_backbone(**asked.model())
    data, task = loaded_once(recipe.task)
    texts = data.test[: 2 * options.predictions]
    if len(texts) < 2 * options.predictions:
        raise UserError(f"--predictions {options.predictions}: '{task.name}' has {len(data.test)} test rows, not twice")
    settings = {**recipe.settings, "steps": options.steps, "eval_every": 0, "log_every": 1}
    with tempfile.TemporaryDirectory() as folder, OtherWork() as others:
        run = train(backbone, recipe.method, task, pathlib.Path(folder) / "run", progress=False, **settings)
        assert run.prompt is not None
        predictor = Predictor(backbone, run.prompt, batch_size=recipe.config(0).eval_batch_size)
        predictor(texts[: options.predictions])
        began = time.perf_counter()
        predictor(texts[options.predictions :])
        seconds = time.perf_counter() - began
    return {
        "step_s": run.seconds_per_step,
        "predict_s": seconds / options.predictions * 1000,
        "peak_mib": run.peak_mib,
        "parameters": run.trainable_parameters,
        "others": others.share,
        "task": task.name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def markdown(results: Record, kinds: list[str] | None = None) -> str:
    """Returns two tables of these methods, by default all: the suite's scores, and what each costs."""
    told = [] if kinds is not None else [_told(results), ""]
    chosen = list(results["methods"]) if kinds is None else kinds
    return "\n".join([*told, *_score_table(results, chosen, whole=kinds is None), "", *_cost_table(results, chosen)])


def _score_table(results: Record, kinds: list[str], whole: bool) -> list[str]:
    scores = {(entry["task"], entry["method"]): entry for entry in results["scores"]}
    tasks = [task for task in dict.fromkeys(task for task, _ in scores) if task != AVERAGE]
    columns = [*tasks, AVERAGE] if len(tasks) > 1 else tasks
    rows = [["method", *columns]]
    for kind in kinds:
        tested = [scores.get((column, kind)) for column in columns]
        rows.append([kind, *(NONE if entry is None else score_text(entry) for entry in tested)])
    if whole and (one := results.get("one_label")):
        mean = {AVERAGE: statistics.fmean(one[task] for task in tasks)}
        rows.append(["*always the same label*", *(f"{100 * {**one, **mean}[column]:.1f}" for column in columns)])
    return _lines(rows)


def _cost_table(results: Record, kinds: list[str]) -> list[str]:
    reference = results["methods"].get(REFERENCE)
    rows = [["method", "sizes", "trained", "ms a step", "of prompt tuning's", "s for 1,000 predictions", "peak MiB"]]
    for kind in kinds:
        runs = results["methods"][kind]["runs"]
        own = _costs(runs)
        ratio = NONE if reference is None else f"{own['step_s'] / _costs(reference['runs'])['step_s']:.2f}"
        times = [f"{own['step_s'] * 1000:.0f}", ratio, f"{own['predict_s']:.1f}", f"{own['peak_mib']:,.0f}"]
        rows.append([kind, _sizes(results["methods"][kind]["method"]), count_text(runs[0]["parameters"]), *times])
    return _lines(rows)


def _sizes(method: Record) -> str:
    """Returns the fields of a method that are numbers of something, and the encoder that it has."""
    told = [f"{name} {value}" for name, value in method.items() if type(value) is int]
    encoder = str(method.get("encoder", "")).removeprefix("packaged:")
    return ", ".join([*told, encoder] if encoder else told)


def _lines(rows: list[list[str]]) -> list[str]:
    """Returns rows of cells, the first of them the header, as a Markdown table."""
    header, *others = (f"| {' | '.join(cells)} |" for cells in rows)
    return [header, "|---" * len(rows[0]) + "|", *others]


def _costs(runs: list[Record]) -> dict[str, float]:
    found = {name: statistics.median(run[name] for run in runs) for name in COSTS}
    # Compiling takes memory too, and a round may find its programs compiled: the least is that of the run itself.
    return {**found, "peak_mib": min(run["peak_mib"] for run in runs)}


def _told(results: Record) -> str:
    """Returns what must be known to read the table."""
    runs = [run for own in results["methods"].values() for run in own["runs"]]
    first, made = runs[0], results["settings"]
    rounds = sorted({len(own["runs"]) for own in results["methods"].values()})
    return (
        f"`{made['gin_file']}`; test scores times 100, mean ± sample standard deviation over the seeds where there are"
        f" several. Costs on {first['task']}: medians of {' to '.join(map(str, dict.fromkeys(rounds)))} round(s) of"
        f" {made['steps']} steps and {made['predictions']} predictions, each in a process of its own;"
        f" {first['device']}, {results['machine']['cpu']}, {results['machine']['cores']} cores, jax {first['jax']},"
        f" {results['machine']['date']}, other work at most {max(run['others'] for run in runs):.0%} of the machine."
    )


METHODS = Benchmark("methods", measure, markdown)

if __name__ == "__main__":
    sys.exit(main())
