"""`deptjax predict`: texts in, JSON lines out, a few hundred at a time, so that no file is ever whole in memory."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deptjax.cli.entry import run_command
from deptjax.errors import UserError

if TYPE_CHECKING:
    from deptjax.cli.answers import Output
    from deptjax.cli.flags import Parser
    from deptjax.cli.lines import Lines
    from deptjax.cli.prompts import Prompts
    from deptjax.data.templates import Row
    from deptjax.inference.answers import Answer
    from deptjax.inference.predictor import Predictor

EXAMPLES = """
  echo 'How far is the moon ?' | deptjax predict --prompt runs/trec6/prompt
  deptjax predict --prompt runs/trec6/prompt questions.txt --output answers.jsonl
  deptjax predict --prompt runs/trec6/prompt rows.jsonl --scores | head
  deptjax predict --prompt runs/trec6/prompt --prompt films=runs/sst2/prompt mixed.jsonl

A line of the input is a text (.txt and other endings), or a JSON object with the columns of the prompt's template
(.jsonl, or a standard input that begins with {). A line of the output is an object with the answer, `prediction`, with
--scores the probability of each label, with --num-return of more than one the texts as `candidates`, and the fields of
the input's object.

With several prompts, an object names its task in the field `task`.

Until the last answer is there, those of --output FILE stand in FILE.part. The same command goes on where it was
interrupted, and ends with the same bytes; only from a file to a file, not with standard input or standard output.
"""
BATCHES_AT_ONCE = 8  # rows are sorted by length within so many batches
NO_MATTER = ("prompt", "input", "output", "overwrite", "batch_size", "format")  # flags a job is not told apart by


def main(argv: Sequence[str] | None = None) -> int:
    """Answers texts. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_predict, argv)


def _parser() -> Parser:
    from deptjax.cli import flags

    parser = flags.Parser(
        "deptjax predict", "--prompt DIR [INPUT] [FLAGS]", "Answer texts with a tuned prompt.", EXAMPLES
    )
    group = parser.add_argument_group("what")
    group.add_argument(
        "--prompt",
        metavar="[NAME=]DIR",
        action="append",
        help="a saved prompt: the folder prompt of a run; again for another task (NAME: default the task's)",
    )
    group.add_argument(
        "input", metavar="INPUT", nargs="?", default="-", help="a file, or - for standard input (default)"
    )
    group.add_argument("--task", metavar="NAME", help="the task of all rows, where there are several prompts")
    group.add_argument("--task-field", metavar="NAME", help="the field in which a row names its task (default task)")
    group.add_argument("--output", metavar="FILE", help="JSON lines; standard output where left out")
    group.add_argument(
        "--overwrite", action="store_true", help="replace an output file that exists, when the new one is whole"
    )
    group.add_argument("--format", metavar="NAME", choices=("lines", "jsonl"), help="of the input: lines or jsonl")
    group.add_argument("--encoding", metavar="NAME", help="of the input (default utf-8)")
    group.add_argument("--scores", action="store_true", help="also the probability of each label")
    group.add_argument("--batch-size", metavar="N", help="rows a batch (default 32)")
    flags.add_encoder(group)
    flags.add_decoding(parser)
    flags.add_model(parser, " (default: the one the prompt names)")
    flags.add_general(parser)
    return parser


def _predict(words: list[str]) -> int:
    from deptjax.cli.setup import one_host_only, prepare

    prepare()
    one_host_only("predict")
    from deptjax.cli import flags
    from deptjax.cli.answers import open_output
    from deptjax.cli.lines import Lines
    from deptjax.cli.prompts import Prompts
    from deptjax.cli.settings import make_decoding
    from deptjax.inference.predictor import Predictor
    from deptjax.inference.text_encoder import load_given_encoder

    parser = _parser()
    options, bindings = parser.parse(words)
    given = flags.given_by_flags(options, parser)
    if bindings:
        raise UserError(f"--gin.{bindings[0]}: predict takes no gin settings; use flags")
    batch_size = flags.whole(options, "batch-size", 32)
    flags.required(options, "prompt", "a saved prompt, such as runs/x/prompt")
    prompts = Prompts(options["prompt"], options.get("task"), options.get("task_field"))
    lines = Lines(options["input"], options.get("format"), options.get("encoding", "utf-8"), prompts.columns)
    decoding = make_decoding(given, prompts.longest_text())
    chunk = batch_size * BATCHES_AT_ONCE
    job = _job(options, prompts, lines, batch_size)
    with open_output(options.get("output"), lines.path, job, chunk, "overwrite" in options) as output:
        rows = _Rows(lines, prompts, "scores" in options, decoding is not None and decoding.num_return > 1)
        # A file is read twice: a mistake in its last line should not cost the work on those before.
        total = _compare(rows, output) if lines.twice else None
        done = output.start()
        if done and done != total:
            told = f"deptjax: resuming at row {done + 1:,} of {total:,}, behind the answers in {options['output']}.part"
            print(told, file=sys.stderr)
        encoder = load_given_encoder(options["encoder"], prompts.by_name.values()) if "encoder" in options else None
        predictor = Predictor(prompts.backbone(given), prompts.by_name, batch_size, decoding, encoder=encoder)
        _answer(rows, predictor, output, chunk, done, total)
        output.finish()
    return 0


def _job(options: dict[str, Any], prompts: Prompts, lines: Lines, batch_size: int) -> dict[str, Any]:
    """Returns what decides the bytes of the output, as JSON."""
    from deptjax.version import __version__

    return {
        "deptjax": __version__,
        "prompts": {name: prompt.run_id for name, prompt in prompts.by_name.items()},
        "input": lines.config(),
        "flags": {
            "batch_size": batch_size,
            "format": lines.format,
            **{name: value for name, value in options.items() if name not in NO_MATTER},
        },
    }


class _Rows:
    """The rows of the input, each checked as it is read, and the lines of their answers."""

    def __init__(self, lines: Lines, prompts: Prompts, with_scores: bool, with_candidates: bool) -> None:
        self._lines, self._prompts = lines, prompts
        self._parts: dict[str, Callable[[Answer], Any]] = {"prediction": lambda answer: answer.text}
        if with_scores:
            self._parts["scores"] = lambda answer: answer.scores
        if with_candidates:
            self._parts["candidates"] = lambda answer: [{"text": c.text, "score": c.score} for c in answer.candidates]
        self._with_fields = lines.format == "jsonl"
        self.name = lines.name

    def __iter__(self) -> Iterator[tuple[Row, str]]:
        """Yields each row with the name of its task."""
        for row in self._lines.rows():
            for field in self._parts if self._with_fields else ():
                if field in row.values:
                    raise UserError(f"{row.origin}: the answer has a field '{field}' too; rename that of the input")
            yield row, self._prompts.task_of(row)

    def head(self, row: Row) -> bytes:
        """Returns the bytes with which the answer of a row begins."""
        fields = {**row.values, "prediction": ""} if self._with_fields else {"prediction": ""}
        return _encoded(fields).removesuffix(b'""}')

    def line(self, row: Row, answer: Answer) -> bytes:
        """Returns the line of an answer."""
        values = {field: part(answer) for field, part in self._parts.items()}
        return self.head(row) + _encoded(values).removeprefix(b'{"prediction": ') + b"\n"


def _encoded(values: dict[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold as \udc00 and UTF-8 cannot
        return json.dumps(values).encode()


def _compare(rows: _Rows, output: Output) -> int:
    """Returns the number of rows, all of them right, after comparing them with the answers that are there."""
    from tqdm import tqdm

    total = 0
    for row, _ in tqdm(rows, unit=" rows", desc="checking", disable=None, dynamic_ncols=True, leave=False):
        output.compare(rows.head(row))
        total += 1
    if not total:
        raise UserError(f"{rows.name} is empty; it must hold at least one text")
    return total


def _answer(rows: _Rows, predictor: Predictor, output: Output, chunk: int, done: int, total: int | None) -> None:
    """Writes the answers of all rows but the first `done`, a chunk at a time."""
    from tqdm import tqdm

    left = itertools.islice(rows, done, None)
    with tqdm(total=total, initial=done, unit=" rows", desc="predicting", disable=None, dynamic_ncols=True) as bar:
        while some := list(itertools.islice(left, chunk)):
            texts, tasks = zip(*some, strict=True)
            answers = predictor(texts, tasks, first=done, on_rows=bar.update)
            output.write([rows.line(row, answer) for row, answer in zip(texts, answers, strict=True)])
            done += len(some)
    if not done:
        raise UserError(f"{rows.name} is empty; it must hold at least one text")
