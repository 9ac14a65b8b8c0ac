"""All seeds of a method on a task at once: a group of cells is a population, and each cell one of its members."""

from __future__ import annotations

import time
from collections.abc import Sequence

from deptjax.memory import release_unused
from deptjax.prompt import Prompt
from deptjax.suite.plan import Cell
from deptjax.suite.results import IN_POPULATION
from deptjax.suite.run import InProcess, one_line
from deptjax.training.population import Population, train_population


class Together(InProcess):
    """Trains the seeds of each method on each task as one population; see `InProcess` for the arguments.

    A run ends as it would have ended by itself, up to rounding, in a folder of the same form. Its seconds are a share:
    those of the population over the number of its members. Its peak memory is that of the whole population.
    """

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Returns the cells of each method on each task."""
        pairs = dict.fromkeys((cell.task, cell.method) for cell in cells)
        return [[cell for cell in cells if (cell.task, cell.method) == pair] for pair in pairs]

    def __call__(self, cells: Sequence[Cell]) -> int | None:
        """Trains the cells, those of a method and a task at once, and scores each on its test split."""
        for group in self.groups(cells):
            release_unused()
            began = time.perf_counter()
            try:
                population = self._train_group(group)
            except Exception as error:
                for cell in group:
                    self._folder.write_record(cell, {"status": "failed", "error": one_line(error)})
                continue
            if not population.finished:
                return population.signal
            share = (time.perf_counter() - began) / len(group)
            for cell, member in zip(group, population.members, strict=True):
                began = time.perf_counter()
                if member.ended == "diverged":
                    told = f"the loss is not a finite number at step {member.step + 1}; lower the learning rates"
                    self._folder.write_record(cell, {"status": "failed", "error": told})
                    continue
                test = self._test(self.backbone, Prompt.load(self._folder.run(cell) / "prompt"), cell)
                self._write_done(cell, test, share + time.perf_counter() - began, IN_POPULATION)
        return None

    def _train_group(self, cells: Sequence[Cell]) -> Population:
        first = cells[0]
        recipe = self._plan.recipe(first)
        data, task = self._rows(recipe.task)
        seeds = "-".join(str(cell.seed) for cell in cells)
        return train_population(
            self.backbone,
            recipe.method,
            task,
            self._folder.path / "populations" / first.task / first.method / f"seeds-{seeds}",
            [{"seed": cell.seed} for cell in cells],
            folders=[self._folder.run(cell) for cell in cells],
            progress=self._progress,
            notes=self._notes(recipe.method, data.task, recipe.config(first.seed)),
            **recipe.settings,
        )
