"""A task: where its rows come from, the text given to the model, the text expected of it, and the metrics."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from deptjax.data.few_shot import few_shot_rows
from deptjax.data.metrics import check_metrics, compute_metrics
from deptjax.data.row_formats import formatted, get_row_format
from deptjax.data.sources import Source, Splits, source_from_config
from deptjax.data.templates import Row, Template, as_text
from deptjax.errors import UserError, nearest

logger = logging.getLogger(__name__)

MOST_INFERRED_LABELS = 20  # more distinct targets than this are taken for free text


@dataclasses.dataclass(frozen=True)
class Task:
    r"""What a prompt is tuned for.

    Attributes:
        name: the task's name, for registry, messages and saved prompts.
        source: where the rows come from; None for a task that only predicts.
        input: template of the source text, such as `"{question}\nType:"`.
        target: template of the target text. With `labels`, its filled text must be one of them. Without a leading
            space: whether one is needed is a matter of the backbone, and added by `Preprocessor`.
        labels: the allowed labels in the order of their indices; `()` for free text; None to infer them when the rows
            are loaded, from a file or rows in memory with few distinct targets.
        verbalizers: the text the model must produce for a label, where it is not the label itself. Rows may hold
            either.
        metrics: names from `deptjax.data.metrics`; the first selects the best prompt. Empty: accuracy with labels,
            exact_match for free text.
        positive_label: the label that the metric `f1` is about; None for the last one.
        max_target_length: the most tokens of a free-text target, and of a generated answer.
        references: the column that holds all accepted answers of a row, a list of texts or a dict with one as `text`
            (as SQuAD has them): `exact_match` and `token_f1` take the best of them. None for the target alone.
        group: a template whose text rows of one question share, such as `"{question_id}"`, for `multirc_em`.
        row_format: the registered function that computes columns for the templates (`deptjax.data.row_formats`).
        few_shot: train on this many rows, as many of each label as can be; None for all rows.
        few_shot_seed: draws them.
        paper_compat: do as the code of DePT's authors does where that is a slip: the row format and the few-shot
            sample. docs/tasks.md lists the differences.

    Raises `UserError` for a template that is none, labels that repeat or are fewer than two, a verbalizer or positive
    label that is not in the labels, two labels with one text, or an unknown metric or row format.
    """

    name: str
    source: Source | None = dataclasses.field(repr=False)
    input: str
    target: str = "{label}"
    labels: tuple[str, ...] | None = None
    verbalizers: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    metrics: tuple[str, ...] = ()
    positive_label: str | None = None
    max_target_length: int = 64
    references: str | None = None
    group: str | None = None
    row_format: str | None = None
    few_shot: int | None = None
    few_shot_seed: int = 42
    paper_compat: bool = False

    def __post_init__(self) -> None:
        where = f"task '{self.name}'"
        Template(self.input, f"{where} input template")
        if Template(self.target, f"{where} target template").masks:
            raise UserError(f"{where}: {{mask}} has its place in the input template, not in the target; leave it out")
        if self.group is not None:
            Template(self.group, f"{where} group template")
        if isinstance(self.labels, str) or isinstance(self.metrics, str):
            raise UserError(f"{where}: labels and metrics are lists of texts, not one text; write ['accuracy'], say")
        if self.labels is not None:
            self._set(labels=tuple((as_text(label) or "").strip() for label in self.labels))
        self._set(verbalizers=dict(self.verbalizers), metrics=tuple(self.metrics))
        if self.labels:
            self._check_labels(where, self.labels)
        elif self.verbalizers:
            raise UserError(f"{where}: verbalizers need labels; name the labels")
        if self.labels is not None and not self.metrics:
            self._set(metrics=("accuracy",) if self.labels else ("exact_match",))
        check_metrics(self.metrics)
        if self.group is None and "multirc_em" in self.metrics:
            raise UserError(f"{where}: metric 'multirc_em' needs group=, such as group='{{question_id}}'")
        if self.max_target_length < 1:
            raise UserError(f"{where}: max_target_length={self.max_target_length} must be at least 1")
        if self.row_format is not None:
            get_row_format(self.row_format)
        if self.few_shot is not None and self.few_shot < 1:
            raise UserError(f"{where}: few_shot={self.few_shot} must be at least 1")
        if self.few_shot_seed < 0:
            raise UserError(f"{where}: few_shot_seed={self.few_shot_seed} must be 0 or more")

    def _set(self, **fields: Any) -> None:
        for field, value in fields.items():
            object.__setattr__(self, field, value)  # the dataclass is frozen; only construction tidies its fields

    def _check_labels(self, where: str, labels: tuple[str, ...]) -> None:
        for label in labels:
            if not label.strip():
                raise UserError(f"{where}: a label is empty; each must be a text, a number or a boolean")
            if labels.count(label) > 1:
                raise UserError(f"{where}: label '{label}' is named twice; keep one")
        if len(labels) < 2:
            raise UserError(f"{where}: one label, '{labels[0]}', leaves nothing to learn; name at least two")
        for label in [*self.verbalizers, *([self.positive_label] if self.positive_label is not None else [])]:
            if label not in labels:
                raise UserError(f"{where}: {_not_in_set(label, labels)} (named in verbalizers or positive_label)")
        texts = collections.Counter(text.strip() for text in self.texts)
        text, count = texts.most_common(1)[0]
        if count > 1 or "" in texts:
            raise UserError(f"{where}: {count} labels have the text '{text}'; give each a distinct text in verbalizers")

    @functools.cached_property
    def input_template(self) -> Template:
        """The parsed input template."""
        return Template(self.input, "input template")

    @functools.cached_property
    def target_template(self) -> Template:
        """The parsed target template."""
        return Template(self.target, "target template")

    @functools.cached_property
    def group_template(self) -> Template | None:
        """The parsed group template, or None."""
        return None if self.group is None else Template(self.group, "group template")

    @property
    def texts(self) -> tuple[str, ...]:
        """The text the model must produce for each label, in the order of the labels; empty for free text."""
        return tuple(self.verbalizers.get(label, label) for label in self.labels or ())

    def source_text(self, row: Row | Mapping[str, object] | str) -> str:
        """Returns the text given to the model for a row, or for a bare text where the template has a single column.

        Raises `UserError` naming the column that is missing or empty.
        """
        if isinstance(row, str):
            columns = self.input_template.columns
            if len(columns) > 1:
                raise UserError(f"task '{self.name}' needs the columns {', '.join(columns)}; give an object with these")
            row = {columns[0]: row}
        return self.input_template.render(self.formatted(row if isinstance(row, Row) else Row(row)))

    def formatted(self, row: Row) -> Row:
        """Returns the row with the columns of the task's row format; without a row format, the row itself.

        Raises `UserError` naming the column that the format cannot use.
        """
        return row if self.row_format is None else formatted(row, self.row_format, self.paper_compat)

    def label_of(self, row: Row) -> str:
        """Returns the label of a row (its filled target template, stripped), or the whole target for free text.

        A row may hold the text of a label instead: with verbalizers `{"negative": "0", ...}`, 0 is negative.

        Raises `UserError` naming the row and the set when the label is not in it, or when the target is empty.
        """
        label = self.target_template.render(self.formatted(row)).strip()
        if self.labels and label not in self.labels:
            label = self.label_from_text(label)
        if self.labels and label not in self.labels:
            raise UserError(f"{_where(row)}{_not_in_set(label, self.labels)}")
        return label

    def target_text(self, row: Row) -> str:
        """Returns the text the model must produce for a row."""
        label = self.label_of(row)
        return self.verbalizers.get(label, label)

    def label_index(self, row: Row) -> int:
        """Returns the index of a row's label, -1 for free text."""
        return self.labels.index(self.label_of(row)) if self.labels else -1

    def label_from_text(self, text: str) -> str:
        """Returns the label that a produced text stands for, or the text itself, stripped, where it stands for none."""
        text = text.strip()
        for label, spoken in zip(self.labels or (), self.texts, strict=True):
            if spoken.strip() == text:
                return label
        return text

    def score(self, predictions: Iterable[str], rows: Iterable[Row]) -> dict[str, float]:
        """Returns the task's metrics of predicted labels (or texts) against the rows' own.

        See `compute_metrics`; a produced text is first turned into a label by `label_from_text`.
        """
        rows = list(map(self.formatted, rows))
        template = self.group_template
        return compute_metrics(
            self.metrics,
            list(predictions),
            [self.label_of(row) for row in rows],
            self.labels,
            self.positive_label,
            accepted=[self.accepted(row) for row in rows],
            groups=None if template is None else [template.render(row) for row in rows],
        )

    def accepted(self, row: Row) -> tuple[str, ...]:
        """Returns all answers to a row that are right: its own target, or those in the column `references`.

        No answer at all stands for the empty one (SQuAD 2's questions without an answer). Raises `UserError` naming the
        row where the column is missing or holds something else.
        """
        if self.references is None:
            return (self.label_of(row),)
        row = self.formatted(row)
        if self.references not in row.values:
            known = ", ".join(map(str, row.values))
            raise UserError(
                f"{_where(row)}no column '{self.references}', which task '{self.name}' names as references; the "
                f"columns are {known}.{nearest(self.references, map(str, row.values))}"
            )
        value = row.values[self.references]
        texts = value.get("text") if isinstance(value, Mapping) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{_where(row)}column '{self.references}' is not a list of texts, nor a dict with one as text"
            )
        return tuple(texts) or ("",)

    def load(self) -> TaskData:
        """Returns the rows, all of them checked, and the task with its labels and metrics filled in.

        Raises `UserError` for everything that is wrong in the files, naming file, line and field.
        """
        if self.source is None:
            raise UserError(f"task '{self.name}' has no source; give it files, such as FileSource(train='train.jsonl')")
        splits = Splits(*(tuple(map(self.formatted, split)) for split in self.source.splits(self.source_text)))
        task = self
        if self.labels is None:
            labels = self._infer_labels(splits) if self.source.infer_labels else ()
            task = dataclasses.replace(self, labels=labels)
        for split in splits:
            for row in split:
                task.source_text(row), task.label_of(row), task.accepted(row)
                if (template := task.group_template) is not None:
                    template.render(row)
        return TaskData(task, task._sampled(splits.train), splits.dev, splits.test)

    def _sampled(self, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        """Returns the training rows of a few-shot task, or all of them."""
        if self.few_shot is None:
            return rows
        by_target = None if self.row_format is None else get_row_format(self.row_format).few_shot_class
        if self.labels:
            class_of, classes = self.label_of, self.labels
        elif by_target is not None:
            class_of = lambda row: by_target(self.label_of(row))  # noqa: E731
            classes = tuple(sorted(set(map(class_of, rows))))
        else:
            class_of, classes = None, ()
        return few_shot_rows(
            rows,
            self.few_shot,
            seed=self.few_shot_seed,
            class_of=class_of,
            classes=classes,
            paper_compat=self.paper_compat,
            name=self.name,
        )

    def _infer_labels(self, splits: Splits) -> tuple[str, ...]:
        counts = collections.Counter(self.target_template.render(row).strip() for split in splits for row in split)
        if not 2 <= len(counts) <= MOST_INFERRED_LABELS or min(counts.values()) < 2:
            logger.warning(
                "task '%s': labels not given, and %d distinct targets are not a set of labels: taken for free text",
                *(self.name, len(counts)),
            )
            return ()
        labels = tuple(sorted(counts))
        logger.warning("task '%s': labels not given, inferred from the rows: %s", self.name, ", ".join(labels))
        return labels

    def to_config(self) -> dict[str, Any]:
        """Returns the task as a JSON object, which a saved prompt stores; `from_config` reads it.

        A setting of few tasks stands in it only where it is set.
        """
        config = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        config = {name: value for name, value in config.items() if name not in _RARE or value != _RARE[name]}
        config["source"] = None if self.source is None else self.source.to_config()
        config["labels"] = None if self.labels is None else list(self.labels)
        config["verbalizers"], config["metrics"] = dict(self.verbalizers), list(self.metrics)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Task:
        """Returns the task that `to_config` described.

        Raises `UserError` for a field that is missing, or that a task does not have.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in config:
            if name not in known:
                raise UserError(
                    f"task config: '{name}' is not a field of a task ({', '.join(known)}).{nearest(name, known)}"
                )
        for name in ("name", "input"):
            if not isinstance(config.get(name), str):
                raise UserError(f"task config: field '{name}' is missing or not a text")
        fields = dict(config)
        fields["source"] = source_from_config(fields.get("source"))
        for name in ("labels", "metrics"):  # a text is no list of letters, and is refused
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        return cls(**fields)


_RARE = {
    field.name: field.default
    for field in dataclasses.fields(Task)
    if field.name in ("row_format", "few_shot", "few_shot_seed", "paper_compat")
}


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task with its labels filled in, and its rows by split."""

    task: Task
    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]


def _where(row: Row) -> str:
    return f"{row.origin}: " if row.origin else ""


def _not_in_set(label: str, labels: tuple[str, ...]) -> str:
    return f"label '{label}' is not one of {', '.join(map(repr, labels))}.{nearest(label, labels)}"


_REGISTRY: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Makes `get_task(task.name)` return `task`, and returns it.

    Raises `UserError` when another task has the name already.
    """
    if _REGISTRY.setdefault(task.name, task) != task:
        raise UserError(f"a task named '{task.name}' is registered already; choose another name")
    return task


def get_task(name: str, **fields: Any) -> Task:
    """Returns the registered task of that name, with `fields` replaced: `get_task("cola", few_shot=16)`.

    Raises `UserError` with the nearest name when there is none, and for a field that a task does not have.
    """
    if name not in _REGISTRY:
        raise UserError(f"no task is named '{name}'; there are {', '.join(task_names())}.{nearest(name, _REGISTRY)}")
    known = [field.name for field in dataclasses.fields(Task)]
    for field in fields:
        if field not in known:
            raise UserError(f"'{field}' is not a field of a task ({', '.join(known)}).{nearest(field, known)}")
    return dataclasses.replace(_REGISTRY[name], **fields) if fields else _REGISTRY[name]


def task_names() -> tuple[str, ...]:
    """Returns the names of all registered tasks, sorted."""
    return tuple(sorted(_REGISTRY))
