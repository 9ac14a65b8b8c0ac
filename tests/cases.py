"""What many tests share: each method on each tiny backbone, and batches to run them on."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.inference.rows import Rows
from deptjax.inference.text_encoder import encoder_of
from deptjax.methods import (
    ACCEPT,
    ATTEMPT,
    DPT,
    IDPG,
    MPT,
    ADePT,
    DeepPromptTuning,
    DePT,
    FullFineTuning,
    LoPA,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    ResidualPromptTuning,
)
from deptjax.methods.base import FIXED
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.prompt import Prompt
from deptjax.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from deptjax.training.optim import make_optimizer
from deptjax.training.state import TrainState
from deptjax.training.step import make_loss, make_train_step
from deptjax.typing import Tree

MAX_LENGTH = 13
METHODS: dict[str, Method] = {
    "dept": DePT(prompt_length=5, rank=3, max_length=MAX_LENGTH, prompt_init="vocab"),
    "prompt_tuning": PromptTuning(prompt_length=5, prompt_init="vocab"),
    "prefix_tuning": PrefixTuning(prefix_length=3),
    "lora": LoRA(rank=3),
    "full": FullFineTuning(),
}
# More methods of the same sites: the contract holds of them too, and in fewer combinations.
PROMPT_METHODS: dict[str, Method] = {
    "accept": ACCEPT(5, 4, 3, MAX_LENGTH, 8, 2, prompt_init="vocab"),
    "adept": ADePT(prompt_length=5, rank=3, prompt_init="vocab"),
    "deep_prompt_tuning": DeepPromptTuning(prompt_length=5, mode="replace"),
    "dpt": DPT(prompt_length=5, rank=3),
    "mpt": MPT(prompt_length=5),
    "p_tuning": PTuning(prompt_length=5, hidden=7, network="lstm"),
    "residual_prompt_tuning": ResidualPromptTuning(prompt_length=5, bottleneck=7, prompt_init="vocab"),
}
# What depends on the text by an encoder, which here is the backbone itself.
ENCODED: dict[str, Method] = {
    "lopa": LoPA(prompt_length=5, rank=2, hidden=7, prompt_init="vocab"),
    "idpg": IDPG(prompt_length=5, hidden=6, generator="dense"),
}
VARIANTS: dict[str, Method] = {
    "deep_prompt_tuning, add": DeepPromptTuning(prompt_length=5, prompt_init="vocab"),
    "idpg, every": IDPG(prompt_length=5, hidden=6, generator="dense", layers="every"),
    "lopa, concat": LoPA(prompt_length=3, rank=2, hidden=7, prompt_init="vocab", variant="concat"),
}
SOURCED = "attempt"  # its source prompts belong to a backbone
BACKBONES: dict[str, Callable[..., Backbone]] = {
    "bert": functools.partial(tiny_bert, has_pooler=False),  # which filling a mask leaves as it is
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "t5": tiny_t5,
}
RATES = {"prompt": 0.1, "low_rank": 0.01, "backbone": 1e-3}


@functools.cache
def backbone_of(name: str, scan: bool = False) -> Backbone:
    """Returns a tiny backbone of a family; the same one at each call."""
    return BACKBONES[name](scan_layers=scan)


@dataclasses.dataclass(frozen=True)
class Case:
    """A method on a backbone: the model, its first parameters, and the same moved away from where they start."""

    backbone: Backbone
    model: PromptedModel
    trainable: Tree
    frozen: Tree

    @functools.cached_property
    def moved(self) -> Tree:
        """Parameters as they may be after training: nothing is at its special first value."""
        random = np.random.default_rng(3)
        return jax.tree.map(
            lambda p: p + 0.1 * jnp.asarray(random.standard_normal(p.shape), p.dtype) * (jnp.std(p) + 0.3),
            self.trainable,
        )

    @functools.cached_property
    def logits(self) -> Callable[..., jax.Array]:
        """The model's `target_logits`, jitted; the encoder of a method that has one reads the texts before."""
        run = jax.jit(self.model.target_logits)
        if self.model.method.encoder_choice() is None:
            return run
        return lambda trainable, frozen, batch: run(trainable, frozen, self.read(batch))

    @functools.cached_property
    def rows(self) -> Rows:
        """The moved parameters, shared by all rows of a batch."""
        return Rows.shared(self.model, self.moved, self.frozen)

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """A training step over the whole vocabulary, without dropout."""
        run = make_train_step(make_loss(self.model), self.tx)
        if self.model.method.encoder_choice() is None:
            return run
        return lambda state, frozen, batch: run(state, frozen, self.read(batch))

    def read(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns a batch with what the method's encoder, if it has one, makes of its texts."""
        encoder = encoder_of(self.model.method, self.backbone)
        if encoder is None:
            return batch
        source, mask = np.asarray(batch["source"]), np.asarray(batch["source_mask"])
        vectors = encoder.vectors([ids[real] for ids, real in zip(source, mask, strict=True)])
        return {**batch, "encoding": jnp.asarray(vectors)}

    @functools.cached_property
    def tx(self) -> Any:
        """AdamW at constant rates."""
        groups = self.model.method.groups(self.trainable)
        used = {name: (lambda step, rate=RATES[name]: rate) for name in set(jax.tree.leaves(groups)) - {FIXED}}
        return make_optimizer(used, groups)

    def taken(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns a batch as the backbone takes it: one that fills masks, with the mask as each text's last token."""
        config = self.backbone.config
        if not config.is_masked:
            return batch
        mask = batch["source_mask"]
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        source = batch["source"].at[jnp.arange(len(mask)), last].set(config.mask_token)
        return {
            **batch,
            "source": source,
            "targets": batch["targets"][:, :1],
            "target_mask": batch["target_mask"][:, :1],
        }

    def prompt(self, task: Mapping[str, Any] | None = None, max_length: int = MAX_LENGTH) -> Prompt:
        """The moved parameters as a run leaves them, for a task's configuration or for one of bare texts."""
        return Prompt(
            method=self.model.method,
            trainable=jax.device_get(self.moved),
            backbone=self.backbone.name,
            fingerprint=self.backbone.fingerprint,
            task={"name": "x", "input": "{x}"} if task is None else dict(task),
            settings={"max_length": max_length, "evaluation": "auto"},
        )

    def state(self) -> TrainState:
        """A fresh state at the first parameters; a copy, since a step takes the memory of its state."""
        return TrainState.create(jax.tree.map(jnp.copy, self.trainable), self.tx, jax.random.key(5))


def make_case(backbone: Backbone, method: Method, **fields: Any) -> Case:
    """Returns the case of any method on any backbone."""
    model = PromptedModel.build(backbone, method.with_encoding_width(backbone.width), **fields)
    return Case(backbone, model, *model.init(jax.random.key(1), backbone.params, backbone.vocabulary()))


@functools.cache
def case_of(backbone: str, method: str, scan: bool = False) -> Case:
    """Returns a case by the names of its parts; the same one at each call, so that what it compiles is shared."""
    return make_case(backbone_of(backbone, scan), method_on(backbone_of(backbone), method))


def method_on(backbone: Backbone, name: str) -> Method:
    """Returns a method by its name, as it is tuned on a backbone."""
    if name == SOURCED:
        return ATTEMPT(5, source_prompts(backbone), 7, prompt_init="vocab")
    if name == "accept" and backbone.width % 8:  # a prime: codewords of the whole width
        return PROMPT_METHODS[name].clone(prompt_part=None, offset_part=None)  # type: ignore[attr-defined]
    return (METHODS | PROMPT_METHODS | ENCODED | VARIANTS)[name]


@functools.cache
def source_prompts(backbone: Backbone) -> str:
    """Returns the folders of two prompts of five vectors on a backbone, as ATTEMPT takes them."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="deptjax-sources-"))
    tuned = make_case(backbone, METHODS["prompt_tuning"])
    for name, factor in (("one", 1.0), ("two", -2.0)):
        prompt = tuned.prompt()
        trainable = jax.tree.map(lambda leaf, by=factor: by * leaf, prompt.trainable)
        dataclasses.replace(prompt, trainable=trainable).save(folder / name)
    return f"{folder / 'one'},{folder / 'two'}"


def rows_of(lengths: Sequence[int], seed: int = 0, vocab: int = 50) -> list[np.ndarray]:
    """Returns token ids of texts of these lengths, none of them a special token."""
    random = np.random.default_rng([seed, *lengths])
    return [random.integers(3, vocab, length).astype(np.int32) for length in lengths]


def padded(rows: Sequence[np.ndarray], length: int, side: str = "right") -> tuple[jax.Array, jax.Array]:
    """Returns ids (B, length) with 0 where there is no text, and their mask."""
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, at], mask[i, at] = row, True
    return jnp.asarray(ids), jnp.asarray(mask)


def batch_of(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    source_length: int,
    target_length: int,
    side: str = "right",
) -> dict[str, jax.Array]:
    """Returns a batch as ARCHITECTURE.md has it."""
    source, source_mask = padded(sources, source_length, side)
    ids, mask = padded(targets, target_length)
    rows = len(sources)
    return {
        "source": source,
        "source_mask": source_mask,
        "targets": ids,
        "target_mask": mask,
        "label": jnp.full(rows, -1, jnp.int32),
        "weight": jnp.ones(rows),
    }


def some_batch(seed: int = 0) -> dict[str, jax.Array]:
    """Returns three rows of several lengths, T = 7 and U = 3."""
    return batch_of(rows_of((7, 3, 5), seed), rows_of((2, 3, 1), seed + 100), 7, 3)
