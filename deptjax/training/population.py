"""`train_population`: many runs of one method against one frozen backbone, in one compiled step.

DePT has two learning rates to find, and its authors name the search as its cost. The members of a population differ in
learning rates, seeds, first values or tasks; their parameters and optimiser states are stacked, and a step moves all of
them: the backbone's weights are read once, and the program is compiled once. Each member ends where it would have ended
alone, up to the rounding of float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deptjax.checkpoint import Checkpoints, disk_errors
from deptjax.data.buckets import choose_buckets
from deptjax.data.tasks import Task
from deptjax.distributed import first_host, on_first_host, together
from deptjax.errors import UserError
from deptjax.inference.text_encoder import TextEncoder, encoder_of
from deptjax.memory import PeakMemory
from deptjax.methods.base import Method
from deptjax.methods.room import kind_of
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt
from deptjax.sharding import Placement
from deptjax.training.config import TrainConfig
from deptjax.training.folder import RunFolder, write_json, write_text
from deptjax.training.members import Member, MemberResult, make_members, markdown_table, rungs, winners
from deptjax.training.population_loop import (
    MemberProgress,
    PopulationLoop,
    PopulationOutcome,
    PopulationProgress,
    stack_states,
    stack_where,
)
from deptjax.training.run import announce, check_given
from deptjax.training.state import TrainState, count_trained
from deptjax.training.step import make_population_step
from deptjax.training.tuning import EncodedTask, Tuning, encode_task


@dataclasses.dataclass(frozen=True)
class Population:
    """What `train_population` returns.

    Attributes:
      workdir: the population's folder; `members/NAME` in it is a member's, `members.json` and `members.md` the table.
      members: how each one ended, in the order given.
      prompts: the best prompt of each task, by the task's name.
      finished: false when a signal stopped the run before its last step; the same call again goes on.
      step: the updates done so far.
      signal: the number of the signal that stopped the run, `None` when it is finished.
      trainable_parameters: how many numbers one member tunes.
      seconds_per_step: median of the time of a step, divided by the members it trained; `None` when none was taken.
      peak_mib: peak memory while training (see `PeakMemory`).
    """

    workdir: pathlib.Path
    members: tuple[MemberResult, ...]
    prompts: dict[str, Prompt]
    finished: bool
    step: int
    signal: int | None
    trainable_parameters: int
    seconds_per_step: float | None
    peak_mib: float

    def place(self, task: str) -> pathlib.Path:
        """Returns the folder of the best prompt of a task: `prompt`, and with several tasks `prompts/TASK`."""
        return _place(self.workdir, self.members, task)


@together()
def train_population(
    backbone: Backbone,
    method: Method,
    task: Task | str | None,
    workdir: str | os.PathLike[str],
    members: Sequence[Mapping[str, Any]],
    *,
    halving: int = 0,
    folders: Sequence[str | os.PathLike[str]] | None = None,
    progress: bool | None = None,
    placement: Placement | None = None,
    notes: Mapping[str, str] | None = None,
    encoder: Backbone | None = None,
    **settings: Any,
) -> Population:
    """Tunes all `members` at once, each into a run's folder of its own, and keeps the best prompt of each task.

    The best on the dev split is in `workdir/prompt`; with several tasks, each task's is in `workdir/prompts/TASK`. A
    task without dev rows has no best, unless it has one member only. A member whose loss is not finite ends there, and
    the others go on. Calling it again with the same arguments resumes.

    A member's batches are those it would have alone, padded to the longest of all members'. With a backbone's dropout
    on, that changes which numbers are dropped wherever the padded lengths differ; for members of one task with labels,
    `buckets=1` keeps them equal.

    Args:
      backbone: from `load_backbone`.
      method: of all members.
      task: of the members that vary none.
      workdir: a folder of this population's own.
      members: for each member what is its own (`grid` makes all combinations): `task`; `seed`, `prompt_lr`,
        `low_rank_lr`, `backbone_lr`; fields of the method that say how it starts, such as `prompt_init`.
      halving: a factor of 2 or more cuts the members by it at each of some steps (successive halving, by the best dev
        score so far), until one of each task goes on; 0 trains all to the end. At these steps members are evaluated,
        besides `eval_every`.
      folders: the members' folders, in their order; by default below `workdir`.
      progress: whether to draw a progress bar; `None` draws one on a terminal, `False` prints nothing at all.
      placement: the devices; by default all there are.
      notes: texts to put into the folder of a new population, by file name.
      encoder: as `train` takes it.
      **settings: the fields of `TrainConfig`, for all members.

    Raises:
      UserError: for members that cannot be stacked, and all that `train` refuses; when no member leaves a prompt.
    """
    check_given(backbone, method)
    config = TrainConfig.from_settings(settings)
    progress = progress if first_host() else False
    placement = placement or backbone.placement or Placement.over(config=backbone.config)
    placement.check_batch_size(config.batch_size)
    announce(placement, progress)
    if halving < 0 or halving == 1:
        raise UserError(f"halving is {halving}; it must be 2 or more, or 0 to train every member to the end")
    chosen = make_members(method, task, members, settings)
    tunings = _tunings(backbone, chosen, encoder)
    first = tunings[0]
    evaluated = [bool(config.eval_every and tuning.encoded.dev) for tuning in tunings]
    if halving and not all(evaluated):
        raise UserError("halving compares members on the dev split; give eval_every and tasks with dev rows")

    starts = [tuning.start() for tuning in tunings]
    trainable, frozen = starts[0][0], placement.put(starts[0][1], placement.of_backbone(starts[0][1]))
    axes, groups = first.model.method.axes, first.model.method.groups(trainable)
    tx = first.optimizer(groups)
    stacked = stack_states([TrainState.create(own, tx, key) for own, _, key in starts])
    streams, stream_of = _streams(tunings, placement)
    evaluators = {id(tuning.encoded): tuning.evaluator(placement) for tuning in tunings}
    most = max(sum(other.task.name == tuning.task.name for other in tunings) for tuning in tunings)

    def placed(states: TrainState) -> TrainState:
        return placement.put(states, placement.of_trainable(states, axes, members=True))

    with contextlib.ExitStack() as stack:
        own_folder = RunFolder(workdir, _identity(chosen, tunings, halving), notes)
        stack.callback(own_folder.close)
        paths = [own_folder.path / "members" / member.name for member in chosen] if folders is None else folders
        member_folders = [RunFolder(path, t.identity()) for path, t in zip(paths, tunings, strict=True)]
        for folder in member_folders:
            stack.callback(folder.close)
        checkpoints = Checkpoints(own_folder.checkpoints)
        stack.callback(checkpoints.close)
        so_far = PopulationProgress([], list(range(len(chosen))), [MemberProgress() for _ in chosen])
        if checkpoints.latest is not None:
            so_far = PopulationProgress.from_json(checkpoints.progress())
            stacked, _ = checkpoints.restore(placed(stack_where(stacked, so_far.slots)))
            for stream, saved in zip(streams, so_far.data, strict=True):
                stream.set_state(saved)  # type: ignore[attr-defined]
        loop = PopulationLoop(
            config=config,
            tunings=tunings,
            folders=member_folders,
            checkpoints=checkpoints,
            step_fn=make_population_step(
                first.model,
                lambda peaks: first.optimizer(groups, peaks),
                dropout=config.dropout,
                placement=placement,
            ),
            frozen=frozen,
            streams=streams,
            stream_of=stream_of,
            evaluators=[evaluators[id(t.encoded)] if own else None for t, own in zip(tunings, evaluated, strict=True)],
            placement=placement,
            rungs=rungs(config.steps, most, halving),
            factor=halving,
            report=lambda now: _write_table(own_folder, _results(chosen, now)),
            bar=progress,
        )
        with PeakMemory() as peak:
            outcome = loop.run(placed(stacked), so_far)
        parameters = count_trained(trainable, groups)
        return _finish(own_folder, member_folders, chosen, outcome, parameters, peak.mib)


def _tunings(backbone: Backbone, members: Sequence[Member], encoder: Backbone | None) -> list[Tuning]:
    """Returns the members' tunings, the rows of each task read once. Raises `UserError` for what cannot be stacked."""
    encoded: dict[Any, EncodedTask] = {}
    encoders: dict[Any, TextEncoder | None] = {}
    tunings: list[Tuning] = []
    for member in members:
        config = TrainConfig.from_settings(member.settings)
        method = member.method.resolve(backbone.width)
        choice = method.encoder_choice()
        if choice not in encoders:
            encoders[choice] = encoder_of(member.method, backbone, encoder)
        key = (id(member.task), method.source_limit(), choice)
        if key not in encoded:
            encoded[key] = encode_task(backbone, method, member.task, config, encoders[choice])
        tunings.append(Tuning.prepare(backbone, method, member.task, config, encoded[key], encoders[choice]))
        _check_alike(tunings[0], members[0], tunings[-1], member)
    return tunings


def _check_alike(first: Tuning, first_member: Member, tuning: Tuning, member: Member) -> None:
    """Raises `UserError` naming what two members must have in common."""
    ours, theirs = first.model.method, tuning.model.method
    fields = (*ours.sizes, *ours.in_training)
    apart = [name for name in fields if getattr(ours, name) != getattr(theirs, name, None)]
    if apart and type(ours) is type(theirs):
        told = f"{apart[0]} {getattr(theirs, apart[0])}, not {getattr(ours, apart[0])}"
    elif kind_of(ours) != kind_of(theirs) or ours.scales() != theirs.scales():
        told = "a method that computes something else"
    elif (first.label_tokens is None) != (tuning.label_tokens is None):
        raise UserError(
            f"the loss of task '{first.task.name}' and that of '{tuning.task.name}' differ: one is over the labels' "
            "tokens, one over the vocabulary; set loss to vocabulary for all"
        )
    else:
        return
    raise UserError(
        f"member '{member.name}' has {told}, as '{first_member.name}' has; members of one population share the sizes "
        "of their parameters and the formula, so train it apart"
    )


def _streams(tunings: Sequence[Tuning], placement: Placement) -> tuple[list[Iterator[Any]], list[int]]:
    """Returns the streams of batches, and which one is each member's: equal tasks and seeds have one in common."""
    lengths = {id(t.encoded): [len(example.source) for example in t.encoded.examples] for t in tunings}
    longest = max(tuning.encoded.preprocessor.max_length for tuning in tunings)
    common = [length for own in lengths.values() for length in own]
    buckets = choose_buckets(common, tunings[0].config.buckets, max_length=longest)
    found: dict[Any, int] = {}
    streams: list[Iterator[Any]] = []
    for tuning in tunings:
        key = (id(tuning.encoded), tuning.config.seed)
        if key not in found:
            found[key] = len(streams)
            streams.append(tuning.batches(buckets, placement, num_threads=1))
    return streams, [found[id(tuning.encoded), tuning.config.seed] for tuning in tunings]


def _identity(members: Sequence[Member], tunings: Sequence[Tuning], halving: int) -> dict[str, Any]:
    return {
        "population": {m.name: t.identity() for m, t in zip(members, tunings, strict=True)},
        "halving": halving,
    }


def _results(members: Sequence[Member], progress: PopulationProgress) -> list[MemberResult]:
    return [
        MemberResult(m.name, m.task.name, m.varied, own.ended, own.step, own.best_step, own.best_metrics)
        for m, own in zip(members, progress.members, strict=True)
    ]


def _write_table(folder: RunFolder, results: Sequence[MemberResult]) -> None:
    if first_host():
        with disk_errors(folder.path):
            write_json(folder.path / "members.json", [dataclasses.asdict(result) for result in results])
            write_text(folder.path / "members.md", markdown_table(results))


def _place(workdir: pathlib.Path, results: Sequence[MemberResult], task: str) -> pathlib.Path:
    """Returns the folder of a task's best prompt."""
    return workdir / "prompt" if len({result.task for result in results}) == 1 else workdir / "prompts" / task


def _finish(
    folder: RunFolder,
    member_folders: Sequence[RunFolder],
    members: Sequence[Member],
    outcome: PopulationOutcome,
    parameters: int,
    peak_mib: float,
) -> Population:
    results = _results(members, outcome.progress)
    best = winners(results)
    shared: dict[str, Any] = {
        "trainable_parameters": parameters,
        "seconds_per_step": outcome.seconds_per_step,
        "peak_mib": peak_mib,
    }

    def kept() -> dict[str, Any]:
        if outcome.finished and outcome.seconds_per_step is None and folder.result.exists():
            return {name: json.loads(folder.result.read_text())[name] for name in shared}  # it had ended before
        if not outcome.finished:
            return shared
        with disk_errors(folder.path):
            for own, result in zip(member_folders, results, strict=True):
                kept = {name: getattr(result, name) for name in ("best_step", "metrics", "ended", "step")}
                write_json(own.result, {**kept, **shared, "members": len(members)})
            for task, result in best.items():
                place = _place(folder.path, results, task)
                Prompt.load(member_folders[results.index(result)].prompt).save(place)
            _write_table(folder, results)
            write_json(folder.result, {"best": {task: result.name for task, result in best.items()}, **shared})
        return shared

    shared = on_first_host(kept)  # and by then the first host has written the prompts
    prompts: dict[str, Prompt] = {}
    for task, result in best.items():
        prompts[task] = Prompt.load(member_folders[results.index(result)].prompt)
    return Population(
        workdir=folder.path,
        members=tuple(results),
        prompts=prompts,
        finished=outcome.finished,
        step=outcome.step,
        signal=outcome.signal,
        trainable_parameters=parameters,
        seconds_per_step=shared["seconds_per_step"],
        peak_mib=shared["peak_mib"],
    )
