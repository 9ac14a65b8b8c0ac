"""Tasks and mixtures that are registered with seqio (T5, T5X, Flan), as text: the data of existing projects as it is.

seqio (Roberts et al. 2022, arXiv 2203.17189) brings TensorFlow, about 2 GB, and so is an extra. Only its documented
interface is used: `get_mixture_or_task`, and a provider's `splits`, `output_features`, `tasks` and `get_dataset`.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from deptjax.data.named_splits import NamedSplits, one_line
from deptjax.data.sources import register_source
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.data.tfds import plain
from deptjax.errors import UserError, nearest

_TEXTS = ("inputs", "targets")


@dataclasses.dataclass(frozen=True)
class SeqioSource(NamedSplits):
    """A registered seqio task or mixture; its rows have the columns inputs and targets, texts, and its other features.

    The texts are what seqio keeps as `inputs_pretokenized` and `targets_pretokenized`; where a task keeps none, its
    tokens are decoded with its own vocabulary. The tuned model's tokenizer then takes the place of seqio's.

    Attributes:
        name: the name of the task or mixture.
        module: the Python module that registers it when it is imported, such as `my_project.tasks`; None where that has
            been done. It is imported, so it must be one you trust.
        examples: rows to take for training; a mixture's are drawn at its rates, a task's anew where it has fewer. None:
            every row of every task once, whatever the rates.
        train: the split that is trained on.
        dev, test: splits; where None, the rows are drawn from `train` without duplicates across the splits.
        dev_size, test_size: rows to draw, as a share below 1 or a count; used only where the split is None.
        seed: draws the split, and the order of a mixture's tasks.
    """

    name: str
    module: str | None = None
    examples: int | None = dataclasses.field(default=None, kw_only=True)
    kind: ClassVar[str] = "seqio"

    def __post_init__(self) -> None:
        if self.examples is not None and self.examples < 1:
            raise UserError(f"seqio '{self.name}': examples={self.examples} must be at least 1, or None for all")

    @property
    def title(self) -> str:
        """The name, for messages."""
        return f"seqio '{self.name}'"

    def rows(self, split: str) -> tuple[Row, ...]:
        """Returns the rows of one split, in their order; see `NamedSplits.rows`."""
        provider = self._provider()
        if split not in provider.splits:
            raise self.no_split(split, sorted(provider.splits))
        missing = [name for name in _TEXTS if name not in provider.output_features]
        if missing:
            there = ", ".join(provider.output_features)
            raise UserError(
                f"{self.title} has no feature '{missing[0]}' (it has {there}); use a task from text to text"
            )
        many = self.examples if split == self.train else None
        try:
            found = self._drawn(provider, split, many) if many else self._all(provider, split)
            values = [_row(example, provider.output_features) for example in found]
        except Exception as error:  # of the task's own source and preprocessors, which may raise anything
            raise UserError(
                f"{self.title}, split '{split}' cannot be read: {type(error).__name__}: {one_line(error)}"
            ) from error
        return self.made_rows(split, values)

    def _provider(self) -> Any:
        try:
            import seqio
        except ImportError as error:
            raise UserError(
                f"{self.title} is read with the library seqio, which cannot be imported ({error}); install it with "
                "TensorFlow, about 2 GB: pip install 'deptjax[seqio]'"
            ) from None
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except ImportError as error:
                raise UserError(
                    f"{self.title}: module={self.module!r} cannot be imported ({error}); install it, or put its folder "
                    "on PYTHONPATH"
                ) from None
        known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
        if self.name not in known:
            hint = "" if self.module else "; name the module that registers it, module='my_project.tasks'"
            raise UserError(
                f"no seqio task or mixture is registered as '{self.name}'{hint}.{nearest(self.name, known)}"
            )
        return seqio.get_mixture_or_task(self.name)

    def _all(self, provider: Any, split: str) -> Iterator[Mapping[str, Any]]:
        """Yields every row once, a mixture's task by task: at its rates, the rest of a larger task would be cut off."""
        for task in getattr(provider, "tasks", [provider]):
            if split in task.splits:
                data = task.get_dataset(sequence_length=None, split=split, shuffle=False, num_epochs=1)
                yield from data.as_numpy_iterator()

    def _drawn(self, provider: Any, split: str, count: int) -> Iterator[Mapping[str, Any]]:
        settings: dict[str, Any] = {"shuffle": False, "num_epochs": None, "seed": self.seed}
        if hasattr(provider, "tasks"):
            settings["copy_pretokenized"] = True  # a mixture leaves them out unless asked
        data = provider.get_dataset(sequence_length=None, split=split, **settings)
        return itertools.islice(data.as_numpy_iterator(), count)


def seqio_task(name: str, module: str | None = None, **fields: Any) -> Task:
    """Returns a registered seqio task or mixture as a `Task` from its inputs to its targets.

    Args:
        name, module: as in `SeqioSource`.
        **fields: of `Task`, such as `labels` and `metrics` (seqio's own metrics are functions of its own, and are not
            taken over), and of `SeqioSource`, such as `dev=None`.
    """
    own = {field.name for field in dataclasses.fields(SeqioSource)} - {"name", "module"}
    source = SeqioSource(name, module, **{key: fields.pop(key) for key in own & set(fields)})
    return Task(**{"name": name, "source": source, "input": "{inputs}", "target": "{targets}", **fields})


def _row(example: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, object]:
    """Returns an example with its texts as `inputs` and `targets`, and its other features."""
    row = {name: plain(value) for name, value in example.items() if not name.endswith("_pretokenized")}
    for name in _TEXTS:
        kept = example.get(f"{name}_pretokenized", example[name])
        if isinstance(kept, (bytes, str)):
            row[name] = plain(kept)
        else:
            row[name] = features[name].vocabulary.decode([int(token) for token in np.ravel(kept)])
    return row


register_source(SeqioSource.kind, SeqioSource)
