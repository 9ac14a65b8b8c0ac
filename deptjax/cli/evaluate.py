"""`deptjax evaluate`: the metrics of a tuned prompt on a split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from deptjax.cli.entry import run_command

EXAMPLES = r"""
  deptjax evaluate --prompt runs/trec6/prompt                          the test split of its own task
  deptjax evaluate --prompt runs/trec6/prompt --split dev --json
  deptjax evaluate --prompt runs/types/prompt --test-file more.jsonl   all rows of another file, same template
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Scores a prompt. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_evaluate, argv)


def _evaluate(words: list[str]) -> int:
    from deptjax.cli.setup import join_hosts, prepare

    prepare()
    from tqdm import tqdm

    from deptjax.cli import flags, settings
    from deptjax.cli.model import backbone_of
    from deptjax.data.loaded import loaded_once
    from deptjax.data.sources import FileSource
    from deptjax.data.tasks import Task
    from deptjax.distributed import first_host
    from deptjax.errors import UserError
    from deptjax.inference.predictor import evaluate
    from deptjax.inference.text_encoder import load_given_encoder
    from deptjax.prompt import Prompt

    parser = flags.Parser(
        "deptjax evaluate",
        "--prompt DIR [FLAGS]",
        "Score a tuned prompt on a split of its task, or of another one.",
        EXAMPLES,
    )
    group = parser.add_argument_group("what")
    group.add_argument("--prompt", metavar="DIR", help="a saved prompt: the folder prompt of a run")
    group.add_argument("--split", metavar="NAME", choices=("train", "dev", "test"), help="train, dev or test (default)")
    group.add_argument("--batch-size", metavar="N", help="rows a batch (default 32)")
    flags.add_encoder(group)
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    flags.add_model(parser, " (default: the one the prompt names)")
    flags.add_task(parser)
    flags.add_hosts(parser)
    flags.add_general(parser)
    options, bindings = parser.parse(words)
    if bindings:
        raise UserError(f"--gin.{bindings[0]}: evaluate takes no gin settings; use flags")
    given = flags.given_by_flags(options, parser)
    join_hosts(options)
    prompt = Prompt.load(flags.required(options, "prompt", "a saved prompt, such as runs/x/prompt"))
    prompt.check_is_of_a_task(options["prompt"])
    split, shown = options.get("split", "test"), options.get("split", "test")
    if ("FileSource", "test") in given and ("FileSource", "train") not in given:
        # One file to report on: all of its rows, as no other split is asked for.
        if split != "test":
            raise UserError(
                f"--split {split}: --test-file gives rows of the split test alone; name --task-file as well"
            )
        given["FileSource", "train"] = dataclasses.replace(given.pop(("FileSource", "test")), origin="--test-file")
        split = "train"
    base = Task.from_config(prompt.task)
    task = settings.make_task(given, base)
    if split != shown:
        source: Any = task.source
        task = dataclasses.replace(
            task, source=FileSource(**{**dataclasses.asdict(source), "dev_size": 0, "test_size": 0})
        )
    if task.source is None:
        raise UserError("the prompt's task keeps no data; name --test-file FILE, or --task NAME")
    data, task = loaded_once(task)
    backbone = backbone_of(prompt, options["prompt"], given)
    batch_size = flags.whole(options, "batch-size", 32)
    encoder = load_given_encoder(options["encoder"], [prompt]) if "encoder" in options else None
    total = len(getattr(data, split))
    with tqdm(
        total=total, unit=" rows", desc="evaluating", disable=None if first_host() else True, dynamic_ncols=True
    ) as bar:
        scores = evaluate(
            backbone, prompt, task, split=split, batch_size=batch_size, on_rows=bar.update, encoder=encoder
        )
    scores = {name.replace(f"{split}/", f"{shown}/", 1): value for name, value in scores.items()}
    if not first_host():
        return 0
    if "json" in options:
        print(json.dumps(scores))
    else:
        width = max(map(len, scores))
        print("\n".join(f"{name:{width}}  {value:8.4f}" for name, value in scores.items()))
    return 0
