r"""`deptjax suite`: several methods on several tasks with several seeds, a table, and a report."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from deptjax.cli.entry import STOPPED, run_command

EXAMPLES = r"""
  deptjax suite --suite packaged --methods dept,prompt_tuning,lora,full --seeds 0,1,2 \
      --model packaged:smollm2-135m-instruct --steps 320 --workdir runs/packaged
  deptjax suite --tasks trec6,sms_spam --methods dept,lora --model t5-small --steps 1000 --prompt-length 20 \
      --gin.lora/TrainConfig.low_rank_lr=0.001 --gin.trec6/TrainConfig.max_length=56 --workdir runs/two
  deptjax suite --gin-file suite.gin --workdir runs/own
  deptjax suite --report-only --workdir runs/own

The same command again runs what is missing, and goes on with a run that was stopped. In gin, a setting may name the
task, the method, or both that it is for (trec6/lora/TrainConfig.steps = 100), and a file of yours becomes a task:
films/FileSource.train = "films.jsonl", films/Task.input = "{text}\nlabel :", suite.tasks = ("films", "trec6").
"""
# The command of `--isolate`, which must be this interpreter's whatever the PATH says.
_PROGRAM = "import sys; from deptjax.cli.main import main; sys.exit(main(sys.argv[1:]))"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a suite. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_suite, argv)


def _suite(words: list[str]) -> int:
    from deptjax.cli.setup import one_host_only, prepare

    prepare()
    one_host_only("suite")
    from deptjax.cli import flags, settings
    from deptjax.cli.entry import Terminated
    from deptjax.cli.scopes import SuiteSettings
    from deptjax.errors import UserError
    from deptjax.suite.isolated import Isolated
    from deptjax.suite.plan import Cell
    from deptjax.suite.report import write_results
    from deptjax.suite.run import run_suite

    parser = _parser()
    options, bindings = parser.parse(words)
    asked = SuiteSettings(options.get("gin_file", []), bindings, flags.given_by_flags(options, parser))
    workdir = asked.text("workdir")
    if not workdir:
        raise UserError("no workdir; name the suite's folder with --workdir DIR")
    if "report_only" in options:
        return _end(workdir, write_results(workdir))
    model, plan = asked.model(), asked.plan(workdir)
    settings.check_workdir(workdir)
    if "population" in options and "isolate" in options:
        raise UserError("--population trains several runs in one process, and --isolate gives each its own; keep one")
    in_process = _in_process(plan, model, quiet="quiet" in options, together="population" in options)
    if "cell" in options:
        cell = Cell.parse(options["cell"])
        plan.recipe(cell)
        return STOPPED + stopped if (stopped := in_process([cell])) else 0

    program = [sys.executable, "-c", _PROGRAM, "suite", *words, "--cell"]
    train_cells = Isolated(plan, program) if "isolate" in options else in_process
    try:
        stopped = run_suite(
            plan,
            train_cells,
            model=model,
            command=shlex.join(["deptjax", "suite", *words]),
            tell=lambda line: None if "quiet" in options else print(f"deptjax: {line}", file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        stopped = signal.SIGINT
    except Terminated:
        stopped = signal.SIGTERM
    if stopped is not None:
        print("deptjax: stopped; run the same command again to go on", file=sys.stderr)
        return STOPPED + stopped
    return _end(workdir, write_results(workdir))


def _parser() -> Any:
    from deptjax.cli import flags
    from deptjax.cli.scopes import DEFAULT_SEEDS
    from deptjax.data.suites import suite_names
    from deptjax.data.tasks import task_names
    from deptjax.methods import method_names

    parser = flags.Parser(
        "deptjax suite",
        "(--suite NAME | --tasks A,B) --methods A,B --model MODEL --workdir DIR [FLAGS]",
        "Train several methods on several tasks with several seeds, and make a table and a report of it.",
        EXAMPLES,
    )
    group = parser.add_argument_group("suite")
    seeds = ",".join(map(str, DEFAULT_SEEDS))
    for name, dest, metavar, told in (
        ("suite", "name", "NAME", f"tasks that belong together: {', '.join(suite_names())}"),
        ("tasks", "tasks", "A,B", f"{', '.join(task_names())}, and those that a gin file makes of your own files"),
        ("methods", "methods", "A,B", ", ".join(method_names())),
        ("seeds", "seeds", "N,N", f"each method is trained on each task once with each (default {seeds})"),
        ("test-examples", "test_examples", "N", "test rows to score, the first of them (default all)"),
        ("workdir", "workdir", "DIR", "the suite's own folder"),
    ):
        group.add_argument(f"--{name}", dest=f"suite.{dest}", metavar=metavar, help=told)
    group.add_argument("--gin-file", action="append", metavar="FILE", help="settings; may be given more than once")
    group.add_argument(
        "--gin.NAME=VALUE", dest="gin", action="store_true", help="one setting: --gin.lora/TrainConfig.steps=100"
    )
    group.add_argument(
        "--population", action="store_true", help="train all seeds of a method on a task at once, as a population"
    )
    group.add_argument("--isolate", action="store_true", help="each run in a process of its own")
    group.add_argument("--report-only", action="store_true", help="make table and report of what is there; run nothing")
    group.add_argument("--quiet", action="store_true", help="no progress bar and no lines of progress")
    group.add_argument("--cell", help=argparse.SUPPRESS)
    flags.add_model(parser)
    flags.add_method(parser, choice=False)
    flags.add_training(parser)
    flags.add_general(parser)
    return parser


def _in_process(plan: Any, model: dict[str, Any], quiet: bool, together: bool) -> Any:
    from deptjax.cli import settings
    from deptjax.interop.load import load_backbone
    from deptjax.suite.run import InProcess
    from deptjax.suite.together import Together

    return (Together if together else InProcess)(
        plan,
        lambda: load_backbone(**model),
        progress=False if quiet else None,
        notes=lambda method, task, config: {"config.gin": settings.as_gin(model, method, task, config)},
    )


def _end(workdir: str, results: dict[str, Any]) -> int:
    """Prints the table and where the report is. Raises `UserError` where runs have failed."""
    from deptjax.errors import UserError
    from deptjax.suite.folder import SuiteFolder
    from deptjax.suite.table import methods_markdown

    print(methods_markdown(results))
    print(f"\n{SuiteFolder(workdir).report}")
    failed = [run for run in results["runs"] if run["status"] == "failed"]
    if failed:
        first = failed[0]
        name = f"{first['task']}/{first['method']}/seed-{first['seed']}"
        raise UserError(
            f"{len(failed)} of {len(results['runs'])} runs failed, the first is {name}: {first['error']}; the same"
            f" command tries them again, and with other settings once {workdir}/runs/{name} is removed"
        )
    return 0
