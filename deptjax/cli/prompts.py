"""The prompts that `deptjax predict` answers with, by the name of their task, and which of them answers a row."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from deptjax.cli.model import backbone_of
from deptjax.cli.settings import Settings
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt

TASK_FIELD = "task"


class Prompts:
    """One prompt or several, and the choice among them.

    Args:
      given: `DIR` or `NAME=DIR`, at least one; without a name, it is that of the task the prompt was tuned for.
      task: the task of all rows; `None` where each names its own.
      field: the field in which a row names its task. `None` for `task` where there are several prompts, and for no
        such field where there is one.

    Attributes:
      by_name: the loaded prompts.
      columns: of the template of all rows, or none where each row has that of its task.

    Raises `UserError` for a folder that holds no prompt, two prompts of one name, and a task without a prompt.
    """

    def __init__(self, given: Sequence[str], task: str | None = None, field: str | None = None) -> None:
        if task is not None and field is not None:
            raise UserError("--task and --task-field both say which task a row is of; keep one")
        self.by_name: dict[str, Prompt] = {}
        self._places: dict[str, str] = {}
        for word in given:
            self._add(*_name_and_place(word))
        self._tasks = {n: Task.from_config({**prompt.task, "source": None}) for n, prompt in self.by_name.items()}
        if task is not None:
            self._check_name(task, "--task")
        self._all = next(iter(self._tasks)) if task is None and field is None and len(self._tasks) == 1 else task
        self._field = TASK_FIELD if field is None else field
        self.columns = () if self._all is None else self._tasks[self._all].input_template.columns

    def task_of(self, row: Row) -> str:
        """Returns the name of the task of a row, which has a text for it. Raises `UserError` naming the line."""
        name = self._all if self._all is not None else self._named_by(row)
        self._tasks[name].source_text(row)
        return name

    def longest_text(self) -> int | None:
        """Returns the most tokens of a generated answer in training, or `None` where every task scores labels."""
        lengths = [
            task.max_target_length
            for name, task in self._tasks.items()
            if not task.labels or self.by_name[name].settings.get("evaluation") == "generate"
        ]
        return max(lengths, default=None)

    def backbone(self, settings: Settings) -> Backbone:
        """Returns the backbone that all of the prompts were tuned on. Raises `UserError` as `backbone_of` does."""
        (first, place), *others = self._places.items()
        backbone = backbone_of(self.by_name[first], place, settings)
        for name, place in others:
            self.by_name[name].check_backbone(backbone, place)
        return backbone

    def _add(self, name: str | None, place: str) -> None:
        prompt = Prompt.load(place)
        prompt.check_is_of_a_task(place)
        name = prompt.task["name"] if name is None else name
        if name in self.by_name:
            raise UserError(
                f"--prompt {place} and {self._places[name]} are both for task '{name}'; give one another name: "
                f"--prompt NAME={place}"
            )
        self.by_name[name], self._places[name] = prompt, place

    def _named_by(self, row: Row) -> str:
        values: Mapping[str, object] = row.values
        if self._field not in values:
            known = [str(name) for name in values]
            raise UserError(
                f"{row.origin}: no field '{self._field}', which names the row's task; --task-field names another, "
                f"--task the task of all rows.{nearest(self._field, known)}"
            )
        name = values[self._field]
        if not isinstance(name, str):
            raise UserError(f"{row.origin}: field '{self._field}' is {name!r}; it must hold the name of a task")
        self._check_name(name, row.origin)
        return name

    def _check_name(self, name: str, where: str) -> None:
        if name not in self._tasks:
            there = ", ".join(self._tasks)
            raise UserError(f"{where}: no prompt is for task '{name}'; there are: {there}.{nearest(name, self._tasks)}")


def _name_and_place(word: str) -> tuple[str | None, str]:
    """Returns the parts of `NAME=DIR`; a folder may have the sign in its own name.

    >>> _name_and_place("sst2=runs/a/prompt"), _name_and_place("runs/rate=0.3/prompt")
    (('sst2', 'runs/a/prompt'), (None, 'runs/rate=0.3/prompt'))
    """
    name, sign, place = word.partition("=")
    if not sign or "/" in name or pathlib.Path(word).exists():
        return None, word
    if not name or not place:
        raise UserError(f"--prompt {word}: write --prompt NAME=DIR, or --prompt DIR")
    return name, place
