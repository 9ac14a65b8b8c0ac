"""`run_suite`: trains the runs of a plan that are missing, one after the other, and keeps the report up to date."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from tqdm import tqdm

from deptjax.data.loaded import loaded_once
from deptjax.data.tasks import Task, TaskData
from deptjax.errors import UserError
from deptjax.inference.predictor import evaluate
from deptjax.inference.text_encoder import load_encoder
from deptjax.memory import peak_can_be_reset, release_unused
from deptjax.methods.base import Method
from deptjax.methods.encoded import ITSELF
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt
from deptjax.suite.folder import SuiteFolder
from deptjax.suite.plan import Cell, Plan
from deptjax.suite.report import write_results
from deptjax.suite.results import AFTER_OTHERS, ALONE, WITH_OTHERS
from deptjax.training.config import TrainConfig
from deptjax.training.run import Run, train


class CellTrainer(Protocol):
    """Trains the cells of a suite."""

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Returns the cells, in their order, in the groups that are given to one call."""

    def __call__(self, cells: Sequence[Cell]) -> int | None:
        """Trains a group and writes how each cell ended; returns the number of the signal that stopped it, if any."""


Notes = Callable[[Any, Task, TrainConfig], Mapping[str, str]]


def run_suite(
    plan: Plan,
    train_cells: CellTrainer,
    *,
    model: dict[str, Any],
    command: str = "",
    tell: Callable[[str], object] = lambda line: None,
) -> int | None:
    """Trains what is missing, and writes `results.json`, `results.md` and `report.html` after every run.

    Runs that ended well are kept as they are, one that was interrupted goes on where it was, and one that failed is
    tried again. A run that fails is written down and the others go on.

    Args:
      plan: what to run.
      train_cells: `InProcess`, `deptjax.suite.together.Together`, or `deptjax.suite.isolated.Isolated`.
      model: how the backbone was asked for; runs of another one are refused.
      command: how the suite was asked for, for the report.
      tell: is told what happens, a line at a time.

    Returns:
      The number of the signal that stopped it, `None` where all runs have ended, well or not.

    Raises:
      UserError: for a folder that cannot be used, or whose runs have other settings.
    """
    folder = SuiteFolder(plan.workdir)
    with folder.claimed(plan, model, command):
        missing = [cell for cell in plan.cells if not folder.is_done(cell)]
        write_results(plan.workdir)
        done = 0
        for cells in train_cells.groups(missing):
            told = f"runs {done + 1} to {done + len(cells)}" if len(cells) > 1 else f"run {done + 1}"
            tell(f"{told} of {len(missing)}: {', '.join(map(str, cells))}")
            stopped_by = train_cells(cells)
            write_results(plan.workdir)
            if stopped_by is not None:
                return stopped_by
            done += len(cells)
            for cell in cells:
                tell(f"{cell}: {_told(folder.record(cell) or {})}")
    return None


def _told(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"failed: {record['error']}"
    return ", ".join(f"{name} {math.nan if score is None else score:.4f}" for name, score in record["test"].items())


class InProcess:
    """Trains cells one after the other in this process: the backbone is loaded once, and the rows of each task once.

    So is each encoder that methods name.

    Args:
      plan: what the cells belong to.
      load: returns the backbone; called when the first cell is trained.
      progress: see `deptjax.train`.
      notes: returns the texts to put into a new run's folder, of its method, task and configuration.
    """

    def __init__(
        self,
        plan: Plan,
        load: Callable[[], Backbone],
        *,
        progress: bool | None = None,
        notes: Notes = lambda method, task, config: {},
    ) -> None:
        self._plan, self._load, self._progress, self._notes = plan, load, progress, notes
        self._folder = SuiteFolder(plan.workdir)
        self._backbone: Backbone | None = None
        self._encoders: dict[str, Backbone] = {}
        self._task: tuple[Task, TaskData, Task] | None = None
        self._begun = 0

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Returns each cell by itself."""
        return [[cell] for cell in cells]

    def __call__(self, cells: Sequence[Cell]) -> int | None:
        """Trains the cells and scores each on its test split; see `CellTrainer`."""
        backbone = self.backbone  # one that cannot be loaded is not the mistake of a run
        for cell in cells:
            release_unused()
            self._begun += 1
            began = time.perf_counter()
            try:
                run, test = self._train(backbone, cell)
            except Exception as error:
                self._folder.write_record(cell, failure(error))
                continue
            if not run.finished:
                return run.signal
            self._write_done(cell, test, time.perf_counter() - began, self._peak_of())
        return None

    @property
    def backbone(self) -> Backbone:
        """The backbone, loaded at the first call."""
        if self._backbone is None:
            self._backbone = self._load()
        return self._backbone

    def _encoder(self, method: Method) -> Backbone | None:
        """Returns the encoder that a method names, loaded, or `None` for one without, or with the backbone for it."""
        choice = method.encoder_choice()
        if choice is None or choice.name == ITSELF:
            return None
        if choice.name not in self._encoders:
            self._encoders[choice.name] = load_encoder(choice.name, f"{method.kind}: encoder")
        return self._encoders[choice.name]

    def _write_done(self, cell: Cell, test: Mapping[str, float], seconds: float, peak_of: str) -> None:
        record = {
            "status": "done",
            "test": {name: score if math.isfinite(score) else None for name, score in test.items()},
            "wall_seconds": seconds,
            "peak_of": peak_of,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }
        self._folder.write_record(cell, record)

    def _peak_of(self) -> str:
        """Returns what the peak memory of a run is a peak of: a run behind others shares a process with them."""
        if self._begun == 1:
            return ALONE
        return AFTER_OTHERS if peak_can_be_reset() else WITH_OTHERS

    def _train(self, backbone: Backbone, cell: Cell) -> tuple[Run, dict[str, float]]:
        """Returns the run, and the test scores of its prompt; no scores where a signal stopped it."""
        recipe = self._plan.recipe(cell)
        data, task = self._rows(recipe.task)
        config = recipe.config(cell.seed)
        notes = self._notes(recipe.method, data.task, config)
        run = train(
            backbone,
            recipe.method,
            task,
            self._folder.run(cell),
            progress=self._progress,
            notes=notes,
            encoder=self._encoder(recipe.method),
            **{**recipe.settings, "seed": cell.seed},
        )
        if not run.finished:
            return run, {}
        assert run.prompt is not None
        return run, self._test(backbone, run.prompt, cell)

    def _test(self, backbone: Backbone, prompt: Prompt, cell: Cell) -> dict[str, float]:
        """Returns the test scores of a prompt."""
        recipe = self._plan.recipe(cell)
        data, task = self._rows(recipe.task)
        rows = len(data.test[: recipe.test_examples])
        hidden = None if self._progress is None else not self._progress
        with tqdm(total=rows, desc="test", unit=" rows", disable=hidden, dynamic_ncols=True) as bar:
            size = recipe.config(cell.seed).eval_batch_size
            encoder = self._encoder(prompt.method)
            return evaluate(backbone, prompt, task, examples=rows, batch_size=size, on_rows=bar.update, encoder=encoder)

    def _rows(self, asked: Task) -> tuple[TaskData, Task]:
        if self._task is None or self._task[0] != asked:
            self._task = None  # one task's rows at a time
            self._task = (asked, *loaded_once(asked))
        _, data, task = self._task
        if not data.test:
            raise UserError(f"task '{asked.name}' has no test rows to report on; give it a test file or test_size")
        return data, task


def failure(error: Exception) -> dict[str, Any]:
    """Returns the record of a run that failed: `error` in one line; of what nobody expected, the `traceback` as well.

    The other runs go on in any case: what broke one of them may be its own.
    """
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        told = "out of memory; lower batch_size and eval_batch_size, or max_length"
    elif isinstance(error, UserError):
        told = " ".join(str(error).split())
    else:
        told = f"{type(error).__name__}: {' '.join(str(error).split())} (not expected; the run's .json says where)"
        lines = traceback.format_exception(error)
        return {"status": "failed", "error": told, "traceback": "".join(lines)}
    return {"status": "failed", "error": told}
