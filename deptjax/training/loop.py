"""The training loop: batches in, parameters out; evaluates, logs, saves, stops cleanly, goes on where it stopped."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from deptjax.checkpoint import Checkpoints
from deptjax.errors import UserError
from deptjax.sharding import put_leaf
from deptjax.training.ahead import Ahead
from deptjax.training.config import TrainConfig
from deptjax.training.folder import RunFolder
from deptjax.training.profile import Profile
from deptjax.training.signals import StopSignals
from deptjax.training.state import TrainState
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

SLOW_INPUT = 0.1  # the share of a window's time that waits for data may take before it is said
SETTLED_SECONDS = 5.0  # of a window, before its share says anything
QUIET_SECONDS = 15.0  # between lines where there is no terminal to draw a bar on


@dataclasses.dataclass
class Progress:
    """What a checkpoint keeps beside the state: where the data stands, and the best evaluation so far.

    `unlogged` holds the losses since the last line of the log, so that the next line averages what it would have;
    `mesh` is what the run was on, as it is written.
    """

    data: dict[str, Any]
    best_step: int = 0
    best_score: float | None = None
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    unlogged: list[float] = dataclasses.field(default_factory=list)
    mesh: str = ""

    def move(self, mesh: str, told: bool = True) -> None:
        """Notes the mesh that the run is on now, and says so where it was on another."""
        if told and self.mesh not in ("", mesh):
            print(f"the run was on mesh {self.mesh}, and goes on on {mesh}", file=sys.stderr)
        self.mesh = mesh


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: `finished` when all steps were done; `signal` is the number of the one that stopped it."""

    state: TrainState
    progress: Progress
    finished: bool
    step: int
    signal: int | None
    seconds_per_step: float | None


@dataclasses.dataclass
class Loop:
    """The loop of one run and what it works on.

    Attributes:
      config: the settings.
      folder: where everything is written.
      checkpoints: of this run.
      step_fn: `step(state, frozen, batch, go) -> (state, metrics)`, as in `make_update`.
      frozen: the frozen tree.
      batches: an iterator with `get_state` and `set_state`.
      put_batch: places a batch on the devices.
      rates: schedules of the learning-rate groups, for the logs.
      evaluate: returns the dev metrics of a trainable tree, the one that selects the best first; or `None`.
      save_prompt: writes the prompt folder.
      bar: whether to draw a progress bar; `None` draws one on a terminal.
    """

    config: TrainConfig
    folder: RunFolder
    checkpoints: Checkpoints
    step_fn: Callable[[TrainState, Tree, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    frozen: Tree
    batches: Any
    put_batch: Callable[[Any], Any]
    rates: dict[str, Callable[[Any], Any]]
    evaluate: Callable[[Tree], dict[str, float]] | None
    save_prompt: Callable[[Tree, dict[str, float]], object]
    bar: bool | None = None

    def run(self, state: TrainState, progress: Progress) -> Outcome:
        """Trains until the last step or a signal, then saves.

        A step's numbers are read when the next one has been given to the devices, so that they never stand still for
        it; before an evaluation and a checkpoint, all are read. `go` tells the step behind one that is not finite to
        change nothing.
        """
        done = int(state.step) // self.config.accumulate
        self.folder.open_logs(done)
        seconds: list[float] = []
        ahead = Ahead(self.batches, self.put_batch)
        go = put_leaf(np.True_, state.step.sharding)
        profile = Profile(self.folder.path / "profile", self.config.profile, done, self.config.steps, self.bar is False)
        try:
            with StopSignals(self._saved) as signals, make_bar(self.config.steps, done, self.bar) as bar:
                window = _Window(losses=list(progress.unlogged))
                pending: _Dispatched | None = None
                while done < self.config.steps and not signals.stop_before(done, ahead.ready):
                    began = time.perf_counter()
                    profile.before(done)
                    state, sent = self._dispatch(state, go, done + 1, ahead)
                    go = sent.metrics[-1]["finite"]
                    done += 1
                    evaluate = self.evaluate and (due(done, self.config.eval_every) or done == self.config.steps)
                    self._settle(pending, state, progress, window, bar, ahead)
                    if done < self.config.steps and signals.received is None:
                        ahead.fetch(go.is_ready)  # type: ignore[attr-defined]
                    if evaluate or due(done, self.config.checkpoint_every) or done == self.config.steps:
                        self._settle(sent, state, progress, window, bar, ahead)
                        pending = None
                    else:
                        pending = sent
                    profile.after(done, go)
                    seconds.append(time.perf_counter() - began)
                    if evaluate:
                        self._evaluate(state, done, progress, bar)
                        window.restart(ahead)
                    if due(done, self.config.checkpoint_every):
                        self._checkpoint(state, progress, window, ahead)
                self._settle(pending, state, progress, window, bar, ahead)
            finished = done == self.config.steps
            if finished and self.evaluate and progress.best_score is None:
                raise UserError(
                    "no evaluation gave finite numbers, so there is no prompt to keep; lower the learning rates and"
                    " use a new workdir"
                )
            if finished and self.evaluate is None:
                progress.best_step = done
                self.save_prompt(state.trainable, {})
            self._checkpoint(state, progress, window, ahead)
            self.checkpoints.wait()
        finally:
            profile.close()
            self.folder.close_logs()
        stopped_by = None if finished else signals.received
        return Outcome(state, progress, finished, done, stopped_by, statistics.median(seconds) if seconds else None)

    def _dispatch(self, state: TrainState, go: jax.Array, step: int, ahead: Ahead) -> tuple[TrainState, _Dispatched]:
        """Gives a step to the devices; returns its state and what will be read of it."""
        metrics, rows = [], 0
        for _ in range(self.config.accumulate):
            batch = ahead.take()
            rows += len(batch["label"])
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, found = self.step_fn(state, self.frozen, batch, go)
            go = found["finite"]
            metrics.append(found)
        # Scheduled behind the step: read later, they would wait for the one that comes after it.
        rates = {f"lr/{name}": rate(step - 1) for name, rate in self.rates.items()} if self._logs(step) else {}
        return state, _Dispatched(step, metrics, rates, rows)

    def _settle(
        self,
        sent: _Dispatched | None,
        state: TrainState,
        progress: Progress,
        window: _Window,
        bar: tqdm,
        ahead: Ahead,
    ) -> None:
        """Reads the numbers of a step, waiting for it, and reports them; raises where they are not finite.

        The loss of a step is the mean over the batches whose gradients it averages.
        """
        if sent is None:
            return
        values, rates = jax.device_get((sent.metrics, sent.rates))
        if not all(value["finite"] for value in values):
            loss_is_finite = all(math.isfinite(value["loss"]) for value in values)
            self._stop_at_nan(state, sent.step, progress, good=loss_is_finite)
        window.losses.append(sum(float(value["loss"]) for value in values) / len(values))
        window.grad_norm = float(values[-1]["grad_norm"])
        window.rows += sent.rows
        bar.update()
        self._report(bar, sent.step, {name: float(rate) for name, rate in rates.items()}, window, progress, ahead)

    def _logs(self, step: int) -> bool:
        return due(step, self.config.log_every) or step == self.config.steps

    def _stop_at_nan(self, state: TrainState, step: int, progress: Progress, good: bool) -> None:
        """Raises `UserError`, having saved a good prompt where none was yet.

        The step that met a NaN changed no parameter; `good` says that their loss is finite, and only a gradient is not.
        """
        rates = ", ".join(f"{name}_lr {float(rate(step - 1)):.3g}" for name, rate in self.rates.items())
        kept = f"of step {progress.best_step}" if progress.best_score is not None else self._rescue(state, step, good)
        told = f"the prompt {kept} is kept in {self.folder.prompt}" if kept else "no good prompt was there to be kept"
        raise UserError(
            f"the loss is not a finite number at step {step} (learning rates there: {rates}); {told}; "
            "lower the learning rates and use a new workdir"
        )

    def _rescue(self, state: TrainState, step: int, good: bool) -> str | None:
        """Saves the parameters before `step`, or of the checkpoint, and returns which; `None` if neither is good."""
        if good:
            self.save_prompt(state.trainable, {})
            return f"before step {step}"
        self.checkpoints.wait()
        saved = self.checkpoints.latest
        if saved is None or saved // self.config.accumulate >= step - 1:  # of that one, this step has shown the loss
            return None
        self.save_prompt(self.checkpoints.restore(state)[0].trainable, {})
        return f"of step {saved // self.config.accumulate}"

    def _report(
        self, bar: tqdm, done: int, rates: dict[str, float], window: _Window, progress: Progress, ahead: Ahead
    ) -> None:
        speed = window.rows / max(time.perf_counter() - window.began, 1e-9)
        shown = {"loss": f"{sum(window.losses[-20:]) / len(window.losses[-20:]):.3f}", "examples/s": f"{speed:.1f}"}
        if progress.best_metrics:
            name, value = next(iter(progress.best_metrics.items()))
            shown[f"best {name}"] = f"{value:.3f}"
        bar.set_postfix(shown, refresh=False)
        if bar.disable and self.bar is not False and time.perf_counter() - window.spoke > QUIET_SECONDS:
            window.spoke = time.perf_counter()
            print(f"step {done}/{self.config.steps} {', '.join(f'{k} {v}' for k, v in shown.items())}", file=sys.stderr)
        if self._logs(done):
            since = window.losses[window.logged :]
            window.logged = len(window.losses)
            values = {
                "loss": sum(since) / len(since),
                "grad_norm": window.grad_norm,
                "examples_per_second": speed,
                "data_wait_seconds": ahead.waited - window.waited,
                **rates,
            }
            window.waited = ahead.waited
            window.warn_of_slow_input(ahead)
            self.folder.log(done, values)

    def _evaluate(self, state: TrainState, done: int, progress: Progress, bar: tqdm) -> None:
        assert self.evaluate is not None
        bar.set_description("evaluating")
        metrics = self.evaluate(state.trainable)
        bar.set_description("training")
        score = next(iter(metrics.values()))
        # Not a number: the model's own numbers are not finite. That is never the best, not even as the first.
        if not math.isnan(score) and (progress.best_score is None or score > progress.best_score):
            progress.best_step, progress.best_score, progress.best_metrics = done, score, metrics
            self.save_prompt(state.trainable, metrics)
        self.folder.log(done, metrics)
        told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if self.bar is not False:
            bar.write(f"step {done}: {told}" + (" (best)" if progress.best_step == done else ""), file=sys.stderr)

    def _saved(self) -> int | None:
        saved = self.checkpoints.on_disk()
        return None if saved is None else saved // self.config.accumulate

    def _checkpoint(self, state: TrainState, progress: Progress, window: _Window, ahead: Ahead) -> None:
        progress.unlogged = window.losses[window.logged :]
        progress.data = ahead.get_state()
        self.checkpoints.save(state, dataclasses.asdict(progress))


def due(done: int, every: int) -> bool:
    """Returns whether what is done once in `every` steps is to be done after step `done`; 0 stands for never."""
    return every > 0 and done % every == 0


def make_bar(steps: int, done: int, shown: bool | None) -> tqdm:
    """Returns the progress bar of a loop; `None` shows it on a terminal."""
    disable = None if shown is None else not shown
    return tqdm(total=steps, initial=done, desc="training", unit="step", disable=disable, dynamic_ncols=True)


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step that was given to the devices: its number, what will be known of each of its batches, and its rows."""

    step: int
    metrics: list[dict[str, jax.Array]]
    rates: dict[str, Any]
    rows: int


@dataclasses.dataclass
class _Window:
    """What is averaged for display and logs: speed since the last evaluation, losses since the last line.

    `waited` is how long data had been waited for at the last line, `waited_before` when the measure of speed began.
    """

    began: float = dataclasses.field(default_factory=time.perf_counter)
    spoke: float = dataclasses.field(default_factory=time.perf_counter)
    rows: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    logged: int = 0
    grad_norm: float = 0.0
    waited: float = 0.0
    waited_before: float = 0.0
    warned: bool = False

    def restart(self, ahead: Ahead) -> None:
        """Starts to measure speed anew, so that the time of an evaluation does not count."""
        self.began, self.rows, self.waited_before = time.perf_counter(), 0, ahead.waited

    def warn_of_slow_input(self, ahead: Ahead) -> None:
        """Says once where steps wait for their batches."""
        seconds = time.perf_counter() - self.began
        share = (ahead.waited - self.waited_before) / max(seconds, 1e-9)
        if not self.warned and seconds > SETTLED_SECONDS and share > SLOW_INPUT:
            self.warned = True
            logger.warning(
                "steps wait for data %.0f %% of the time: the input is the bottleneck; give the process more CPU cores,"
                " or a larger batch_size",
                100 * share,
            )
