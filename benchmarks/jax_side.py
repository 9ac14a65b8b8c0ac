"""deptjax's side: the library's own pieces, put together as `deptjax.training.run.train` does."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks.cases import BUDGET, MAX_LENGTH, SIZES, Entrant, Size, vectors
from deptjax.methods import DePT, FullFineTuning, LoRA, Method, PromptTuning, Vocabulary
from deptjax.models.backbone import Backbone
from deptjax.models.llama import LlamaConfig
from deptjax.models.prompted import PromptedModel
from deptjax.models.t5 import T5Config
from deptjax.training.optim import make_optimizer, make_schedule
from deptjax.training.state import TrainState, count_parameters
from deptjax.training.step import make_loss, make_train_step
from deptjax.typing import Tree

Config = T5Config | LlamaConfig


def make_config(size: Size, scan: bool) -> Config:
    """Returns the config of a model of this size."""
    if size.family == "t5":
        return T5Config(
            vocab_size=size.vocab,
            width=size.width,
            num_encoder_layers=size.layers,
            num_decoder_layers=size.layers,
            num_heads=size.heads,
            head_dim=size.head_dim,
            mlp_dim=size.mlp,
            scan_layers=scan,
        )
    return LlamaConfig(
        vocab_size=size.vocab,
        width=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        mlp_dim=size.mlp,
        norm_eps=1e-5,
        max_positions=8192,
        rope_theta=100000.0,
        tied=True,
        scan_layers=scan,
    )


def cheap_params(config: Config) -> Tree:
    """Returns a random float32 tree: kernels uniform with variance 1 / fan-in, scales 1, the rest uniform in +-1.

    Uniform numbers, because drawing two hundred million normal ones takes longer than the steps that are timed.
    """
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    def forward(module: Any) -> jax.Array:
        return module.head(module.target_states(module.embed(tokens), mask, None, tokens))

    shapes = jax.eval_shape(lambda: config.make().init(jax.random.key(0), method=forward))["params"]
    random = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], shape: Any) -> jax.Array:
        name = path[-1].key
        if name == "scale":
            return jnp.ones(shape.shape, jnp.float32)
        values = random.random(shape.shape, np.float32)
        values *= 2
        values -= 1
        if name == "kernel":
            values *= (3 / shape.shape[-2]) ** 0.5
        return jnp.asarray(values)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def make_method(name: str) -> Method:
    """Returns the method of a name such as `dept20`."""
    if name == "full":
        return FullFineTuning()
    if name.startswith("lora"):
        return LoRA(rank=int(name.removeprefix("lora")), alpha=16.0)
    if name.startswith("dept"):
        return DePT(prompt_length=vectors(name), max_length=MAX_LENGTH, prompt_init="vocab")
    return PromptTuning(prompt_length=vectors(name), prompt_init="vocab")


def random_batch(entrant: Entrant, size: Size) -> dict[str, np.ndarray]:
    """Returns one batch of random tokens in the library's format, without padding."""
    random = np.random.default_rng(1)
    rows, source, target = entrant.batch, entrant.source, entrant.target
    return {
        "source": random.integers(3, size.vocab, (rows, source)).astype(np.int32),
        "source_mask": np.ones((rows, source), bool),
        "targets": random.integers(3, size.vocab, (rows, target)).astype(np.int32),
        "target_mask": np.ones((rows, target), bool),
        "label": np.full(rows, -1, np.int32),
        "weight": np.ones(rows, np.float32),
    }


class JaxRunner:
    """A `Runner` over `PromptedModel`, `make_optimizer` and `make_train_step`."""

    def __init__(self, entrant: Entrant):
        size = SIZES[entrant.model]
        config = make_config(size, entrant.scan)
        backbone = Backbone(entrant.model, config, cheap_params(config), None)
        if entrant.text is None:
            batches, label_tokens = [random_batch(entrant, size)], None
        else:
            from benchmarks.texts import text_batches

            batches, label_tokens = text_batches(entrant)
        model = PromptedModel.build(backbone, make_method(entrant.method), entrant.share_prompt)
        init_key, step_key = jax.random.split(jax.random.key(0))
        trainable, self._frozen = model.init(init_key, backbone.params, Vocabulary(backbone.embedding, None))
        rates = model.method.learning_rates(backbone.prompt_lr)
        schedules = {name: make_schedule("constant", rate, 1, 0) for name, rate in rates.items()}
        tx = make_optimizer(schedules, model.method.groups(trainable))
        self._parameters = count_parameters(trainable)
        budget = BUDGET * size.width
        if vectors(entrant.method) and self._parameters > budget:
            raise ValueError(f"{entrant.method} has {self._parameters} parameters, more than the budget of {budget}")
        self._state = TrainState.create(trainable, tx, step_key)
        self._step_fn: Any = make_train_step(make_loss(model, label_tokens), tx)
        self._batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
        self._programs: dict[tuple[int, ...], Any] = {}
        self._batches_a_step, self._taken = entrant.batches, 0

    def warm(self) -> dict[str, float]:
        """Compiles a program for each shape among the batches, and takes a step with each."""
        seconds = 0.0
        for batch in self._batches:
            shape = self._shape(batch)
            if shape in self._programs:
                continue
            began = time.perf_counter()
            self._programs[shape] = self._step_fn.lower(self._state, self._frozen, batch).compile()
            seconds += time.perf_counter() - began
            self._take(batch)
        return {"compile_s": seconds, "programs": len(self._programs)}

    def step(self) -> tuple[float, int]:
        """Takes as many steps as the entrant has batches a step, one behind the other."""
        rows, loss = 0, 0.0
        for _ in range(self._batches_a_step):
            batch = self._batches[self._taken % len(self._batches)]
            self._taken += 1
            loss = self._take(batch)
            rows += int(batch["label"].shape[0])
        return loss, rows

    def describe(self) -> dict[str, Any]:
        """Returns the trainable parameters and the versions."""
        return {"parameters": self._parameters, "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__}}

    def _take(self, batch: dict[str, jax.Array]) -> float:
        self._state, metrics = self._programs[self._shape(batch)](self._state, self._frozen, batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def _shape(self, batch: dict[str, jax.Array]) -> tuple[int, ...]:
        return (*batch["source"].shape, *batch["targets"].shape)
