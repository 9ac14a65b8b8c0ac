r"""`deptjax share`: flags and gin in, one call of `deptjax.training.shared.train_shared`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from deptjax.cli.entry import STOPPED, run_command

EXAMPLES = r"""
  deptjax train --model t5-base --method prompt_tuning --task trec6 --workdir runs/trec6
  deptjax train --model t5-base --method prompt_tuning --task sms_spam --workdir runs/spam
  deptjax share --teachers runs/trec6/prompt,runs/spam/prompt --workdir runs/shared
  deptjax train --model t5-base --method mpt --start-from runs/shared/prompt --task movie_sentiment --few-shot 16 \
      --workdir runs/films

The tasks are those that the teachers were tuned on. WORKDIR/prompt is where a run of mpt on another task starts,
WORKDIR/prompts/TASK each task's own. The same command again goes on with a run that was stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes one prompt for several tasks. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_share, argv)


def _share(words: list[str]) -> int:
    from deptjax.cli.setup import prepare

    prepare()
    from deptjax.cli import settings
    from deptjax.cli.fields import FLAG, Field, Given, checked
    from deptjax.cli.model import backbone_of
    from deptjax.cli.setup import join_hosts
    from deptjax.distributed import first_host
    from deptjax.errors import UserError
    from deptjax.training.shared import train_shared

    parser = make_parser()
    options, bindings = parser.parse(words)
    given = settings.merged(options.get("gin_file", []), bindings, _as_mpt(parser, options))
    workdir = settings.text_of(given, "train", "workdir")
    if not workdir:
        raise UserError("no workdir; name the run's folder with --workdir DIR")
    place, teachers, tasks = _taught(options)
    first = next(iter(teachers.values()))
    method = settings.make_method(given)
    if not any(name == "prompt_length" for _, name in given):
        method = method.clone(prompt_length=len(first.soft_prompt(f"--teachers {place}")))
    config = settings.make_config(given, method)
    distill = checked(Given(options.get("distill", "0.9"), "--distill", FLAG), Field("distill", ("float",), 0.9, ""))
    settings.check_workdir(workdir)
    join_hosts(options)
    run = train_shared(
        backbone_of(first, place, given),
        tasks,
        teachers,
        workdir,
        method=method,
        distill=distill,
        progress=False if "quiet" in options else None,
        **settings.changed_from_default(config),
    )
    if not run.finished:
        if first_host():
            print(f"deptjax: stopped after step {run.step}; run the same command again to go on", file=sys.stderr)
        return STOPPED + (run.signal or 0)
    if first_host():
        scores = ", ".join(f"{name} {value:.4f}" for name, value in (run.prompt.metrics if run.prompt else {}).items())
        print(f"{run.workdir / 'prompt'}: {scores or 'not evaluated'}; a run of mpt starts from it with --start-from")
    return 0


def make_parser() -> Any:
    """Returns the parser of its flags."""
    from deptjax.cli import flags

    usage = "--teachers DIR,DIR --workdir DIR [FLAGS]"
    told = "Tune one prompt that tasks share, taught by a prompt of each, for runs of mpt to start from."
    parser = flags.Parser("deptjax share", usage, told, EXAMPLES)
    group = parser.add_argument_group("run")
    group.add_argument("--teachers", metavar="DIR,DIR", help="saved soft prompts, one of each task, all of one length")
    group.add_argument("--distill", metavar="X", help="weight of what the teachers say (default 0.9)")
    group.add_argument("--workdir", dest="train.workdir", metavar="DIR", help="the run's own folder")
    group.add_argument("--gin-file", action="append", metavar="FILE", help="settings; may be given more than once")
    group.add_argument(
        "--gin.NAME=VALUE", dest="gin", action="store_true", help="one setting: --gin.MPT.prompt_length=8"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar and no lines of progress")
    flags.add_model(parser, " (default: the one the first teacher names)")
    flags.add_method(parser, choice=False)
    flags.add_training(parser)
    flags.add_hosts(parser)
    flags.add_general(parser)
    return parser


def _as_mpt(parser: Any, options: dict[str, Any]) -> Any:
    """Returns the settings of the flags, and that the method is MPT."""
    from deptjax.cli import flags
    from deptjax.cli.fields import FLAG, Given

    return {**flags.given_by_flags(options, parser), ("train", "method"): Given("mpt", "deptjax share", FLAG)}


def _taught(options: dict[str, Any]) -> tuple[str, dict[str, Any], list[Any]]:
    """Returns where the first teacher is, the teachers by their tasks' names, and the tasks with their rows read."""
    from deptjax.cli import flags
    from deptjax.data.loaded import loaded_once
    from deptjax.data.tasks import Task
    from deptjax.errors import UserError
    from deptjax.prompt import Prompt

    named = flags.required(options, "teachers", "the saved prompts of the tasks, such as runs/a/prompt,runs/b/prompt")
    teachers: dict[str, Any] = {}
    tasks = []
    places = [part.strip() for part in named.split(",") if part.strip()]
    for place in places:
        prompt = Prompt.load(place)
        prompt.check_is_of_a_task(f"--teachers {place}")
        task = Task.from_config(prompt.task)
        if task.source is None:
            raise UserError(
                f"--teachers {place}: its task '{task.name}' keeps no data; tune it by a run of deptjax train"
            )
        if task.name in teachers:
            raise UserError(f"--teachers {place}: another teacher is of task '{task.name}'; give one for each task")
        teachers[task.name] = prompt
        tasks.append(loaded_once(task)[1])
    if len(teachers) < 2:
        raise UserError("--teachers names fewer than two prompts; give one of each task: runs/a/prompt,runs/b/prompt")
    return places[0], teachers, tasks
