"""All seeds of a method on a task at once: a group of cells is a population, and each cell one of its members."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

from deptjax.memory import release_unused
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt
from deptjax.suite.folder import read_json
from deptjax.suite.plan import Cell
from deptjax.suite.results import IN_POPULATION
from deptjax.suite.run import InProcess, failure
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
        """Trains the cells, those of a method and a task at once, and scores each on its test split.

        A run that has been trained, and not scored before the suite was stopped, is only scored.
        """
        backbone = self.backbone  # one that cannot be loaded is not the mistake of a run
        for group in self.groups(cells):
            release_unused()
            began = time.perf_counter()
            new = [cell for cell in group if not self._is_trained(cell)]
            if new:
                try:
                    population = self._train_group(backbone, new)
                except Exception as error:
                    for cell in new:
                        self._folder.write_record(cell, failure(error))
                    group = [cell for cell in group if cell not in new]
                else:
                    if not population.finished:
                        return population.signal
            share = (time.perf_counter() - began) / max(len(new), 1)
            for cell in group:
                self._score(cell, share if cell in new else 0.0)
        return None

    def _is_trained(self, cell: Cell) -> bool:
        result = self._folder.run(cell) / "result.json"
        return result.exists() and read_json(result).get("ended") == "finished"

    def _score(self, cell: Cell, seconds: float) -> None:
        """Writes how a cell ended whose training has ended; `seconds` is what it took."""
        result = read_json(self._folder.run(cell) / "result.json")
        if result.get("ended") == "diverged":
            told = f"the loss is not a finite number at step {result['step'] + 1}; lower the learning rates"
            self._folder.write_record(cell, {"status": "failed", "error": told})
            return
        began = time.perf_counter()
        try:
            test = self._test(self.backbone, Prompt.load(self._folder.run(cell) / "prompt"), cell)
        except Exception as error:
            self._folder.write_record(cell, failure(error))
            return
        self._write_done(cell, test, seconds + time.perf_counter() - began, IN_POPULATION)

    def _train_group(self, backbone: Backbone, cells: Sequence[Cell]) -> Population:
        first = cells[0]
        recipe = self._plan.recipe(first)
        data, task = self._rows(recipe.task)
        seeds = "-".join(str(cell.seed) for cell in cells)
        place = self._folder.path / "populations" / first.task / first.method / f"seeds-{seeds}"
        folders = [self._folder.run(cell) for cell in cells]
        if not all((folder / "config.json").exists() for folder in folders):
            shutil.rmtree(place, ignore_errors=True)  # of runs that were removed, to be trained anew
        return train_population(
            backbone,
            recipe.method,
            task,
            place,
            [{"seed": cell.seed} for cell in cells],
            folders=folders,
            progress=self._progress,
            notes=self._notes(recipe.method, data.task, recipe.config(first.seed)),
            encoder=self._encoder(recipe.method),
            **recipe.settings,
        )
