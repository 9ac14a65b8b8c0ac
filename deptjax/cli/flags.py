"""The flags: made from the dataclasses that hold the settings, so that a new field is a new flag with its help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from deptjax.cli.fields import FLAG, Field, Given, checked, fields_of
from deptjax.data.sources import FileSource
from deptjax.data.tasks import Task, task_names
from deptjax.errors import UserError, nearest
from deptjax.inference.decoding import Decoding
from deptjax.methods import method_class, method_names
from deptjax.training.config import TrainConfig
from deptjax.version import __version__

METHOD = "method"  # the owner of a flag for a field of whichever method is chosen

MODEL_FIELDS = {
    field.name: field
    for field in (
        Field(
            "name_or_path",
            ("str",),
            None,
            "the backbone: a hub name, a folder, a GGUF file, a T5X checkpoint, packaged:NAME",
        ),
        Field("dtype", ("str",), None, "of weights and computation: float32 (default) or bfloat16"),
        Field(
            "quantize",
            ("str", "None"),
            None,
            "the frozen weights in int8, int4 or nf4 (default not at all); the method's stay float32",
        ),
        Field(
            "scan_layers",
            ("bool", "None"),
            None,
            "stack the layers: compiles faster, and runs slower on a CPU (default: from a billion parameters on)",
        ),
        Field("attention", ("str",), None, "auto (default), xla, cudnn (NVIDIA GPUs) or flash (TPUs)"),
        Field("revision", ("str", "None"), None, "branch, tag or commit of a hub model"),
        Field("dropout_rate", ("float", "None"), None, "in training, instead of the one in the model's config (T5)"),
        Field("tokenizer", ("str", "None"), None, "instead of the model's: a folder, file, hub name or packaged:t5"),
        Field(
            "mesh",
            ("str",),
            None,
            "devices that model and batches are split over: data:2,fsdp:4,model:2, or data, fsdp, tensor, fsdp+tensor,"
            " or auto (default): weights whole on each device if they fit",
        ),
        Field("sharding_rules", ("str",), None, "logical axes split otherwise, such as vocab:none,embed:fsdp+model"),
    )
}
_TASK_FLAGS = {
    ("Task", "input"): ("input", r'template of the text, such as "{question}\nType:" (\n is a line end)'),
    ("Task", "target"): ("target", 'template of the answer (default "{label}")'),
    ("Task", "labels"): ("labels", "a,b,c (or a JSON list): the only answers; inferred where left out"),
    ("Task", "verbalizers"): ("verbalizers", "label=text,label=text: what the model says for a label"),
    ("Task", "metrics"): ("metrics", "accuracy,macro_f1: the first selects the best prompt"),
    ("Task", "positive_label"): ("positive-label", "the label that the metric f1 is about"),
    ("Task", "max_target_length"): ("max-target-length", "longest free-text answer in tokens"),
    ("Task", "references"): (
        "references",
        "the column with all accepted answers of a row, for exact_match and token_f1",
    ),
    ("Task", "group"): ("group", 'template that rows of one question share, such as "{question_id}", for multirc_em'),
    ("Task", "few_shot"): ("few-shot", "train on this many rows, as many of each label as can be (default all)"),
    ("Task", "few_shot_seed"): ("few-shot-seed", "draws them (default 42)"),
    ("Task", "paper_compat"): ("paper-compat", "repeat the slips of the paper's code (docs/tasks.md)"),
    ("Task", "name"): ("task-name", "name of the task in messages and saved prompts (default: the file's)"),
    ("FileSource", "dev"): ("dev-file", "rows to choose the best prompt by; drawn from the task file where left out"),
    ("FileSource", "test"): ("test-file", "rows to report on; drawn from the task file where left out"),
    ("FileSource", "dev_size"): ("dev-size", "rows to draw, a count or a share (default 0.1)"),
    ("FileSource", "test_size"): ("test-size", "rows to draw, a count or a share (default 0.1)"),
    ("FileSource", "seed"): ("split-seed", "draws the split (default 0)"),
    ("FileSource", "format"): ("file-format", "jsonl, csv, tsv or parquet, where the ending does not tell"),
    ("FileSource", "encoding"): ("encoding", "of the files (default utf-8)"),
    ("FileSource", "quotes"): ("quotes", 'whether " quotes fields in csv and tsv'),
}


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are `UserError`s; it takes `--a_flag` for `--a-flag`, and guesses no shortened one."""

    def __init__(self, prog: str, usage: str, description: str, examples: str) -> None:
        super().__init__(
            prog,
            usage=f"{prog} {usage}",
            description=description,
            epilog="examples:" + examples,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`, where argparse would print its usage and exit."""
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
        """Returns the values of the flags that were given, by flag, and the texts behind `--gin.`.

        Raises `UserError` for a flag that does not exist, with the nearest one.
        """
        words = list(words)
        gin = [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]
        for word in words:
            if word.startswith("--gin.") and "=" not in word:
                raise UserError(f"{word}: no value; write --gin.NAME=VALUE, without a space")
        plain = [_with_dashes(word) for word in words if not word.startswith("--gin.")]
        options, unknown = self.parse_known_args(plain)
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                raise UserError(f"there is no flag {flag}.{nearest(flag, self._option_string_actions)}")
            raise UserError(f"'{word}' belongs to no flag; put a text with spaces into quotes")
        return vars(options), gin


def _with_dashes(word: str) -> str:
    if not re.match(r"--\w", word):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def add_general(parser: Parser) -> None:
    """Adds what every command has."""
    group = parser.add_argument_group("general")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error (also DEPTJAX_DEBUG=1)")
    group.add_argument("--version", action="version", version=f"deptjax {__version__}")


def add_hosts(parser: Parser) -> None:
    """Adds what makes a process one of several hosts (`deptjax.distributed.start_hosts`)."""
    group = parser.add_argument_group(
        "several hosts", "the same command on each; in SLURM, Open MPI, Kubernetes and on Cloud TPU without these flags"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first host, any free port")
    group.add_argument("--num-hosts", metavar="N", help="how many there are; 1 is alone, whatever the cluster says")
    group.add_argument("--host-index", metavar="I", help="which one this is, from 0")
    group.add_argument("--host-timeout", metavar="N", help="seconds to wait for the others at the start (default 300)")


def add_model(parser: Parser, default: str = "") -> None:
    """Adds the flags of `load_backbone`."""
    group = parser.add_argument_group("model")
    for field in MODEL_FIELDS.values():
        name = "model" if field.name == "name_or_path" else _dashed(field.name)
        _add(group, name, field, field.help + (default if name == "model" else ""), f"load_backbone.{field.name}")


def add_encoder(group: Any) -> None:
    """Adds the place of an encoder to the flags of a command that uses saved prompts."""
    told = "the encoder of prompts that are made of each text (default: the one that the prompt names)"
    group.add_argument("--encoder", metavar="PLACE", help=told)


def add_task(parser: Parser) -> None:
    """Adds the flags of a task: a registered one, or one in the user's own files."""
    group = parser.add_argument_group(
        "task", "one of the tasks that are registered, or rows in your own file with --input and --target"
    )
    group.add_argument("--task", dest="train.task", metavar="NAME", help=", ".join(task_names()))
    group.add_argument(
        "--task-file", dest="FileSource.train", metavar="FILE", help="rows: .jsonl, .csv, .tsv, .parquet"
    )
    for (owner, name), (flag, told) in _TASK_FLAGS.items():
        field = fields_of(Task if owner == "Task" else FileSource)[name]
        _add(group, flag, field, told, f"{owner}.{name}")


def add_method(parser: Parser, choice: bool = True) -> None:
    """Adds `--method`, unless there is no `choice` of one, and the fields of every registered method."""
    group = parser.add_argument_group("method", "a flag is for the methods named behind it; each has its own default")
    if choice:
        group.add_argument(
            "--method", dest="train.method", metavar="NAME", help=f"{', '.join(method_names())} (default dept)"
        )
    owners: dict[str, list[tuple[str, Field]]] = {}
    for kind in method_names():
        for name, field in fields_of(method_class(kind), linen=True).items():
            owners.setdefault(name, []).append((kind, field))
    for name, there in owners.items():
        defaults: dict[str, list[str]] = {}  # methods may mean different things by one flag
        for kind, field in there:
            defaults.setdefault(field.help, []).append(f"{kind} {_shown(field.default)}")
        told = "; ".join(f"{text} ({', '.join(of)})" for text, of in defaults.items())
        extra = "; other methods: longest text in tokens" if name in fields_of(TrainConfig) else ""
        _add(group, _dashed(name), there[0][1], told + extra, f"{METHOD}.{name}")


def add_training(parser: Parser) -> None:
    """Adds the fields of `TrainConfig`. One whose name a method's field has already is `--max-source-length`."""
    group = parser.add_argument_group("training")
    for name, field in fields_of(TrainConfig).items():
        flag = "max-source-length" if name == "max_length" else _dashed(name)
        _add(group, flag, field, f"{field.help} (default {_shown(field.default)})", f"TrainConfig.{name}")


def add_decoding(parser: Parser) -> None:
    """Adds the fields of `Decoding`."""
    group = parser.add_argument_group("generation", "for tasks whose answer is a text and not one of the labels")
    for name, field in fields_of(Decoding).items():
        if field.kinds == ("tuple[str, ...]",):
            told = f"{field.help}; may be given more than once"
            group.add_argument(
                f"--{_dashed(name)}", dest=f"Decoding.{name}", metavar="TEXT", action="append", help=told
            )
        else:
            default = "the longest answer in training" if name == "max_new_tokens" else _shown(field.default)
            _add(group, _dashed(name), field, f"{field.help} (default {default})", f"Decoding.{name}")


def given_by_flags(options: dict[str, Any], parser: Parser) -> dict[tuple[str, str], Given]:
    """Returns the settings among parsed options, by (owner, field)."""
    names = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    found = {}
    for dest, value in options.items():
        owner, dot, field = dest.partition(".")
        if dot:
            found[owner, field] = Given(value, names[dest], FLAG)
    return found


def _add(group: Any, flag: str, field: Field, told: str, dest: str) -> None:
    told = told.replace("%", "%%")
    if "bool" in field.kinds and "str" not in field.kinds:
        group.add_argument(
            f"--{flag}", dest=dest, action="store_const", const="true", help=f"{told}; --no-{flag} turns it off"
        )
        group.add_argument(f"--no-{flag}", dest=dest, action="store_const", const="false", help=argparse.SUPPRESS)
    else:
        metavar = {"int": "N", "float": "X"}.get(field.kinds[0], "TEXT")
        group.add_argument(f"--{flag}", dest=dest, metavar=metavar, help=told)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    return (
        f'"{value}"' if isinstance(value, str) and " " in value else str(value).lower() if value is None else str(value)
    )


def required(options: dict[str, Any], name: str, what: str) -> str:
    """Returns the value of a flag. Raises `UserError` where it is not given."""
    if not options.get(name):
        raise UserError(f"no --{name}; it names {what}")
    return str(options[name])


def whole(options: dict[str, Any], flag: str, default: int) -> int:
    """Returns a flag's whole number, at least 1."""
    if flag.replace("-", "_") not in options:
        return default
    value = checked(Given(options[flag.replace("-", "_")], f"--{flag}", FLAG), Field(flag, ("int",), default, ""))
    if value < 1:
        raise UserError(f"--{flag} is {value}; it must be at least 1")
    return int(value)


def spelled(words: Sequence[str]) -> str:
    """Returns flags as a list for a message: `--a, --b`."""
    return ", ".join(f"--{_dashed(word)}" for word in words)
