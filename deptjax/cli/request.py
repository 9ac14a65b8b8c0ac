"""What `train` and `search` are asked for: the same flags and gin files, checked in the same order."""

from __future__ import annotations

import dataclasses
from typing import Any

from deptjax.cli import flags, settings
from deptjax.cli.setup import join_hosts
from deptjax.data.loaded import loaded_once
from deptjax.data.tasks import Task
from deptjax.errors import UserError
from deptjax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Request:
    """A run as somebody asked for it.

    Attributes:
      options: the values of all flags, by name.
      workdir: the run's folder.
      model: the arguments of `load_backbone`.
      method: with the fields given.
      task: its rows read.
      changed: the settings of training that are not at their defaults.
      notes: texts for the run's folder.
    """

    options: dict[str, Any]
    workdir: str
    model: dict[str, Any]
    method: Method
    task: Task
    changed: dict[str, Any]
    notes: dict[str, str]

    @property
    def progress(self) -> bool | None:
        """As `train` takes it."""
        return False if "quiet" in self.options else None


def make_parser(prog: str, usage: str, description: str, examples: str) -> flags.Parser:
    """Returns a parser of all that a request is made of."""
    parser = flags.Parser(prog, usage, description, examples)
    group = parser.add_argument_group("run")
    group.add_argument("--workdir", dest="train.workdir", metavar="DIR", help="the run's own folder")
    group.add_argument("--gin-file", action="append", metavar="FILE", help="settings; may be given more than once")
    group.add_argument(
        "--gin.NAME=VALUE", dest="gin", action="store_true", help="one setting: --gin.DePT.rank=8, or a macro's value"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar and no lines of progress")
    for add in (
        flags.add_model,
        flags.add_task,
        flags.add_method,
        flags.add_training,
        flags.add_hosts,
        flags.add_general,
    ):
        add(parser)
    return parser


def read_request(parser: flags.Parser, words: list[str]) -> Request:
    """Returns what the words of a command ask for. Raises `UserError`; what is quick to check comes first."""
    options, bindings = parser.parse(words)
    given = settings.merged(options.get("gin_file", []), bindings, flags.given_by_flags(options, parser))
    workdir = settings.text_of(given, "train", "workdir")
    if not workdir:
        raise UserError("no workdir; name the run's folder with --workdir DIR")
    model = settings.model_settings(given)
    if "name_or_path" not in model:
        raise UserError("no model; name one with --model, a hub name, a local folder or a GGUF file")
    method = settings.make_method(given)
    config = settings.make_config(given, method)
    settings.check_workdir(workdir)
    join_hosts(options)
    data, task = loaded_once(settings.make_task(given))
    notes = {"config.gin": settings.as_gin(model, method, data.task, config)}
    return Request(options, workdir, model, method, task, settings.changed_from_default(config), notes)
