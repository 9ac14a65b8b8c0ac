"""`train`: one method, one backbone, one task, one folder. Run it again to resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.checkpoint import Checkpoints, disk_errors
from deptjax.data.buckets import choose_buckets
from deptjax.data.pipeline import train_batches
from deptjax.data.preprocess import Example, Preprocessor
from deptjax.data.tasks import Task, TaskData, get_task
from deptjax.errors import UserError
from deptjax.inference.evaluator import Evaluator
from deptjax.memory import PeakMemory
from deptjax.methods.base import Method, method_to_config
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel, check_context
from deptjax.prompt import Prompt
from deptjax.sharding import Placement
from deptjax.training.config import TrainConfig
from deptjax.training.folder import RunFolder, write_json
from deptjax.training.loop import Loop, Outcome, Progress
from deptjax.training.optim import make_optimizer
from deptjax.training.state import TrainState, count_parameters
from deptjax.training.step import make_loss, make_train_step
from deptjax.typing import Tree

DEFAULT_MAX_LENGTH = 256


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


def train(
    backbone: Backbone,
    method: Method,
    task: Task | str,
    workdir: str | os.PathLike[str],
    *,
    progress: bool | None = None,
    placement: Placement | None = None,
    notes: Mapping[str, str] | None = None,
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
      placement: the devices; by default all there are.
      notes: texts to put into the folder of a new run, by file name.
      **settings: the fields of `TrainConfig`.

    Raises:
      UserError: for data, settings or a folder that cannot be used; for a loss that is not finite.
    """
    config = TrainConfig.from_settings(settings)
    placement = Placement.over() if placement is None else placement
    placement.check_batch_size(config.batch_size)
    data = (get_task(task) if isinstance(task, str) else task).load()
    model = PromptedModel.build(backbone, method, config.share_prompt)
    preprocessor = make_preprocessor(backbone, model.method, data.task, config)
    check_context(backbone, model.method, preprocessor.max_length, preprocessor.longest_target())
    dev_rows = data.dev[: config.eval_examples]
    examples, dev = preprocessor.encode_all(data.train), preprocessor.encode_all(dev_rows)
    if not examples:
        raise UserError(f"task '{data.task.name}' has no training rows")

    defaults = model.method.learning_rates(backbone.prompt_lr)
    config.check_groups(defaults, model.method.kind)
    rates = config.learning_rates(defaults)
    key = jax.random.key(config.seed)
    init_key, step_key = jax.random.split(key)
    vocabulary = backbone.vocabulary(data.task.texts)
    trainable, frozen = model.init(init_key, backbone.params, vocabulary)
    schedules = config.schedules(rates)
    tx = make_optimizer(
        schedules,
        model.method.groups(trainable),
        clip_norm=config.clip_norm,
        weight_decay=config.weight_decay,
        eps=config.adam_eps,
        accumulate=config.accumulate,
    )
    # A copy, because a step reuses the memory of its state, and full fine-tuning starts from the backbone's own arrays.
    state = placement.put(TrainState.create(jax.tree.map(jnp.copy, trainable), tx, step_key))
    frozen = placement.put(frozen)

    buckets = choose_buckets([len(e.source) for e in examples], config.buckets, max_length=preprocessor.max_length)
    dev_lengths = [len(e.source) for e in dev]
    dev_buckets = choose_buckets(dev_lengths, config.buckets, max_length=preprocessor.max_length) if dev else ()
    batches = iter(
        train_batches(
            examples,
            batch_size=config.batch_size,
            buckets=buckets,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    )
    evaluator = Evaluator(
        model,
        preprocessor,
        mode=config.evaluation,
        batch_size=config.eval_batch_size,
        buckets=sorted({*buckets, *dev_buckets}),
        placement=placement if config.eval_batch_size % placement.mesh.size == 0 else None,
    )

    def make_prompt(trainable: Tree, metrics: dict[str, float]) -> Prompt:
        return Prompt(
            method=model.method,
            trainable=jax.device_get(trainable),
            backbone=backbone.name,
            fingerprint=backbone.fingerprint,
            task=data.task.to_config(),
            metrics=metrics,
            settings={"max_length": preprocessor.max_length, "evaluation": config.evaluation},
        )

    def evaluate(trainable: Tree) -> dict[str, float]:
        answers = evaluator.answers(trainable, frozen, dev)
        scores = data.task.score([answer.text for answer in answers], dev_rows)
        broken = any(math.isnan(value) for answer in answers for value in (answer.scores or {}).values())
        if broken or not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(trainable)):
            scores = dict.fromkeys(scores, math.nan)  # a parameter has blown up: what was answered means nothing
        return {f"dev/{name}": score for name, score in scores.items()}

    def save_prompt(trainable: Tree, metrics: dict[str, float]) -> None:
        if jax.process_index() == 0:
            with disk_errors(folder.prompt):
                make_prompt(trainable, metrics).save(folder.prompt)

    loss = make_loss(model, _label_tokens(preprocessor, config), dropout=config.dropout)
    with contextlib.ExitStack() as stack:
        # Only now is a file written: what cannot be trained leaves no folder behind.
        folder = RunFolder(
            workdir, _identity(backbone, model.method, data, config, rates, placement, examples, dev), notes
        )
        stack.callback(folder.close)
        checkpoints = Checkpoints(folder.checkpoints)
        stack.callback(checkpoints.close)
        loop = Loop(
            config=config,
            folder=folder,
            checkpoints=checkpoints,
            step_fn=make_train_step(loss, tx),
            frozen=frozen,
            batches=batches,
            put_batch=placement.put_batch,
            rates=schedules,
            evaluate=evaluate if dev and config.eval_every else None,
            save_prompt=save_prompt,
            bar=progress,
        )
        so_far = Progress(data=batches.get_state())
        if checkpoints.latest is not None:
            state, saved = checkpoints.restore(state)
            so_far = Progress(**saved)
            batches.set_state(so_far.data)
        with PeakMemory() as peak:
            outcome = loop.run(state, so_far)
        return _finish(folder, outcome, count_parameters(trainable), peak.mib)


def make_preprocessor(backbone: Backbone, method: Method, task: Task, config: TrainConfig) -> Preprocessor:
    """Returns the preprocessor of a run: the source limit is the method's, the user's, or 256 tokens."""
    limit = method.source_limit()
    length = config.max_length or limit or DEFAULT_MAX_LENGTH
    if limit is not None and length > limit:
        raise UserError(f"max_length {length} is more than the {limit} of the method; raise the method's max_length")
    return Preprocessor(
        backbone.tokenizer,
        task,
        causal=not backbone.config.is_encoder_decoder,
        max_length=length,
        on_too_long=config.on_too_long,
    )


def _label_tokens(preprocessor: Preprocessor, config: TrainConfig) -> jax.Array | None:
    """Returns the labels' tokens when the loss is over these alone. Raises `UserError` where that cannot be."""
    if config.loss == "vocabulary" or (config.loss == "auto" and not preprocessor.labels_are_tokens()):
        return None
    return jnp.asarray(preprocessor.label_tokens())


def _identity(
    backbone: Backbone,
    method: Method,
    data: TaskData,
    config: TrainConfig,
    rates: dict[str, float],
    placement: Placement,
    examples: list[Example],
    dev: list[Example],
) -> dict[str, Any]:
    """Returns all that decides the result of a run: a run is resumed only with the same."""
    return {
        "backbone": {"name": backbone.name, **backbone.fingerprint, "dtype": backbone.config.dtype},
        "method": method_to_config(method),
        "task": data.task.to_config(),
        "data": {"train": _data_digest(examples), "dev": _data_digest(dev)},
        "learning_rates": rates,
        "train": dataclasses.asdict(config),
        "devices": placement.mesh.size,
    }


def _data_digest(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.source, example.target, np.asarray(example.label)):
            digest.update(np.ascontiguousarray(part).tobytes())
            digest.update(b"|")
    return f"{len(examples)} rows {digest.hexdigest()[:12]}"


def _finish(folder: RunFolder, outcome: Outcome, parameters: int, peak_mib: float) -> Run:
    prompt = Prompt.load(folder.prompt) if folder.prompt.exists() else None
    result: dict[str, Any] = {
        "best_step": outcome.progress.best_step,
        "metrics": outcome.progress.best_metrics,
        "trainable_parameters": parameters,
        "seconds_per_step": outcome.seconds_per_step,
        "peak_mib": peak_mib,
    }
    if outcome.finished and outcome.seconds_per_step is None and folder.result.exists():
        result = json.loads(folder.result.read_text())  # the run had ended before: this call took no step
    elif outcome.finished and jax.process_index() == 0:
        with disk_errors(folder.result):
            write_json(folder.result, result)
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
