"""A task whose rows were read already, so that no file is read again by what trains on it or scores it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from deptjax.data.sources import Source, Splits, TextOf
from deptjax.data.tasks import Task, TaskData


def loaded_once(task: Task) -> tuple[TaskData, Task]:
    """Returns a task's rows, and the task with its source replaced by these rows, so that no file is read again.

    The new source describes itself as the one it came from. Raises `UserError` as `Task.load` does.
    """
    if task.source is not None:
        read = task.source.splits(task.source_text)
        rows = Splits(*(tuple(map(task.formatted, split)) for split in read))
        labels = task.labels if task.source.infer_labels else task.labels or ()
        task = dataclasses.replace(task, source=_Kept(task.source, rows), labels=labels)
    data = task.load()
    return data, data.task


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Rows that were read already, before a few-shot sample is drawn; described as the source they came from."""

    source: Source
    rows: Splits
    infer_labels: ClassVar[bool] = True

    def splits(self, text_of: TextOf) -> Splits:
        return self.rows

    def to_config(self) -> dict[str, Any] | None:
        return self.source.to_config()
