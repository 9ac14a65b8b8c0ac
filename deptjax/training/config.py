"""The settings of a run.

Optimiser, schedule, batch, steps and evaluation interval default to what the authors of DePT used on T5. Two things do
not: where a task has labels that are one token each, the loss is over these alone and the dev split is scored by
likelihood. The authors' loss over the whole vocabulary is `loss="vocabulary"`, their greedy answers
`evaluation="generate"`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

import optax

from deptjax.data.tasks import Task
from deptjax.errors import UserError, nearest
from deptjax.models.remat import REMAT
from deptjax.training.optim import SCHEDULES, default_warmup, make_optimizer, make_schedule
from deptjax.typing import Tree

# Fields that change how a run is computed and not what it computes: they are no part of its identity.
NOT_IDENTITY = ("remat", "profile")

LOSSES = ("auto", "labels", "vocabulary")
EVALUATIONS = ("auto", "labels", "generate")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; what to train is the method's, and on what is the task's.

    Attributes:
      steps: updates of the parameters.
      batch_size: rows a batch, over all hosts together.
      accumulate: batches a step, whose gradients are averaged.
      prompt_lr, low_rank_lr, backbone_lr: peak learning rate of one group (soft prompts, low-rank factors, the
        backbone's own weights); `None` takes the method's default for this backbone.
      schedule: `linear` (decay to 0), `cosine` or `constant`, after the warm-up.
      prompt_schedule, low_rank_schedule, backbone_schedule: the schedule of one group; `None` means `schedule`.
      warmup_steps: steps of linear rise from 0; `None` means 500, or 6 % of a shorter run.
      prompt_warmup_steps, low_rank_warmup_steps, backbone_warmup_steps: the warm-up of one group; `None` means
        `warmup_steps`.
      clip_norm: the norm of all gradients together is clipped to this.
      weight_decay: decoupled, as in AdamW.
      adam_eps: AdamW's epsilon.
      loss: `labels` (over the labels' tokens alone), `vocabulary`, or `auto`: `labels` where every label is one token.
      evaluation: `labels` (by likelihood), `generate` (greedy text), or `auto`: `labels` where the task has labels.
      max_length: longest source in tokens; `None` means the method's `max_length`, or 256.
      on_too_long: `cut` longer sources with a counted warning, or `error`.
      dropout: dropout in training: the backbone's (T5 has it), and a method's own (LoPA's and IDPG's heads).
      buckets: how many source lengths batches are padded to, at most; each is one more program to compile.
      eval_every: steps between evaluations on the dev split; 0 for none.
      eval_examples: dev examples looked at; `None` for all.
      eval_batch_size: rows a batch in evaluation.
      checkpoint_every: steps between checkpoints.
      log_every: steps between lines of `metrics.jsonl`.
      share_prompt: on a causal backbone, compute what belongs to the prompt once a batch and not in every row; the
        result is the same, but that rows then share what dropout leaves of the prompt (GPT-2 has dropout).
      remat: what layers keep for the gradient: `none` computes nothing twice, `dots` keeps the results of products with
        weights, `full` only each layer's input. Less memory, more time, the same numbers up to rounding: a run may be
        resumed with another.
      profile: traces this many steps, behind the first ten, into the folder `profile` of the run, for TensorBoard and
        Perfetto; 0 for none.
      start_from: folder of a saved prompt whose parameters this run starts from, as in transfer from another task;
        `None` starts anew.
      start_parts: which of them, such as prompt,lora_a,lora_b; `None` takes all that the method tunes.
      seed: of everything random: initial values, order of the data, dropout.
    """

    steps: int = 30_000
    batch_size: int = 32
    accumulate: int = 1
    prompt_lr: float | None = None
    low_rank_lr: float | None = None
    backbone_lr: float | None = None
    schedule: str = "linear"
    prompt_schedule: str | None = None
    low_rank_schedule: str | None = None
    backbone_schedule: str | None = None
    warmup_steps: int | None = None
    prompt_warmup_steps: int | None = None
    low_rank_warmup_steps: int | None = None
    backbone_warmup_steps: int | None = None
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    adam_eps: float = 1e-6
    loss: str = "auto"
    evaluation: str = "auto"
    max_length: int | None = None
    on_too_long: str = "cut"
    dropout: bool = True
    buckets: int = 5
    eval_every: int = 1000
    eval_examples: int | None = None
    eval_batch_size: int = 32
    checkpoint_every: int = 500
    log_every: int = 10
    share_prompt: bool = True
    remat: str = "none"
    profile: int = 0
    start_from: str | None = None
    start_parts: tuple[str, ...] | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "buckets",
            "eval_batch_size",
            "checkpoint_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_length", "eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        warmups = [f"{group}warmup_steps" for group in ("", "prompt_", "low_rank_", "backbone_")]
        for name in (*warmups, "eval_every", "profile", "weight_decay", "seed"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name} is {value}; it must be 0 or more")
        for name in ("prompt_lr", "low_rank_lr", "backbone_lr", "clip_norm", "adam_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; it must be above 0, and finite")
        self._check_start()
        choices = {
            "schedule": SCHEDULES,
            "loss": LOSSES,
            "evaluation": EVALUATIONS,
            "on_too_long": ("cut", "error"),
            "remat": REMAT,
            **{f"{group}_schedule": (*SCHEDULES, None) for group in ("prompt", "low_rank", "backbone")},
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                names = [k for k in known if k]
                raise UserError(
                    f"{name} '{value}' is not known; there are {', '.join(names)}.{nearest(str(value), names)}"
                )

    def _check_start(self) -> None:
        if self.start_from is not None:
            object.__setattr__(self, "start_from", os.fspath(self.start_from))  # the dataclass is frozen
        if self.start_parts is None:
            return
        if isinstance(self.start_parts, str) or not self.start_parts:
            raise UserError(f"start_parts is {self.start_parts!r}; give a list of names, such as ['prompt', 'lora_a']")
        if self.start_from is None:
            raise UserError("start_parts is given, and no start_from; name the prompt to start from")
        object.__setattr__(self, "start_parts", tuple(self.start_parts))

    def identity(self) -> dict[str, Any]:
        """Returns the fields that decide the result, ready for JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_IDENTITY}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainConfig:
        """Returns the config with these fields set. Raises `UserError` for a name that is no field."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                if name in (field.name for field in dataclasses.fields(Task)):
                    raise UserError(
                        f"'{name}' is a field of the task; give the task with it: get_task(..., {name}=...)"
                    )
                raise UserError(f"there is no setting '{name}'.{nearest(name, known)}")
        return cls(**settings)

    def check_groups(self, groups: Iterable[str], method: str) -> None:
        """Raises `UserError` when a learning rate, schedule or warm-up is set for a group that the method has not."""
        for group in {"prompt", "low_rank", "backbone"} - set(groups):
            for name in (f"{group}_lr", f"{group}_schedule", f"{group}_warmup_steps"):
                if getattr(self, name) is not None:
                    there = ", ".join(f"{own}_lr" for own in groups)
                    raise UserError(f"{name}: method '{method}' trains no such parameters; it has {there}")

    def learning_rates(self, defaults: dict[str, float]) -> dict[str, float]:
        """Returns the peak learning rate of each group in `defaults`, the user's where one is given."""
        rates = dict(defaults)
        for group in defaults:
            own: float | None = getattr(self, f"{group}_lr", None)
            if own is not None:
                rates[group] = own
        return rates

    def schedules(self, rates: dict[str, float]) -> dict[str, Any]:
        """Returns the learning-rate schedule of each group."""
        common = default_warmup(self.steps) if self.warmup_steps is None else self.warmup_steps
        schedules = {}
        for group, rate in rates.items():
            own_warmup = getattr(self, f"{group}_warmup_steps", None)
            kind = getattr(self, f"{group}_schedule", None) or self.schedule
            schedules[group] = make_schedule(kind, rate, self.steps, common if own_warmup is None else own_warmup)
        return schedules

    def optimizer(self, rates: dict[str, Any], groups: Tree) -> optax.GradientTransformation:
        """Returns the optimiser of a tree with these groups (`Method.groups`), given the peak rate of each."""
        return make_optimizer(
            self.schedules(rates),
            groups,
            clip_norm=self.clip_norm,
            weight_decay=self.weight_decay,
            eps=self.adam_eps,
            accumulate=self.accumulate,
        )
