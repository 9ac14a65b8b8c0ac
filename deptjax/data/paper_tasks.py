"""How the tasks of DePT's paper are declared; the declarations are in `glue`, `superglue`, `mrqa` and `others`.

Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2024, arXiv 2309.05173. Every
task is text to text, and a label is spoken as its digit: `"0"`, `"1"`, `"2"`. docs/tasks.md has the tables: templates,
splits, and where `paper_compat` differs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from deptjax.data.huggingface import HFSource
from deptjax.data.paper_splits import PaperSplits
from deptjax.data.tasks import Task, get_task, register_task
from deptjax.errors import UserError, nearest

SMALL_STEPS, LARGE_STEPS = 30_000, 300_000


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """How the paper trains on a task.

    Attributes:
        max_length: longest source in tokens.
        steps: updates; 30,000 on small sets, 300,000 on those of more than 100,000 rows and on questions on a text.
        batch_size: rows a batch.
        accumulate: batches a step; 32 rows make a step everywhere.
    """

    max_length: int = 256
    steps: int = SMALL_STEPS
    batch_size: int = 32
    accumulate: int = 1


_SETTINGS: dict[str, PaperSettings] = {}


def hub(
    path: str, name: str | None = None, *, train: str = "train", dev: str = "validation", test: str = "validation"
) -> HFSource:
    """Returns the official splits of a data set on the Hugging Face hub.

    Args:
        path, name: of the data set and its configuration.
        train, dev, test: the official splits that `PaperSplits` takes for these three.
    """
    return HFSource(path, name, train=train, dev=dev, test=test)


def paper_task(
    name: str,
    source: PaperSplits,
    input: str,
    labels: tuple[str, ...] = (),
    metrics: tuple[str, ...] = ("accuracy",),
    *,
    target: str = "{label}",
    row_format: str | None = None,
    references: str | None = None,
    group: str | None = None,
    max_target_length: int = 64,
    settings: PaperSettings = PaperSettings(),
) -> Task:
    """Registers a task of the paper and returns it; label i is spoken as the digit i."""
    _SETTINGS[name] = settings
    return register_task(
        Task(
            name=name,
            source=source,
            input=input,
            target=target,
            labels=labels,
            verbalizers={label: str(digit) for digit, label in enumerate(labels)},
            metrics=metrics,
            max_target_length=max_target_length,
            references=references,
            group=group,
            row_format=row_format,
        )
    )


def paper_settings(name: str) -> dict[str, Any]:
    """Returns how the paper trains on a task, as fields of `TrainConfig`: max_length, steps, batch_size, accumulate.

    Raises `UserError` for a task that is not one of the paper's.
    """
    get_task(name)
    if name not in _SETTINGS:
        there = ", ".join(_SETTINGS)
        raise UserError(f"task '{name}' is not one of the paper's ({there}).{nearest(name, _SETTINGS)}")
    return dataclasses.asdict(_SETTINGS[name])
