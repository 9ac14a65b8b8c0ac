"""`deptjax predict`: texts in, JSON lines out, a few hundred at a time, so that no file is ever whole in memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deptjax.cli.entry import run_command
from deptjax.errors import UserError

if TYPE_CHECKING:
    from deptjax.data.templates import Row
    from deptjax.inference.evaluator import Answer

EXAMPLES = """
  echo 'How far is the moon ?' | deptjax predict --prompt runs/trec6/prompt
  deptjax predict --prompt runs/trec6/prompt questions.txt --output answers.jsonl
  deptjax predict --prompt runs/trec6/prompt rows.jsonl --scores | head

A line of the input is a text (.txt and other endings), or a JSON object with the columns of the prompt's template
(.jsonl, or a standard input that begins with {). A line of the output is an object with the answer, `prediction`, with
--scores the probability of each label, and the fields of the input's object.
"""
BATCHES_AT_ONCE = 8  # rows are sorted by length within so many batches
ANSWER_FIELDS = ("prediction", "scores")


def main(argv: Sequence[str] | None = None) -> int:
    """Answers texts. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_predict, argv)


def _predict(words: list[str]) -> int:
    from deptjax.cli.setup import prepare

    prepare()
    from tqdm import tqdm

    from deptjax.cli import flags
    from deptjax.cli.lines import Lines
    from deptjax.cli.model import backbone_of
    from deptjax.data.tasks import Task
    from deptjax.inference.predictor import Predictor
    from deptjax.prompt import Prompt

    parser = flags.Parser(
        "deptjax predict", "--prompt DIR [INPUT] [FLAGS]", "Answer texts with a tuned prompt.", EXAMPLES
    )
    group = parser.add_argument_group("what")
    group.add_argument("--prompt", metavar="DIR", help="a saved prompt: the folder prompt of a run")
    group.add_argument(
        "input", metavar="INPUT", nargs="?", default="-", help="a file, or - for standard input (default)"
    )
    group.add_argument("--output", metavar="FILE", help="JSON lines; standard output where left out")
    group.add_argument("--overwrite", action="store_true", help="replace an output file that exists")
    group.add_argument("--format", metavar="NAME", choices=("lines", "jsonl"), help="of the input: lines or jsonl")
    group.add_argument("--encoding", metavar="NAME", help="of the input (default utf-8)")
    group.add_argument("--scores", action="store_true", help="also the probability of each label")
    group.add_argument("--batch-size", metavar="N", help="rows a batch (default 32)")
    flags.add_model(parser, " (default: the one the prompt names)")
    flags.add_general(parser)
    options, bindings = parser.parse(words)
    if bindings:
        raise UserError(f"--gin.{bindings[0]}: predict takes no gin settings; use flags")

    batch_size = flags.whole(options, "batch-size", 32)
    prompt = Prompt.load(flags.required(options, "prompt", "a saved prompt, such as runs/x/prompt"))
    task = Task.from_config({**prompt.task, "source": None})
    columns = task.input_template.columns
    lines = Lines(options["input"], options.get("format"), options.get("encoding", "utf-8"), columns)
    _check_output(options)
    # A file is read twice: a mistake in its last line should not cost the work on those before.
    total = sum(1 for row in lines.rows() if task.source_text(row)) if lines.twice else None
    backbone = backbone_of(prompt, options["prompt"], flags.given_by_flags(options, parser))
    predictor = Predictor(backbone, prompt, batch_size=batch_size)
    rows = lines.rows()
    first = next(rows, None)
    if first is None:
        raise UserError(f"{lines.name} is empty; it must hold at least one text")
    rows = itertools.chain([first], rows)
    with (
        _output(options.get("output")) as output,
        tqdm(total=total, unit="text", desc="predicting", disable=None, dynamic_ncols=True) as bar,
    ):
        while chunk := list(itertools.islice(rows, batch_size * BATCHES_AT_ONCE)):
            for row, answer in zip(chunk, predictor(chunk), strict=True):
                output.write(_line(row, answer, lines.format == "jsonl", "scores" in options) + "\n")
            output.flush()
            bar.update(len(chunk))
    return 0


def _line(row: Row, answer: Answer, with_fields: bool, with_scores: bool) -> str:
    values = dict(row.values) if with_fields else {}
    for field in ANSWER_FIELDS if with_scores else ANSWER_FIELDS[:1]:
        if field in values:
            raise UserError(f"{row.origin}: the answer has a field '{field}' too; rename that of the input")
    values["prediction"] = answer.text
    if with_scores:
        values["scores"] = answer.scores
    return json.dumps(values, ensure_ascii=False)


def _check_output(options: dict[str, Any]) -> None:
    name = options.get("output")
    if name is None:
        return
    path = pathlib.Path(name)
    if path.is_dir():
        raise UserError(f"--output {name} is a folder; name a file in it")
    if path.is_file() and "overwrite" not in options:
        raise UserError(f"--output {name} exists; choose another file, or add --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"--output {name}: there is no folder {path.parent}; make it first")


@contextlib.contextmanager
def _output(name: str | None) -> Iterator[Any]:
    """Yields the file to write to. A file gets its name when it is whole; until then it is hidden beside it."""
    if name is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    path = pathlib.Path(name)
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to put in its place
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    from deptjax.checkpoint import disk_errors

    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_errors(path):
            with fresh.open("w", encoding="utf-8") as file:
                yield file
            os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
