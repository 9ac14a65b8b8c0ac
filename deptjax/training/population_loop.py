"""The loop of a population: one step moves all members; each has its own batches, log, evaluations and best prompt."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from deptjax.checkpoint import Checkpoints, disk_errors
from deptjax.distributed import first_host
from deptjax.errors import UserError
from deptjax.inference.evaluator import Evaluator
from deptjax.sharding import Placement
from deptjax.training.ahead import Ahead
from deptjax.training.config import TrainConfig
from deptjax.training.folder import RunFolder
from deptjax.training.loop import QUIET_SECONDS, due, make_bar
from deptjax.training.members import survivors
from deptjax.training.signals import StopSignals
from deptjax.training.state import TrainState
from deptjax.training.step import Traits
from deptjax.training.tuning import Tuning, padded_labels
from deptjax.typing import Tree

Batch = dict[str, np.ndarray]


@dataclasses.dataclass
class MemberProgress:
    """What a checkpoint keeps of one member. `ended` is empty while it trains, `step` the last that changed it."""

    ended: str = ""
    step: int = 0
    best_step: int = 0
    best_score: float | None = None
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    unlogged: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class PopulationProgress:
    """What a checkpoint keeps beside the stacked states.

    `data` is where each stream of batches stands, `slots` the member at each place of the stack.
    """

    data: list[Any]
    slots: list[int]
    members: list[MemberProgress]

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> PopulationProgress:
        """Returns what `dataclasses.asdict` was written of."""
        members = [MemberProgress(**own) for own in saved["members"]]
        return cls(saved["data"], [int(slot) for slot in saved["slots"]], members)


@dataclasses.dataclass(frozen=True)
class PopulationOutcome:
    """How the loop ended; `seconds_per_step` is the median of a step's time over the members that it trained."""

    progress: PopulationProgress
    finished: bool
    step: int
    signal: int | None
    seconds_per_step: float | None


@dataclasses.dataclass
class PopulationLoop:
    """The loop of a population and what it works on.

    Attributes:
      config: what all members have in common.
      tunings: of each member.
      folders: of each member.
      checkpoints: of the population.
      step_fn: `step(states, frozen, batches, traits) -> (states, metrics)`.
      frozen: the frozen tree.
      streams: iterators over batches, with `get_state`.
      stream_of: for each member, which of the streams is its own.
      evaluators: of each member, `None` for one that is not evaluated.
      placement: the devices.
      rungs: the steps at which the worse members are cut.
      factor: the share of members that go on is one in so many.
      report: called whenever something is decided, with the progress: writes the table.
      bar: whether to draw a progress bar; `None` draws one on a terminal.
    """

    config: TrainConfig
    tunings: Sequence[Tuning]
    folders: Sequence[RunFolder]
    checkpoints: Checkpoints
    step_fn: Callable[[TrainState, Tree, Any, Traits], tuple[TrainState, dict[str, jax.Array]]]
    frozen: Tree
    streams: Sequence[Iterator[Batch]]
    stream_of: Sequence[int]
    evaluators: Sequence[Evaluator | None]
    placement: Placement
    rungs: tuple[int, ...]
    factor: int
    report: Callable[[PopulationProgress], None]
    bar: bool | None = None

    def run(self, states: TrainState, progress: PopulationProgress) -> PopulationOutcome:
        """Trains until the last step or a signal, then saves; ends early when no member is left that could go on.

        Raises `UserError` when no member has left a prompt.
        """
        config = self.config
        done = int(states.step) // config.accumulate
        for folder in self.folders:
            folder.open_logs(done)
        seconds: list[float] = []
        ahead = Ahead(_StackedBatches(self.streams, self.stream_of, progress, self.tunings[0].read), self._put)
        try:
            with StopSignals(self._saved) as signals, make_bar(self.config.steps, done, self.bar) as bar:
                spoke = time.perf_counter()
                traits = self._traits(progress)
                pending: tuple[int, list[Any]] | None = None
                while done < config.steps and self._alive(progress) and not signals.stop_before(done, ahead.ready):
                    began = time.perf_counter()
                    states, traits, metrics = self._step(states, traits, ahead)
                    done += 1
                    self._settle(pending, progress, bar)
                    pending = (done, metrics)
                    evaluate = due(done, config.eval_every) or done == config.steps or done in self.rungs
                    # Behind a cut the stack is smaller, and so are its batches.
                    if done < config.steps and signals.received is None and done not in self.rungs:
                        ahead.fetch()
                    if evaluate or due(done, config.checkpoint_every):
                        self._settle(pending, progress, bar)
                        pending = None
                    seconds.append((time.perf_counter() - began) / max(self._alive(progress), 1))
                    spoke = self._speak(bar, done, progress, spoke)
                    if evaluate and any(self.evaluators):
                        self._evaluate(states, done, progress, bar)
                        if done in self.rungs and self._alive(progress):
                            states = self._cut(states, done, progress, bar)
                            traits = self._traits(progress)
                        self.report(progress)
                    if due(done, config.checkpoint_every):
                        self._checkpoint(states, progress, ahead)
                self._settle(pending, progress, bar)
            finished = done == config.steps or not self._alive(progress)
            if finished:
                self._finish(states, progress)
            self._checkpoint(states, progress, ahead)
            self.checkpoints.wait()
        finally:
            for folder in self.folders:
                folder.close_logs()
        stopped_by = None if finished else signals.received
        median = statistics.median(seconds) if seconds else None
        return PopulationOutcome(progress, finished, done, stopped_by, median)

    def _put(self, batch: Batch) -> dict[str, jax.Array]:
        return self.placement.put_batch(batch, axis=1)

    def _step(self, states: TrainState, traits: Traits, ahead: Ahead) -> tuple[TrainState, Traits, list[Any]]:
        """Gives a step to the devices; returns its states, the traits of the next, and the metrics of each batch.

        A member that was not finite is not alive in the next step, though nobody has read its metrics yet.
        """
        metrics = []
        for _ in range(self.config.accumulate):
            states, found = self.step_fn(states, self.frozen, ahead.take(), traits)
            traits = traits._replace(alive=found["finite"])
            metrics.append(found)
        return states, traits, metrics

    def _settle(self, sent: tuple[int, list[Any]] | None, progress: PopulationProgress, bar: tqdm) -> None:
        """Reads the metrics of a step, (K,) each, waiting for it, and reports them."""
        if sent is None:
            return
        step, metrics = sent[0], jax.device_get(sent[1])
        bar.update()
        if self._take(metrics, step, progress):
            self.report(progress)
        self._log(step, metrics, progress)

    def _traits(self, progress: PopulationProgress) -> Traits:
        """Returns what tells the members in the stack apart."""
        tunings = [self.tunings[member] for member in progress.slots]
        labels = [tuning.label_tokens for tuning in tunings]
        known = [tokens for tokens in labels if tokens is not None]
        tokens, real = padded_labels(known) if known else (None, None)
        peaks = {name: jnp.asarray([t.rates[name] for t in tunings], jnp.float32) for name in tunings[0].rates}
        alive = jnp.asarray([not progress.members[member].ended for member in progress.slots])
        traits: Traits = self.placement.put(Traits(peaks, tokens, real, alive))
        return traits

    def _take(self, metrics: list[Any], done: int, progress: PopulationProgress) -> bool:
        """Keeps the losses of a step; returns whether a member has diverged."""
        changed = False
        for slot, number in enumerate(progress.slots):
            member = progress.members[number]
            if member.ended:
                continue
            if all(bool(found["finite"][slot]) for found in metrics):
                member.step = done
                member.unlogged.append(sum(float(found["loss"][slot]) for found in metrics) / len(metrics))
            else:
                member.ended, changed = "diverged", True
        return changed

    def _log(self, done: int, metrics: list[Any], progress: PopulationProgress) -> None:
        if not (due(done, self.config.log_every) or done == self.config.steps):
            return
        for slot, number in enumerate(progress.slots):
            member, tuning = progress.members[number], self.tunings[number]
            if member.ended or not member.unlogged:
                continue
            values = {
                "loss": sum(member.unlogged) / len(member.unlogged),
                "grad_norm": float(metrics[-1]["grad_norm"][slot]),
                **{f"lr/{name}": float(rate(done - 1)) for name, rate in tuning.schedules.items()},
            }
            member.unlogged = []
            self.folders[number].log(done, values)

    def _evaluate(self, states: TrainState, done: int, progress: PopulationProgress, bar: tqdm) -> None:
        bar.set_description("evaluating")
        for slot, number in enumerate(progress.slots):
            member = progress.members[number]
            evaluator = self.evaluators[number]
            if member.ended or evaluator is None:
                continue
            trainable = member_of(states.trainable, slot)
            metrics = self.tunings[number].evaluate(evaluator, trainable, self.frozen)
            score = next(iter(metrics.values()))
            if not math.isnan(score) and (member.best_score is None or score > member.best_score):
                member.best_step, member.best_score, member.best_metrics = done, score, metrics
                self._save_prompt(number, trainable, metrics)
            self.folders[number].log(done, metrics)
        bar.set_description("training")
        scores = [(m.best_score, -number) for number, m in enumerate(progress.members) if m.best_score is not None]
        if scores and self.bar is not False:
            number = -max(scores)[1]
            metrics = progress.members[number].best_metrics
            told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            name = self.tunings[number].task.name
            bar.write(f"step {done}: the best of {self._alive(progress)} members on {name}: {told}", file=sys.stderr)

    def _cut(self, states: TrainState, done: int, progress: PopulationProgress, bar: tqdm) -> TrainState:
        """Returns the states of the members that go on: the better part of each task's."""
        kept: list[int] = []
        for task in dict.fromkeys(self.tunings[number].task.name for number in progress.slots):
            own = [n for n in progress.slots if self.tunings[n].task.name == task and not progress.members[n].ended]
            best = survivors([progress.members[number].best_score for number in own], self.factor) if own else []
            kept += [own[i] for i in best]
        for number in progress.slots:
            if number not in kept and not progress.members[number].ended:
                progress.members[number].ended = "cut"
        slots = [slot for slot, number in enumerate(progress.slots) if number in kept]
        progress.slots = [progress.slots[slot] for slot in slots]
        if self.bar is not False:
            bar.write(f"step {done}: {len(progress.slots)} members go on", file=sys.stderr)
        return stack_where(states, slots)

    def _finish(self, states: TrainState, progress: PopulationProgress) -> None:
        for slot, number in enumerate(progress.slots):
            member = progress.members[number]
            if member.ended:
                continue
            member.ended = "finished"
            if self.evaluators[number] is None:
                member.best_step = member.step
                self._save_prompt(number, member_of(states.trainable, slot), {})
        if not any(member.best_step for member in progress.members):  # no prompt was kept
            lost = all(member.ended == "diverged" for member in progress.members)
            last = max(member.step for member in progress.members) + 1
            told = f"the loss of every member is not a finite number, of the last one at step {last}"
            raise UserError(
                f"{told if lost else 'no evaluation gave finite numbers'}, so there is no prompt to keep; lower the "
                "learning rates and use a new workdir"
            )

    def _save_prompt(self, number: int, trainable: Tree, metrics: dict[str, float]) -> None:
        prompt = self.tunings[number].prompt(trainable, metrics)  # gathered from all hosts
        if first_host():
            with disk_errors(self.folders[number].prompt):
                prompt.save(self.folders[number].prompt)

    def _saved(self) -> int | None:
        saved = self.checkpoints.on_disk()
        return None if saved is None else saved // self.config.accumulate

    def _checkpoint(self, states: TrainState, progress: PopulationProgress, ahead: Ahead) -> None:
        progress.data = ahead.get_state()
        self.checkpoints.save(states, dataclasses.asdict(progress))

    def _speak(self, bar: tqdm, done: int, progress: PopulationProgress, spoke: float) -> float:
        shown = {"members": str(self._alive(progress))}
        scores = [member.best_score for member in progress.members if member.best_score is not None]
        if scores:
            shown["best"] = f"{max(scores):.3f}"
        bar.set_postfix(shown, refresh=False)
        if bar.disable and self.bar is not False and time.perf_counter() - spoke > QUIET_SECONDS:
            print(f"step {done}/{self.config.steps} {', '.join(f'{k} {v}' for k, v in shown.items())}", file=sys.stderr)
            return time.perf_counter()
        return spoke

    def _alive(self, progress: PopulationProgress) -> int:
        return sum(not progress.members[number].ended for number in progress.slots)


@dataclasses.dataclass
class _StackedBatches(Iterator[Batch]):
    """The batches of the members at the places of the stack, one of each a time; its state is that of all streams."""

    streams: Sequence[Iterator[Batch]]
    stream_of: Sequence[int]
    progress: PopulationProgress
    read: Callable[[Batch], Batch]

    def __next__(self) -> Batch:
        wanted = {self.stream_of[member] for member in self.progress.slots}
        drawn = {stream: self.read(next(self.streams[stream])) for stream in sorted(wanted)}
        return stack_batches([drawn[self.stream_of[member]] for member in self.progress.slots])

    def get_state(self) -> list[Any]:
        """Returns where each stream stands."""
        return [stream.get_state() for stream in self.streams]  # type: ignore[attr-defined]


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Returns K batches as one of arrays (K, B, ...), padded on the right to the longest of them."""
    stacked = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if values[0].ndim == 2:
            width = max(value.shape[1] for value in values)
            values = [np.pad(value, ((0, 0), (0, width - value.shape[1]))) for value in values]
        stacked[name] = np.stack(values)
    return stacked


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """Returns the states of members that are at the same step as one: a leading axis of members, the step apart."""
    parts = [(state.trainable, state.opt_state, state.key) for state in states]
    return TrainState(jnp.copy(states[0].step), *jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


def stack_where(states: TrainState, slots: Sequence[int]) -> TrainState:
    """Returns the stack of the members at some of its places."""
    places = np.asarray(slots)
    parts = (states.trainable, states.opt_state, states.key)
    return TrainState(states.step, *jax.tree.map(lambda leaf: leaf[places], parts))


def member_of(stacked: Tree, slot: int) -> Tree:
    """Returns one member's part of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[slot], stacked)
