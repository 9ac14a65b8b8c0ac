"""`deptjax`: the console command. It knows the names of the commands, and loads the one that is asked for."""

from __future__ import annotations

import importlib
import keyword
import sys
from collections.abc import Sequence

from deptjax.cli.entry import run_command
from deptjax.errors import UserError, nearest
from deptjax.version import __version__

COMMANDS = {
    "train": "tune a prompt (DePT, prompt tuning, LoRA, or the whole model) on a task",
    "search": "tune many prompts of one method at once: learning rates, seeds, tasks; keep the best",
    "share": "tune one prompt that tasks share, for runs of mpt on other tasks to start from",
    "evaluate": "score a tuned prompt on a split of a task",
    "suite": "tune several methods on several tasks with several seeds, and report on them",
    "methods": "list the methods: paper, site, formula, and the parameters each trains on a backbone",
    "plan": "say what a training step takes of chips that need not be there: memory, FLOPs, collectives, time",
    "predict": "answer texts with a tuned prompt",
    "export": "write a tuned prompt for HF peft, DePT's authors' code, numpy, or a server that takes embeddings",
    "import": "make a prompt of an adapter of HF peft or of DePT's authors, or of bare arrays",
}


def usage() -> str:
    """Returns the text of `deptjax --help`."""
    told = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: deptjax COMMAND [FLAGS]\n\nTunes prompts for frozen T5, LLaMA, GPT-2 and BERT-family models.\n\n"
        "commands:\n"
        f"{told}\n\n  --version  say which version this is\n"
        "  --help     this text; deptjax COMMAND --help tells the flags"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names. Returns the exit status (see `deptjax.cli.entry`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module = words[0] + "_" * keyword.iskeyword(words[0])
        command = importlib.import_module(f"deptjax.cli.{module}").main
        return int(command(words[1:]))
    return run_command(_no_command, words)


def _no_command(words: list[str]) -> int:
    if words and words[0] in ("--version", "-V"):
        print(f"deptjax {__version__}")
        return 0
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if words else 2
    raise UserError(f"there is no command '{words[0]}'; there are {', '.join(COMMANDS)}.{nearest(words[0], COMMANDS)}")
