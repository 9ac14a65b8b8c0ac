"""`Tuning`: all that is settled before the first step of one method on one task, for one run or for one of many."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deptjax.data.buckets import choose_buckets
from deptjax.data.forms import form_of
from deptjax.data.pipeline import train_batches
from deptjax.data.preprocess import Example, Preprocessor
from deptjax.data.tasks import Task, TaskData
from deptjax.data.templates import Row
from deptjax.errors import UserError
from deptjax.inference.answers import check_mode
from deptjax.inference.evaluator import Evaluator
from deptjax.inference.text_encoder import TextEncoder, encoder_of
from deptjax.methods.base import Method, method_to_config
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel, check_context
from deptjax.prompt import Prompt
from deptjax.sharding import Placement, to_host
from deptjax.training.config import TrainConfig
from deptjax.training.transfer import started_from
from deptjax.typing import Array, Key, Tree

DEFAULT_MAX_LENGTH = 256


@dataclasses.dataclass(frozen=True)
class EncodedTask:
    """A task's rows, and the training and dev ones encoded."""

    data: TaskData
    preprocessor: Preprocessor
    examples: list[Example]
    dev_rows: tuple[Row, ...]
    dev: list[Example]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One method on one task: what is tuned, on what, and how.

    Attributes:
      backbone: the frozen model.
      model: the backbone with the method, resolved, in its sites.
      config: the settings.
      encoded: the task and its rows.
      encoder: what reads the texts, for a method with an encoder.
      rates: the peak learning rate of each group.
    """

    backbone: Backbone
    model: PromptedModel
    config: TrainConfig
    encoded: EncodedTask
    rates: dict[str, float]
    encoder: TextEncoder | None = None

    @classmethod
    def prepare(
        cls,
        backbone: Backbone,
        method: Method,
        task: Task,
        config: TrainConfig,
        encoded: EncodedTask | None = None,
        encoder: TextEncoder | None = None,
    ) -> Tuning:
        """Returns the tuning, everything checked; `encoded` spares reading rows that were read for the same settings.

        `encoder` is that of the method, which is loaded where it is not given.
        Raises `UserError` for data or settings that cannot be used.
        """
        computed = dataclasses.replace(backbone.config, remat=config.remat)
        encoder = encoder_of(method, backbone) if encoder is None else encoder
        method = method if encoder is None else method.with_encoder(encoder.choice, encoder.width)
        tuned = encoder.tuned(config.remat) if encoder is not None and encoder.choice.trainable else None
        model = PromptedModel.build(
            dataclasses.replace(backbone, config=computed), method, config.share_prompt, encoding=tuned
        )
        encoded = encode_task(backbone, model.method, task, config, encoder) if encoded is None else encoded
        preprocessor = encoded.preprocessor
        check_context(backbone, model.method, preprocessor.max_length, preprocessor.longest_target())
        defaults = model.method.learning_rates(backbone.prompt_lr)
        config.check_groups(defaults, model.method.kind)
        return cls(backbone, model, config, encoded, config.learning_rates(defaults), encoder)

    @property
    def task(self) -> Task:
        """The task, its labels and metrics filled in."""
        return self.encoded.data.task

    def start(self) -> tuple[Tree, Tree, Key]:
        """Returns the first `trainable`, `frozen`, and the key of the steps; all follow from the seed."""
        init_key, step_key = jax.random.split(jax.random.key(self.config.seed))
        vocabulary = self.backbone.vocabulary(self.task.texts)
        tuned = None if self.encoder is None or self.model.encoding is None else self.encoder.backbone.params
        trainable, frozen = self.model.init(init_key, self.backbone.params, vocabulary, tuned)
        if self.source_prompt is not None:
            where, parts = f"start_from: {self.config.start_from}", self.config.start_parts
            trainable = started_from(trainable, self.model.method, self.source_prompt, parts, where)
        return trainable, frozen, step_key

    @functools.cached_property
    def source_prompt(self) -> Prompt | None:
        """The prompt that the run starts from. Raises `UserError` for one that is damaged or of another backbone."""
        if self.config.start_from is None:
            return None
        try:
            prompt = Prompt.load(self.config.start_from)
        except UserError as error:
            raise UserError(f"start_from: {error}") from None
        prompt.check_backbone(self.backbone, f"start_from: {self.config.start_from}")
        if self.encoder is not None:
            prompt = self.encoder.started_from(prompt, f"start_from: {self.config.start_from}")
        return prompt.on(self.backbone)

    def optimizer(self, groups: Tree, peaks: dict[str, Any] | None = None) -> optax.GradientTransformation:
        """Returns the optimiser of a tree with these groups; `peaks`, perhaps traced, take the place of `rates`."""
        return self.config.optimizer(self.rates if peaks is None else peaks, groups)

    @functools.cached_property
    def label_tokens(self) -> Array | None:
        """The labels' tokens (C,) when the loss is over these alone. Raises `UserError` where that cannot be."""
        loss, preprocessor = self.config.loss, self.encoded.preprocessor
        if loss == "vocabulary" or (loss == "auto" and not preprocessor.labels_are_tokens()):
            return None
        return jnp.asarray(preprocessor.label_tokens())

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        """The source lengths that training batches are padded to."""
        lengths = [len(example.source) for example in self.encoded.examples]
        return choose_buckets(lengths, self.config.buckets, max_length=self.encoded.preprocessor.max_length)

    @functools.cached_property
    def schedules(self) -> dict[str, optax.Schedule]:
        """The learning rate of each group by the step."""
        return self.config.schedules(self.rates)

    def batches(self, buckets: Sequence[int], placement: Placement, num_threads: int = 2) -> Iterator[Any]:
        """Returns this host's part of the training batches, padded to `buckets`; it has `get_state` and `set_state`."""
        part, parts = placement.host_part
        return iter(
            train_batches(
                self.encoded.examples,
                batch_size=self.config.batch_size,
                buckets=buckets,
                seed=self.config.seed,
                process_index=part,
                process_count=parts,
                num_threads=num_threads,
            )
        )

    def read(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch as the step takes it: with the vectors of its texts, where an encoder is not tuned itself."""
        if self.encoder is None or self.model.encoding is not None:
            return batch
        return self.encoder.of_batch(batch)

    def evaluator(self, placement: Placement) -> Evaluator:
        """Returns what answers the dev split."""
        preprocessor, dev = self.encoded.preprocessor, [len(example.source) for example in self.encoded.dev]
        own = choose_buckets(dev, self.config.buckets, max_length=preprocessor.max_length) if dev else ()
        return Evaluator(
            self.model,
            preprocessor,
            mode=self.config.evaluation,
            batch_size=self.config.eval_batch_size,
            buckets=sorted({*self.buckets, *own}),
            placement=placement,
            encoder=self.encoder,
        )

    def evaluate(self, evaluator: Evaluator, trainable: Tree, frozen: Tree) -> dict[str, float]:
        """Returns the dev metrics, the one that selects the best prompt first; NaN where the numbers have blown up."""
        answers = evaluator.answers(trainable, frozen, self.encoded.dev)
        scores = self.task.score([answer.text for answer in answers], self.encoded.dev_rows)
        broken = any(math.isnan(value) for answer in answers for value in (answer.scores or {}).values())
        if broken or not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(trainable)):
            scores = dict.fromkeys(scores, math.nan)  # a parameter has blown up: what was answered means nothing
        return {f"dev/{name}": score for name, score in scores.items()}

    def prompt(self, trainable: Tree, metrics: dict[str, float]) -> Prompt:
        """Returns what is saved, folded; every host must call it, since it gathers what is split over them."""
        method, folded = self.model.method.fold(to_host(trainable))
        return Prompt(
            method=method,
            trainable=folded,
            backbone=self.backbone.name,
            fingerprint=self.backbone.fingerprint,
            task=self.task.to_config(),
            metrics=metrics,
            settings={"max_length": self.encoded.preprocessor.max_length, "evaluation": self.config.evaluation},
            encoder=None if self.encoder is None else self.encoder.card(),
        )

    def identity(self) -> dict[str, Any]:
        """Returns all that decides the result: a run is resumed only with the same.

        On how many devices it runs is not of these: the result is the same but for the order of sums, and a run may go
        on where there are more or fewer.
        """
        return {
            "backbone": {
                "name": self.backbone.name,
                **self.backbone.fingerprint,
                "dtype": self.backbone.config.dtype,
                **({} if (scheme := self.backbone.config.quantize) is None else {"quantize": scheme}),
            },
            "method": method_to_config(self.model.method),
            "task": self.task.to_config(),
            "data": {"train": _data_digest(self.encoded.examples), "dev": _data_digest(self.encoded.dev)},
            "learning_rates": self.rates,
            "train": self.config.identity(),
            **({} if self.source_prompt is None else {"start": self.source_prompt.run_id}),
            **({} if self.encoder is None else {"encoder": self.encoder.card()}),
        }


def encode_task(
    backbone: Backbone, method: Method, task: Task, config: TrainConfig, encoder: TextEncoder | None = None
) -> EncodedTask:
    """Returns the rows of a task, encoded as `method` on `backbone`, and its `encoder`, take them.

    Raises `UserError` for rows that are wrong, and for a task without any.
    """
    data = task.load()
    preprocessor = make_preprocessor(backbone, method, data.task, config, encoder)
    dev_rows = data.dev[: config.eval_examples]
    examples, dev = preprocessor.encode_all(data.train), preprocessor.encode_all(dev_rows)
    if not examples:
        raise UserError(f"task '{data.task.name}' has no training rows")
    return EncodedTask(data, preprocessor, examples, dev_rows, dev)


def make_preprocessor(
    backbone: Backbone, method: Method, task: Task, config: TrainConfig, encoder: TextEncoder | None = None
) -> Preprocessor:
    """Returns the preprocessor of a run: the source limit is the method's, the user's, or 256 tokens."""
    if backbone.config.is_masked:
        backbone.config.check_fills()
    limit = method.source_limit()
    length = config.max_length or limit or DEFAULT_MAX_LENGTH
    if limit is not None and length > limit:
        raise UserError(f"max_length {length} is more than the {limit} of the method; raise the method's max_length")
    preprocessor = Preprocessor(
        backbone.tokenizer,
        task,
        form=form_of(backbone.config),
        max_length=length,
        on_too_long=config.on_too_long,
        encoder_tokens=None if encoder is None else encoder.tokens,
    )
    check_mode(preprocessor, config.evaluation)
    return preprocessor


def padded_labels(label_tokens: Sequence[Array]) -> tuple[Array, Array]:
    """Returns the label tokens of several tasks as (K, C) int32, and which of them are real, (K, C) bool."""
    most = max(map(len, label_tokens))
    tokens, real = np.zeros((len(label_tokens), most), np.int32), np.zeros((len(label_tokens), most), bool)
    for row, own in enumerate(label_tokens):
        tokens[row, : len(own)], real[row, : len(own)] = own, True
    return jnp.asarray(tokens), jnp.asarray(real)


def _data_digest(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.source, example.target, np.asarray(example.label)):
            digest.update(np.ascontiguousarray(part).tobytes())
            digest.update(b"|")
    return f"{len(examples)} rows {digest.hexdigest()[:12]}"
