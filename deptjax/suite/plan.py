"""What a suite runs: every method on every task with every seed, each a run in a folder of its own."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError
from deptjax.methods.base import method_class, method_to_config
from deptjax.training.config import TrainConfig
from deptjax.training.folder import check_folder_name


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a suite: a task's name, a method's name (its `kind`), a seed."""

    task: str
    method: str
    seed: int

    def __str__(self) -> str:
        """Returns `task/method/seed-N`, which is also where the run lies below `WORKDIR/runs`."""
        return f"{self.task}/{self.method}/seed-{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Returns the cell that `str` wrote. Raises `UserError` for another text.

        >>> Cell.parse("trec6/dept/seed-0")
        Cell(task='trec6', method='dept', seed=0)
        """
        found = re.fullmatch(r"([^/]+)/([^/]+)/seed-(\d+)", text)
        if found is None:
            raise UserError(f"'{text}' names no run of a suite; write TASK/METHOD/seed-N")
        return cls(found[1], found[2], int(found[3]))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one method is tuned on one task, whatever the seed.

    Attributes:
      task: the task.
      method: the method.
      settings: fields of `TrainConfig`, all but `seed`.
      test_examples: how many test rows are scored, the first of them; `None` for all.
    """

    task: Task
    method: Any
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    test_examples: int | None = None

    def __post_init__(self) -> None:
        if "seed" in self.settings:
            raise UserError("seed: a suite gives each run its own; name them all in seeds")
        if self.test_examples is not None and self.test_examples < 1:
            raise UserError(f"test_examples is {self.test_examples}; it must be at least 1")
        groups = self.method.learning_rates(1.0)
        TrainConfig.from_settings(dict(self.settings)).check_groups(groups, self.method.kind)

    def config(self, seed: int) -> TrainConfig:
        """Returns the configuration of the run with this seed."""
        return TrainConfig.from_settings({**self.settings, "seed": seed})

    def to_config(self) -> dict[str, Any]:
        """Returns all that decides the result but the model and the seed, as a JSON object."""
        train = self.config(0).identity()
        del train["seed"]
        method = method_to_config(self.method)
        return {"task": self.task.to_config(), "method": method, "train": train, "test_examples": self.test_examples}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a suite and the folder that holds them.

    Attributes:
      workdir: the suite's own folder; run `Cell` lies in `workdir/runs/TASK/METHOD/seed-N`.
      recipes: one for each pair of a task and a method.
      seeds: each recipe is run once with each.
      name: the name of the suite, where it has one.

    Raises `UserError` where there is nothing to run, and for a seed or a pair that comes twice.
    """

    workdir: pathlib.Path
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    name: str | None = None

    @classmethod
    def over(
        cls,
        workdir: str | pathlib.Path,
        tasks: Iterable[Task | str],
        methods: Iterable[Any],
        seeds: Iterable[int],
        name: str | None = None,
        test_examples: int | None = None,
        **settings: Any,
    ) -> Plan:
        """Returns the plan of every method on every task, all with the same settings.

        Args:
          workdir: the suite's own folder.
          tasks: tasks, or names of registered ones.
          methods: methods such as `DePT(rank=8)`, or names of registered ones, which are taken with their defaults.
          seeds: whole numbers.
          name: the name of the suite, for its report.
          test_examples: how many test rows are scored, the first of them; `None` for all.
          **settings: fields of `TrainConfig`, all but `seed`.

        Raises:
          UserError: for a task, method or setting that is not known, or that comes twice.
        """
        found = [get_task(task) if isinstance(task, str) else task for task in tasks]
        tuned = [method_class(method)() if isinstance(method, str) else method for method in methods]
        recipes = tuple(
            Recipe(task, method, settings, test_examples) for task, method in itertools.product(found, tuned)
        )
        return cls(pathlib.Path(workdir), recipes, tuple(seeds), name)

    def __post_init__(self) -> None:
        if not self.recipes:
            raise UserError("a suite needs at least one task and one method")
        pairs = [(recipe.task.name, recipe.method.kind) for recipe in self.recipes]
        for task, _ in pairs:
            check_folder_name(task)
        _check_distinct(pairs, lambda pair: f"method '{pair[1]}' on task '{pair[0]}'")
        if not self.seeds:
            raise UserError("a suite needs at least one seed")
        for seed in self.seeds:
            if seed < 0:
                raise UserError(f"seed {seed} must be 0 or more")
        _check_distinct(self.seeds, lambda seed: f"seed {seed}")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All runs, those of one task together, and in a task all methods with the first seed before the next."""
        pairs = [(recipe.task.name, recipe.method.kind) for recipe in self.recipes]
        tasks = dict.fromkeys(task for task, _ in pairs)
        return tuple(
            Cell(task, method, seed)
            for task in tasks
            for seed in self.seeds
            for other, method in pairs
            if other == task
        )

    def recipe(self, cell: Cell) -> Recipe:
        """Returns how a run is done. Raises `UserError` for one that is not in the plan."""
        for recipe in self.recipes:
            if (recipe.task.name, recipe.method.kind) == (cell.task, cell.method) and cell.seed in self.seeds:
                return recipe
        raise UserError(f"{cell} is no run of this suite; its first is {self.cells[0]}")


def _check_distinct(items: Iterable[Any], told: Any) -> None:
    seen = set()
    for item in items:
        if item in seen:
            raise UserError(f"{told(item)} is named twice; keep one")
        seen.add(item)
