r"""`deptjax train`: flags and gin in, one call of `deptjax.training.run.train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from deptjax.cli.entry import STOPPED, run_command

EXAMPLES = r"""
  deptjax train --model t5-small --task-file train.jsonl --input "{question}\nType:" --labels how,what,who \
      --method dept --prompt-length 20 --steps 1000 --workdir runs/types
  deptjax train --model packaged:smollm2-135m-instruct --task trec6 --method lora --rank 8 --workdir runs/lora
  deptjax train --gin-file configs/runs/smollm2_dept_trec6.gin --gin.prompt_lr=0.01 --workdir runs/trec6

The same command again goes on with a run that was stopped. A flag overrides --gin.NAME=VALUE, which overrides a gin
file, which overrides the default; a run keeps all of its settings in WORKDIR/config.gin.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes a method on a task. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_train, argv)


def _train(words: list[str]) -> int:
    from deptjax.cli.setup import prepare

    prepare()
    from deptjax.cli import flags, settings
    from deptjax.errors import UserError
    from deptjax.training.run import train

    parser = flags.Parser(
        "deptjax train",
        "--model MODEL --task TASK --workdir DIR [FLAGS]",
        "Tune a prompt (or LoRA, or everything) for a frozen model.",
        EXAMPLES,
    )
    group = parser.add_argument_group("run")
    group.add_argument("--workdir", dest="train.workdir", metavar="DIR", help="the run's own folder")
    group.add_argument("--gin-file", action="append", metavar="FILE", help="settings; may be given more than once")
    group.add_argument(
        "--gin.NAME=VALUE", dest="gin", action="store_true", help="one setting: --gin.DePT.rank=8, or a macro's value"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar and no lines of progress")
    for add in (flags.add_model, flags.add_task, flags.add_method, flags.add_training, flags.add_general):
        add(parser)
    options, bindings = parser.parse(words)
    given = settings.merged(options.get("gin_file", []), bindings, flags.given_by_flags(options, parser))

    workdir = settings.text_of(given, "train", "workdir")
    if not workdir:
        raise UserError("no workdir; name the run's folder with --workdir DIR")
    model = settings.model_settings(given)
    if "name_or_path" not in model:
        raise UserError("no model; name one with --model, a hub name, a local folder or a GGUF file")
    # What is quick to check comes before what is slow to load.
    method = settings.make_method(given)
    config = settings.make_config(given, method)
    settings.check_workdir(workdir)
    data, task = settings.loaded_once(settings.make_task(given))
    notes = {"config.gin": settings.as_gin(model, method, data.task, config)}
    from deptjax.interop.load import load_backbone

    backbone = load_backbone(**model)
    changed = settings.changed_from_default(config)
    run = train(backbone, method, task, workdir, progress=False if "quiet" in options else None, notes=notes, **changed)

    if not run.finished:
        print(f"deptjax: stopped after step {run.step}; run the same command again to go on", file=sys.stderr)
        return STOPPED + (run.signal or 0)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in (run.prompt.metrics if run.prompt else {}).items())
    best = json.loads((run.workdir / "result.json").read_text())["best_step"]
    tuned = f"{run.trainable_parameters:,} tuned numbers"
    print(f"{run.workdir / 'prompt'}: step {best}, {scores or 'not evaluated'}; {tuned}")
    return 0
