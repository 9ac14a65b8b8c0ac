"""`train_shared`: one prompt for many tasks, with a part of rank one for each, taught by a prompt of each task.

    P_k = P* o (u_k v_k^T)                                  of task k; `deptjax.methods.mpt`
    loss = CE(y, p_k) + d (KL(q_k || p_k) + mean (h_q - h_p)^2)

p and h_p are the probabilities and the last states at the target tokens behind P_k, q and h_q those behind the teacher,
a prompt that was tuned on the task alone. This is the source stage of MPT (Wang et al., ICLR 2023, arXiv 2303.02861).
What it leaves is P* with the mean of the tasks' u and v, which is where a run of `MPT` on a target task starts
(`start_from`). Batches come from the tasks in turn.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.checkpoint import Checkpoints, disk_errors
from deptjax.data.tasks import Task, get_task
from deptjax.distributed import first_host, together
from deptjax.errors import UserError
from deptjax.inference.prompt_bank import Source, usable_prompt
from deptjax.methods.base import FIXED
from deptjax.methods.mpt import MPT
from deptjax.methods.prompt_tuning import PromptTuning
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.prompt import Prompt
from deptjax.sharding import Placement, to_host
from deptjax.training.config import TrainConfig
from deptjax.training.folder import RunFolder, check_folder_name
from deptjax.training.loop import Loop
from deptjax.training.losses import target_loss
from deptjax.training.run import Run, announce, carry_out, check_given
from deptjax.training.state import TrainState, count_trained
from deptjax.training.step import LossFn, make_train_step
from deptjax.training.tuning import Tuning
from deptjax.typing import Array, Float, Tree

TEACHERS = "teachers"  # (K, M, D), beside the parameters that are trained


@together()
def train_shared(
    backbone: Backbone,
    tasks: Sequence[Task | str],
    teachers: Mapping[str, Source],
    workdir: str | os.PathLike[str],
    *,
    method: MPT | None = None,
    distill: float = 0.9,
    progress: bool | None = None,
    placement: Placement | None = None,
    **settings: Any,
) -> Run:
    """Tunes a prompt that tasks share, and keeps in `workdir/prompt` where a run of `MPT` on another task may start.

    Each task's own prompt, worked out, is in `workdir/prompts/TASK`. Calling it again with the same arguments resumes.
    The best is by the mean, over the tasks, of the metric that comes first. The loss is over the whole vocabulary.

    Args:
      backbone: from `load_backbone`.
      tasks: two or more, with different names.
      teachers: for the name of each task a soft prompt that was tuned on it, as long as the shared one.
      workdir: a folder of this run's own.
      method: an `MPT`; by default with the length of the teachers.
      distill: d, the weight of what the teachers say; 0.9 is the authors'.
      progress, placement: as `train` has them.
      **settings: the fields of `TrainConfig`; of steps, those over all tasks.

    Raises `UserError` for tasks without teachers, teachers of another length or backbone, and all that `train` refuses.
    """
    check_given(backbone, MPT() if method is None else method)
    if (asked := settings.get("loss", "vocabulary")) not in ("auto", "vocabulary"):
        raise UserError(f"loss is {asked!r}; what teachers say is of the whole vocabulary, so leave it out")
    config = TrainConfig.from_settings({**settings, "loss": "vocabulary"})
    progress = progress if first_host() else False
    placement = placement or backbone.placement or Placement.over(config=backbone.config)
    placement.check_batch_size(config.batch_size)
    announce(placement, progress)
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    if not (isinstance(distill, numbers.Real) and 0 <= distill < float("inf")):
        raise UserError(f"distill is {distill!r}; it must be 0 or more, and finite")
    prompts = _teachers(backbone, [task.name for task in chosen], teachers)
    method = MPT(prompt_length=len(prompts[0].trainable["input"]["prompt"])) if method is None else method
    tunings = [Tuning.prepare(backbone, method, task, config) for task in chosen]
    first = tunings[0]

    start, frozen, step_key = first.start()
    if not {"prompt", "u", "v"} <= set(start.get("input", {})):
        raise UserError(f"method is {type(method).__name__}; train_shared tunes an MPT, MPT(prompt_length=100), say")
    for task, prompt in zip(chosen, prompts, strict=True):
        length = len(prompt.trainable["input"]["prompt"])
        if length != method.prompt_length:
            raise UserError(
                f"teachers: that of '{task.name}' has {length} vectors, and the shared prompt (prompt_length)"
                f" {method.prompt_length}; tune teachers of one length"
            )
    trainable = _stacked(start, [prompt.trainable["input"]["prompt"] for prompt in prompts])
    groups = {"input": {**first.model.method.groups(start)["input"], TEACHERS: FIXED}}
    tx = first.optimizer(groups)
    state = TrainState.create(trainable, tx, step_key)
    state = placement.put(state, placement.of_trainable(state, {}))
    frozen = placement.put(frozen, placement.of_backbone(frozen))
    teacher = PromptedModel.build(backbone, PromptTuning(method.prompt_length), config.share_prompt)
    bare = [tuning.task.name for tuning in tunings if config.eval_every and not tuning.encoded.dev]
    if 0 < len(bare) < len(tunings):
        raise UserError(f"task '{bare[0]}' has no dev rows, and others have; give it some, or set eval_every to 0")
    evaluators = [tuning.evaluator(placement) for tuning in tunings]

    def evaluate(trainable: Tree) -> dict[str, float]:
        return _evaluated(tunings, evaluators, trainable, frozen)

    loss = make_shared_loss(first.model, teacher, distill, config.dropout)
    step_fn = make_train_step(loss, tx, placement, {})
    batches = InTurn([tuning.batches(tuning.buckets, placement) for tuning in tunings])
    identity = {
        "shared": [{tuning.task.name: tuning.identity()} for tuning in tunings],  # in turn, so their order counts
        "teachers": [prompt.with_run_id().run_id for prompt in prompts],
        "distill": distill,
    }

    def make_loop(folder: RunFolder, checkpoints: Checkpoints) -> Loop:
        return Loop(
            config=config,
            folder=folder,
            checkpoints=checkpoints,
            step_fn=step_fn,
            frozen=frozen,
            batches=batches,
            put_batch=placement.put_batch,
            rates=first.schedules,
            evaluate=evaluate if config.eval_every and all(tuning.encoded.dev for tuning in tunings) else None,
            save_prompt=lambda trainable, metrics: _save(folder, tunings, to_host(trainable), metrics),
            bar=progress,
        )

    return carry_out(make_loop, state, count_trained(trainable, groups), placement, workdir, identity)


def _teachers(backbone: Backbone, names: Sequence[str], teachers: Mapping[str, Source]) -> list[Prompt]:
    """Returns the teacher of each task. Raises `UserError` for names that do not fit together, or what is no prompt."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"tasks are {', '.join(names) or 'none'}; give two or more with different names")
    if set(teachers) != set(names):
        raise UserError(f"teachers are for {', '.join(teachers) or 'no task'}; give one for each of {', '.join(names)}")
    found = []
    for name in names:
        check_folder_name(name)
        try:
            where, prompt = usable_prompt(backbone, teachers[name], name)
        except UserError as error:
            raise UserError(f"teachers: {error}") from None
        if {name: list(tree) for name, tree in prompt.trainable.items()} != {"input": ["prompt"]}:
            raise UserError(
                f"teachers: {where} is of method '{prompt.method.kind}', and a teacher is a soft prompt and nothing"
                " else; tune it with prompt_tuning"
            )
        found.append(prompt)
    return found


def _stacked(start: Tree, teachers: Sequence[Array]) -> Tree:
    """Returns P* with a row of u and v for each teacher, and the teachers."""
    own, count = start["input"], len(teachers)
    rows = {name: jnp.repeat(own[name][None], count, axis=0) for name in ("u", "v")}
    taught = jnp.stack([jnp.asarray(vectors) for vectors in teachers])
    return {"input": {"prompt": jnp.copy(own["prompt"]), **rows, TEACHERS: taught}}


def of_task(trainable: Tree, task: Any) -> Tree:
    """Returns the parameters of `MPT` for a task, by its number, perhaps traced."""
    own = trainable["input"]
    return {"input": {"prompt": own["prompt"], "u": own["u"][task], "v": own["v"][task]}}


def distilled(
    logits: Float[Array, "B U V"],
    states: Float[Array, "B U D"],
    taught: Float[Array, "B U V"],
    teacher_states: Float[Array, "B U D"],
    counts: Float[Array, "B U"],
) -> Float[Array, ""]:
    """Returns KL(teacher || student) in nats plus the mean squared difference of the states, of the tokens that count.

    >>> same = jnp.ones((1, 2, 3))
    >>> float(distilled(same, same, same, same, jnp.ones((1, 2))))
    0.0
    """
    ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(taught)
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    apart = jnp.mean(jnp.square(states.astype(jnp.float32) - teacher_states.astype(jnp.float32)), axis=-1)
    return jnp.sum((divergence + apart) * counts) / jnp.maximum(jnp.sum(counts), 1.0)


def make_shared_loss(model: PromptedModel, teacher: PromptedModel, distill: float, dropout: bool) -> LossFn:
    """Returns `loss(trainable, frozen, batch, key)` of a batch of one task, whose number `batch["task"]` has."""

    def loss(trainable: Tree, frozen: Tree, batch: dict[str, Array], key: Any) -> Array:
        task = batch["task"][0]
        own, key = of_task(trainable, task), key if dropout else None
        states = model.target_states(own, frozen, batch, dropout_key=key)
        logits = model.head(own, frozen, states)
        value = target_loss(logits, batch["targets"], batch["target_mask"], batch["weight"])
        if not distill:
            return value
        prompt = {"input": {"prompt": jax.lax.stop_gradient(trainable["input"][TEACHERS][task])}}
        teacher_states = teacher.target_states(prompt, frozen, batch)
        taught = teacher.head(prompt, frozen, teacher_states)
        counts = batch["target_mask"] * batch["weight"][:, None]
        return value + distill * distilled(logits, states, taught, teacher_states, counts)

    return loss


class InTurn(Iterator[dict[str, Any]]):
    """The batches of several streams in turn, each with the number of its stream as `task`; it can be resumed."""

    def __init__(self, streams: Sequence[Iterator[Any]]) -> None:
        self._streams, self._drawn = streams, 0

    def __next__(self) -> dict[str, Any]:
        task = self._drawn % len(self._streams)
        batch = next(self._streams[task])
        self._drawn += 1
        return {**batch, "task": np.full(len(batch["label"]), task, np.int32)}

    def get_state(self) -> dict[str, Any]:
        """Returns where the streams stand."""
        return {"drawn": self._drawn, "streams": [stream.get_state() for stream in self._streams]}  # type: ignore[attr-defined]

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where the streams stood."""
        self._drawn = state["drawn"]
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.set_state(own)  # type: ignore[attr-defined]


def _evaluated(tunings: Sequence[Tuning], evaluators: Sequence[Any], trainable: Tree, frozen: Tree) -> dict[str, float]:
    """Returns the dev metrics of all tasks, and first the mean of those that come first."""
    found: dict[str, float] = {}
    firsts = []
    for number, (tuning, evaluator) in enumerate(zip(tunings, evaluators, strict=True)):
        scores = tuning.evaluate(evaluator, of_task(trainable, number), frozen)
        firsts.append(next(iter(scores.values())))
        found.update({f"dev/{tuning.task.name}/{name.removeprefix('dev/')}": score for name, score in scores.items()})
    return {"dev/mean": sum(firsts) / len(firsts), **found}


def _save(folder: RunFolder, tunings: Sequence[Tuning], trainable: Tree, metrics: dict[str, float]) -> None:
    """Writes the shared prompt with the mean of u and v, and each task's own prompt."""
    own, first = trainable["input"], tunings[0]
    mean = {"input": {"prompt": own["prompt"], **{name: np.mean(own[name], axis=0) for name in ("u", "v")}}}
    shared = Prompt(
        method=first.model.method,
        trainable=mean,
        backbone=first.backbone.name,
        fingerprint=first.backbone.fingerprint,
        task={},
        metrics=dict(metrics),
        settings={"shared": True},
    )
    prompts = {folder.prompt: shared}
    for number, tuning in enumerate(tunings):
        scores = {
            f"dev/{name.rpartition('/')[2]}": score
            for name, score in metrics.items()
            if name.startswith(f"dev/{tuning.task.name}/")
        }
        prompts[folder.path / "prompts" / tuning.task.name] = tuning.prompt(of_task(trainable, number), scores)
    if first_host():
        for place, prompt in prompts.items():
            with disk_errors(place):
                prompt.save(place)
