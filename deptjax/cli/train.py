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
    from deptjax.cli.request import make_parser, read_request
    from deptjax.distributed import first_host
    from deptjax.training.run import train

    usage = "--model MODEL --task TASK --workdir DIR [FLAGS]"
    parser = make_parser("deptjax train", usage, "Tune a prompt (or LoRA, or everything) for a frozen model.", EXAMPLES)
    asked = read_request(parser, words)
    from deptjax.interop.load import load_backbone

    backbone = load_backbone(**asked.model)
    run = train(
        backbone, asked.method, asked.task, asked.workdir, progress=asked.progress, notes=asked.notes, **asked.changed
    )

    if not run.finished:
        if first_host():
            print(f"deptjax: stopped after step {run.step}; run the same command again to go on", file=sys.stderr)
        return STOPPED + (run.signal or 0)
    if not first_host():
        return 0
    scores = ", ".join(f"{name} {value:.4f}" for name, value in (run.prompt.metrics if run.prompt else {}).items())
    best = json.loads((run.workdir / "result.json").read_text())["best_step"]
    tuned = f"{run.trainable_parameters:,} tuned numbers"
    print(f"{run.workdir / 'prompt'}: step {best}, {scores or 'not evaluated'}; {tuned}")
    return 0
