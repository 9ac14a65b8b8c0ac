r"""`deptjax search`: flags and gin in, one call of `deptjax.training.population.train_population`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from deptjax.cli.entry import STOPPED, run_command

EXAMPLES = r"""
  deptjax search --model packaged:smollm2-135m-instruct --task trec6 --steps 200 --batch-size 8 --workdir runs/grid
  deptjax search --model t5-base --task rte --vary prompt_lr=3e-1,4e-1,5e-1 --vary low_rank_lr=1e-4,5e-4,1e-3 \
      --halving 3 --steps 30000 --workdir runs/rte
  deptjax search --model t5-base --method lora --task trec6 --vary task=trec6,sms_spam --vary seed=0,1,2 \
      --workdir runs/two_tasks

All combinations of what is varied are trained at once, against one frozen model and in one compiled step; a member
needs the memory of one batch more, and of what it tunes. Without --vary, each learning rate of the method is taken at a
third, once and three times what is given, or its default. The same command again goes on with a search that was
stopped. WORKDIR/prompt is the best prompt (WORKDIR/prompts/TASK with several tasks), WORKDIR/members.md the table,
WORKDIR/members/NAME each member's own run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes many members at once. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_search, argv)


def _search(words: list[str]) -> int:
    from deptjax.cli.setup import prepare

    prepare()
    from deptjax.cli.fields import FLAG, Field, Given, checked
    from deptjax.cli.request import make_parser, read_request
    from deptjax.distributed import first_host
    from deptjax.training.config import TrainConfig
    from deptjax.training.members import default_grid, grid
    from deptjax.training.population import train_population

    usage = "--model MODEL --task TASK --workdir DIR [--vary NAME=A,B,C ...] [FLAGS]"
    parser = make_parser("deptjax search", usage, "Tune many prompts of one method at once; keep the best.", EXAMPLES)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--vary",
        action="append",
        metavar="NAME=A,B",
        help="prompt_lr, low_rank_lr, backbone_lr, seed, task, or a field that says how the method starts, and its "
        "values, with commas between or as a JSON list; may be given more than once",
    )
    group.add_argument(
        "--halving", metavar="N", help="successive halving: at some steps only the best 1/N go on; 0 (default) for none"
    )
    asked = read_request(parser, words)
    halving = checked(Given(asked.options.get("halving", "0"), "--halving", FLAG), Field("halving", ("int",), 0, ""))
    varied = _varied(asked)
    from deptjax.interop.load import load_backbone

    backbone = load_backbone(**asked.model)
    rates = TrainConfig(**asked.changed).learning_rates(
        asked.method.resolve(backbone.width).learning_rates(backbone.prompt_lr)
    )
    population = train_population(
        backbone,
        asked.method,
        asked.task,
        asked.workdir,
        grid(**varied) if varied else default_grid(rates),
        halving=halving,
        progress=asked.progress,
        notes=asked.notes,
        **asked.changed,
    )
    if not population.finished:
        if first_host():
            print(
                f"deptjax: stopped after step {population.step}; run the same command again to go on", file=sys.stderr
            )
        return STOPPED + (population.signal or 0)
    if not first_host():
        return 0
    print((population.workdir / "members.md").read_text(), end="")
    for task in population.prompts:
        count = sum(member.task == task for member in population.members)
        print(f"{population.place(task)}: the best of {count} on {task}")
    return 0


def _varied(asked: Any) -> dict[str, list[Any]]:
    """Returns what is varied, each with its values, those of `task` read; what is quick to check is checked."""
    from deptjax.data.loaded import loaded_once
    from deptjax.data.tasks import get_task
    from deptjax.errors import UserError
    from deptjax.training.config import TrainConfig
    from deptjax.training.members import TASK, grid, make_members

    varied: dict[str, list[Any]] = {}
    for word in asked.options.get("vary", []):
        name, values = _values(word, asked.method)
        if name in varied:
            raise UserError(f"--vary {name} is given twice; write all of its values behind one, with commas between")
        varied[name] = values
    if TASK in varied:
        varied[TASK] = [loaded_once(get_task(name))[1] for name in varied[TASK]]
    members = make_members(asked.method, asked.task, grid(**varied), asked.changed)
    if not all(TrainConfig.from_settings(member.settings).eval_every for member in members):
        raise UserError("--eval-every is 0, and a search chooses by scores on the dev split; give it, or leave it out")
    for task in {id(member.task): member.task for member in members}.values():
        if not task.load().dev:
            raise UserError(f"task '{task.name}' has no dev rows to choose by; give it a dev file, or train it apart")
    return varied


def _values(word: str, method: Any) -> tuple[str, list[Any]]:
    """Returns the name and the values of a flag `--vary NAME=A,B`, each of the field's type."""
    from deptjax.cli.fields import FLAG, Field, Given, checked, fields_of
    from deptjax.errors import UserError, nearest
    from deptjax.training.config import TrainConfig
    from deptjax.training.members import SETTINGS, TASK

    name, equals, text = word.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not text:
        raise UserError(f"--vary {word}: no values; write --vary prompt_lr=0.1,0.3, say")
    of_config, of_method = fields_of(TrainConfig), fields_of(type(method), linen=True)
    fields = {TASK: Field(TASK, ("str",), None, ""), **of_method, **{name: of_config[name] for name in SETTINGS}}
    if name not in fields:
        raise UserError(f"--vary {name}: members can vary {', '.join(fields)}.{nearest(name, fields)}")
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--vary {name}: broken JSON at column {error.colno}: {error.msg}") from None
    else:
        values = text.split(",")
    return name, [checked(Given(str(value).strip(), f"--vary {name}", FLAG), fields[name]) for value in values]
