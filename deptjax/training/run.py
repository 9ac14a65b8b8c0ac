"""`train`: one method, one backbone, one task, one folder. Run it again to resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deptjax.checkpoint import Checkpoints, disk_errors
from deptjax.data.tasks import Task, get_task
from deptjax.distributed import first_host, on_first_host, together
from deptjax.errors import UserError
from deptjax.inference.text_encoder import encoder_of
from deptjax.memory import PeakMemory
from deptjax.methods.base import Method
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt
from deptjax.sharding import Placement
from deptjax.training.config import TrainConfig
from deptjax.training.folder import RunFolder, write_json
from deptjax.training.loop import Loop, Outcome, Progress
from deptjax.training.state import TrainState, count_trained
from deptjax.training.step import make_loss, make_train_step
from deptjax.training.tuning import Tuning
from deptjax.typing import Tree


@dataclasses.dataclass(frozen=True)
class Run:
    """What `train` returns.

    Attributes:
      prompt: the best prompt on the dev split (the last one where there is no dev split), with its metrics.
      workdir: the run's folder.
      finished: false when a signal stopped the run before its last step; calling `train` again goes on.
      step: the updates done so far.
      signal: the number of the signal that stopped the run, `None` when it is finished.
      trainable_parameters: how many numbers were tuned.
      seconds_per_step: median, or `None` when no step was taken.
      peak_mib: peak memory while training (see `PeakMemory`).
    """

    prompt: Prompt | None
    workdir: pathlib.Path
    finished: bool
    step: int
    signal: int | None
    trainable_parameters: int
    seconds_per_step: float | None
    peak_mib: float


def check_given(backbone: Backbone, method: Method) -> None:
    """Raises `UserError` for what is no loaded backbone and no method, such as their names."""
    if not isinstance(backbone, Backbone):
        raise UserError(f"backbone is a {type(backbone).__name__}; load one first: load_backbone('t5-base')")
    if not isinstance(method, Method):
        raise UserError(f"method is a {type(method).__name__}; give one with its sizes: DePT(prompt_length=20)")


@together()
def train(
    backbone: Backbone,
    method: Method,
    task: Task | str,
    workdir: str | os.PathLike[str],
    *,
    progress: bool | None = None,
    placement: Placement | None = None,
    notes: Mapping[str, str] | None = None,
    encoder: Backbone | None = None,
    **settings: Any,
) -> Run:
    """Tunes `method` on `backbone` for `task`, and keeps everything in `workdir`.

    Calling it again with the same arguments resumes an interrupted run, and ends with the prompt, bit for bit on one
    machine, of a run that was never interrupted. A finished run is returned as it is.

    Args:
      backbone: from `load_backbone`.
      method: such as `DePT(prompt_length=20)`; open fields are filled in from the backbone.
      task: a `Task`, or the name of a registered one.
      workdir: a folder of this run's own.
      progress: whether to draw a progress bar; `None` draws one on a terminal, `False` prints nothing at all.
      placement: the devices; by default those that the backbone lies on.
      notes: texts to put into the folder of a new run, by file name.
      encoder: a loaded encoder for a method that has one, in place of the one that it names.
      **settings: the fields of `TrainConfig`.

    Raises:
      UserError: for data, settings or a folder that cannot be used; for a loss that is not finite.
    """
    check_given(backbone, method)
    config = TrainConfig.from_settings(settings)
    progress = progress if first_host() else False
    placement = placement or backbone.placement or Placement.over(config=backbone.config)
    placement.check_batch_size(config.batch_size)
    announce(placement, progress)
    reader = encoder_of(method, backbone, encoder)
    tuning = Tuning.prepare(backbone, method, get_task(task) if isinstance(task, str) else task, config, encoder=reader)
    trainable, frozen, step_key = tuning.start()
    groups = tuning.model.method.groups(trainable)
    tx, trained = tuning.optimizer(groups), count_trained(trainable, groups)
    # A copy, because a step reuses the memory of its state, and full fine-tuning starts from the backbone's own arrays.
    state = TrainState.create(jax.tree.map(jnp.copy, trainable), tx, step_key)
    state = placement.put(state, placement.of_trainable(state, tuning.model.method.axes))
    frozen = placement.put(frozen, placement.of_backbone(frozen))
    evaluator = tuning.evaluator(placement)

    def evaluate(trainable: Tree) -> dict[str, float]:
        return tuning.evaluate(evaluator, trainable, frozen)

    loss = make_loss(tuning.model, tuning.label_tokens, dropout=config.dropout)
    step_fn = make_train_step(loss, tx, placement, tuning.model.method.axes)
    batches = tuning.batches(tuning.buckets, placement)

    def make_loop(folder: RunFolder, checkpoints: Checkpoints) -> Loop:
        def save_prompt(trainable: Tree, metrics: dict[str, float]) -> None:
            prompt = tuning.prompt(trainable, metrics)  # gathered from all hosts
            if first_host():
                with disk_errors(folder.prompt):
                    prompt.save(folder.prompt)

        return Loop(
            config=config,
            folder=folder,
            checkpoints=checkpoints,
            step_fn=step_fn,
            frozen=frozen,
            batches=batches,
            put_batch=lambda batch: placement.put_batch(tuning.read(batch)),
            rates=tuning.schedules,
            evaluate=evaluate if tuning.encoded.dev and config.eval_every else None,
            save_prompt=save_prompt,
            bar=progress,
        )

    return carry_out(make_loop, state, trained, placement, workdir, tuning.identity(), notes)


def carry_out(
    make_loop: Callable[[RunFolder, Checkpoints], Loop],
    state: TrainState,
    trained: int,
    placement: Placement,
    workdir: str | os.PathLike[str],
    identity: dict[str, Any],
    notes: Mapping[str, str] | None = None,
) -> Run:
    """Starts a run in its folder, or goes on with it, and returns how it ended. Raises `UserError` as `train` does.

    `make_loop` is given the run's folder and its checkpoints, and must not fail; `state` is where a new run starts,
    and `trained` how many numbers it tunes.
    """
    with contextlib.ExitStack() as stack:
        # Only now is a file written: what cannot be trained leaves no folder behind.
        folder = RunFolder(workdir, identity, notes)
        stack.callback(folder.close)
        checkpoints = Checkpoints(folder.checkpoints)
        stack.callback(checkpoints.close)
        loop = make_loop(folder, checkpoints)
        so_far = Progress(data=loop.batches.get_state())
        if checkpoints.latest is not None:
            state, saved = checkpoints.restore(state)
            so_far = Progress(**saved)
            loop.batches.set_state(so_far.data)
        elif folder.result.exists():  # of a population's member, or of a run whose checkpoints were removed
            return _finish(folder, _ended(folder, state, so_far, loop.config.steps), trained, 0.0)
        so_far.move(str(placement), told=loop.bar is not False)
        with PeakMemory() as peak:
            outcome = loop.run(state, so_far)
        return _finish(folder, outcome, trained, peak.mib)


def announce(placement: Placement, progress: bool | None) -> None:
    """Says, where there is more than one device, how the run is laid out over them."""
    if placement.mesh.size > 1 and progress is not False and first_host():
        hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        print(f"mesh {placement} ({placement.mesh.size} devices{hosts})", file=sys.stderr)


def _ended(folder: RunFolder, state: TrainState, progress: Progress, steps: int) -> Outcome:
    """Returns how a run without checkpoints ended. Raises `UserError` for a member that did not go to the end."""
    ended = json.loads(folder.result.read_text()).get("ended", "finished")
    if ended != "finished":
        raise UserError(
            f"{folder.path} holds a member of a population that ended early ({ended}); choose another workdir"
        )
    return Outcome(state, progress, finished=True, step=steps, signal=None, seconds_per_step=None)


def _finish(folder: RunFolder, outcome: Outcome, parameters: int, peak_mib: float) -> Run:
    result: dict[str, Any] = {
        "best_step": outcome.progress.best_step,
        "metrics": outcome.progress.best_metrics,
        "trainable_parameters": parameters,
        "seconds_per_step": outcome.seconds_per_step,
        "peak_mib": peak_mib,
    }

    def kept() -> dict[str, Any]:
        if outcome.finished and outcome.seconds_per_step is None and folder.result.exists():
            return dict(json.loads(folder.result.read_text()))  # the run had ended before: this call took no step
        if outcome.finished:
            with disk_errors(folder.result):
                write_json(folder.result, result)
        return result

    result = on_first_host(kept)  # and by then the first host has written the prompt
    prompt = Prompt.load(folder.prompt) if folder.prompt.exists() else None
    return Run(
        prompt=prompt,
        workdir=folder.path,
        finished=outcome.finished,
        step=outcome.step,
        signal=outcome.signal,
        trainable_parameters=parameters,
        seconds_per_step=result["seconds_per_step"],
        peak_mib=result["peak_mib"],
    )
