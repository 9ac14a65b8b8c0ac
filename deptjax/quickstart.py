"""The first thing to run: DePT on a frozen SmolLM2-135M, learning to classify questions, on a CPU in minutes.

    make quickstart                          # or: python -m deptjax.quickstart --steps 240
    make quickstart STEPS=320 COMPARE=1      # longer, with prompt tuning and LoRA beside it

Model and data come out of two packages (see `deptjax.interop.packaged`): SmolLM2-135M-Instruct and TREC question
classification (Li and Roth 2002). The table is also written to `<workdir>/results.json`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from deptjax.checkpoint import disk_errors
from deptjax.cli.entry import STOPPED, run_command
from deptjax.cli.setup import prepare
from deptjax.data.buckets import choose_buckets
from deptjax.data.preprocess import Preprocessor
from deptjax.data.tasks import TaskData, get_task
from deptjax.errors import UserError
from deptjax.inference.evaluator import Evaluator
from deptjax.inference.predictor import Predictor
from deptjax.interop.load import load_backbone
from deptjax.memory import PeakMemory
from deptjax.methods import DePT, LoRA, Method, PromptTuning, ZeroShot
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.training.folder import write_json
from deptjax.training.run import Run, train
from deptjax.typing import Tree

MODEL = "packaged:smollm2-135m-instruct"
TASK = "trec6"
MAX_LENGTH = 56  # tokens; the longest question
BATCH_SIZE = 16
BUCKETS = 4  # padded lengths, each a program to compile
TEXT = "Classify the question: description, entity, abbreviation, person, number or location."
QUESTIONS = (
    "Who wrote the music of the Magic Flute ?",
    "How many bones does a giraffe have in its neck ?",
    "What does the word serendipity mean ?",
)
METHODS: dict[str, Method] = {
    "dept": DePT(prompt_length=20, rank=30, max_length=MAX_LENGTH, prompt_text=TEXT),
    # As many parameters as DePT has: 53 vectors of 576 are 30,528, against 30,480.
    "prompt_tuning": PromptTuning(prompt_length=53, prompt_text=TEXT),
    "lora": LoRA(rank=8),
}
TITLES = {
    "majority": "majority class",
    "zero_shot": "zero-shot, frozen",
    "dept": "DePT (20 vectors, rank 30)",
    "prompt_tuning": "prompt tuning (53 vectors)",
    "lora": "LoRA (rank 8, query and value)",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: accuracy in [0, 1], tuned numbers, median seconds a step, peak MiB of the process."""

    accuracy: float
    trainable: int
    seconds_per_step: float | None
    peak_mib: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the quickstart. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_main, argv)


def _main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("deptjax.quickstart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help="training steps (default 240)")
    parser.add_argument("--compare", action="store_true", help="also tune prompt tuning and LoRA, as many steps each")
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/quickstart"), help="where all is kept"
    )
    parser.add_argument("--eval-examples", type=int, default=None, help="held-out questions to use (default all 1,000)")
    options = parser.parse_args(words)
    for name in ("steps", "eval_examples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    prepare()
    return quickstart(options.steps, options.compare, options.workdir, options.eval_examples)


def quickstart(steps: int, compare: bool, workdir: pathlib.Path, eval_examples: int | None = None) -> int:
    """Tunes, evaluates, prints the table and writes `results.json`. Returns the exit status."""
    began = time.perf_counter()
    print("Loading SmolLM2-135M-Instruct and the TREC questions (fetched once, then cached) ...", flush=True)
    backbone = load_backbone(MODEL, scan_layers=True)
    data = get_task(TASK).load()
    data = dataclasses.replace(data, test=data.test[:eval_examples])
    print(
        f"{len(data.train):,} questions to learn from, {len(data.dev):,} to choose by, {len(data.test):,} held out; "
        f"{len(data.task.labels or ())} classes. Ready after {time.perf_counter() - began:.0f} s.\n",
        flush=True,
    )
    rows = {"majority": Row(majority_accuracy(data), 0, None, None)}
    with PeakMemory() as peak:
        accuracy = held_out_accuracy(backbone, ZeroShot(), {}, backbone.params, data)
    rows["zero_shot"] = Row(accuracy, 0, None, peak.mib)

    runs: dict[str, Run] = {}
    for name in METHODS if compare else ("dept",):
        print(f"\nTuning {TITLES[name]}: {steps} steps of {BATCH_SIZE} questions.", flush=True)
        runs[name] = run = tune(backbone, METHODS[name], workdir / f"{name}-{steps}-steps", steps)
        if not run.finished or run.prompt is None:
            print(f"Stopped after step {run.step}. The same command goes on from here.")
            return STOPPED + (run.signal or 0)
        accuracy = held_out_accuracy(backbone, run.prompt.method, run.prompt.trainable, backbone.params, data)
        rows[name] = Row(accuracy, run.trainable_parameters, run.seconds_per_step, run.peak_mib)

    with disk_errors(workdir):
        write_json(workdir / "results.json", {name: dataclasses.asdict(row) for name, row in rows.items()})
    print("\n" + table(rows, len(data.test)))
    show_use(backbone, runs["dept"])
    print(f"\nAll in {(time.perf_counter() - began) / 60:.1f} minutes.")
    return 0


def tune(backbone: Backbone, method: Method, workdir: pathlib.Path, steps: int) -> Run:
    """Tunes a method with the defaults of the backbone; the dev questions choose the prompt."""
    return train(
        backbone,
        method,
        TASK,
        workdir,
        steps=steps,
        batch_size=BATCH_SIZE,
        buckets=BUCKETS,
        max_length=MAX_LENGTH,
        eval_every=max(steps // 2, 1),
        eval_batch_size=BATCH_SIZE,
        checkpoint_every=50,
    )


def majority_accuracy(data: TaskData) -> float:
    """Returns the held-out accuracy of always giving the training set's most frequent label."""
    label, _ = collections.Counter(data.task.label_of(row) for row in data.train).most_common(1)[0]
    return sum(data.task.label_of(row) == label for row in data.test) / len(data.test)


def held_out_accuracy(backbone: Backbone, method: Method, trainable: Tree, frozen: Tree, data: TaskData) -> float:
    """Returns the accuracy on the held-out questions."""
    model = PromptedModel.build(backbone, method)
    preprocessor = Preprocessor(backbone.tokenizer, data.task, form="causal", max_length=MAX_LENGTH)
    examples = preprocessor.encode_all(data.test)
    buckets = choose_buckets([len(example.source) for example in examples], BUCKETS)
    evaluator = Evaluator(model, preprocessor, batch_size=BATCH_SIZE, buckets=buckets)
    with tqdm(total=len(examples), desc=TITLES.get(method.kind, method.kind), unit="question", disable=None) as bar:
        answers = evaluator.answers(trainable, frozen, examples, on_rows=bar.update)
    return data.task.score([answer.text for answer in answers], data.test)["accuracy"]


def table(rows: dict[str, Row], held_out: int) -> str:
    """Returns the rows as text for a terminal."""
    lines = [("", "accuracy", "trainable", "s/step", "peak MiB")]
    for name, row in rows.items():
        seconds = "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.2f}"
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
        lines.append((TITLES[name], f"{100 * row.accuracy:.1f} %", f"{row.trainable:,}", seconds, peak))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]

    def render(line: tuple[str, ...]) -> str:
        return "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )

    rule = "-" * len(render(lines[0]))
    return "\n".join([f"Accuracy on {held_out:,} held-out questions", rule, *map(render, lines), rule])


def show_use(backbone: Backbone, run: Run) -> None:
    """Classifies three questions, and says where the prompt is and how to use it."""
    assert run.prompt is not None
    folder = run.workdir / "prompt"
    answers: list[Any] = Predictor(backbone, run.prompt)(QUESTIONS)
    print()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"  {question:52s} -> {answer.text} ({100 * answer.scores[answer.text]:.0f} %)")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"\nThe prompt is in {folder} ({size / 1024:.0f} KiB). On your own text:")
    program = os.path.relpath(pathlib.Path(sys.executable).parent / "deptjax")
    command = shlex.join([program, "predict", "--prompt", str(folder)])
    print(f'  echo "Where is the Nile ?" | {command}')


if __name__ == "__main__":
    sys.exit(main())
