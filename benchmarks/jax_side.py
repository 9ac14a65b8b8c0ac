"""deptjax's side: the library's own pieces, put together as `deptjax.training.run.train` does."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks.cases import BUDGET, MAX_LENGTH, SIZES, Entrant, Size, vectors
from benchmarks.matmul import check_device
from deptjax.flops import BatchShape, step_flops
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


def make_config(size: Size, scan: bool, **computed: Any) -> Config:
    """Returns the config of a model of this size; `computed` are fields that say how it is computed."""
    if size.family == "t5":
        return T5Config(
            vocab_size=size.vocab,
            width=size.width,
            num_encoder_layers=size.layers,
            num_decoder_layers=size.layers,
            num_heads=size.heads,
            head_dim=size.head_dim,
            mlp_dim=size.mlp,
            tied=size.tied,
            scan_layers=scan,
            **computed,
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
        tied=size.tied,
        scan_layers=scan,
        **computed,
    )


def cheap_params(config: Config) -> Tree:
    """Returns a random float32 tree: kernels uniform with variance 1 / fan-in, scales 1, the rest uniform in +-1.

    Uniform numbers, because drawing two hundred million normal ones takes longer than the steps that are timed.
    """
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

    return jax.tree_util.tree_map_with_path(leaf, _shapes(config))


def device_params(config: Config) -> Tree:
    """Returns a tree with the numbers' ranges of `cheap_params`, drawn on the device in the config's dtype.

    The host never holds it: that of LLaMA-2-7B would take a minute to draw and to send.
    """

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def uniform(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
        return jax.random.uniform(key, shape, config.dtype, -limit, limit)

    key = jax.random.key(0)

    def leaf(path: tuple[Any, ...], shape: Any) -> jax.Array:
        nonlocal key
        key, own = jax.random.split(key)
        name = path[-1].key
        if name == "scale":
            return jnp.ones(shape.shape, config.dtype)
        return uniform(own, shape.shape, (3 / shape.shape[-2]) ** 0.5 if name == "kernel" else 1.0)

    return jax.tree_util.tree_map_with_path(leaf, _shapes(config))


def _shapes(config: Config) -> Tree:
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    def forward(module: Any) -> jax.Array:
        return module.head(module.target_states(module.embed(tokens), mask, None, tokens))

    return jax.eval_shape(lambda: config.make().init(jax.random.key(0), method=forward))["params"]


def computed_fields(entrant: Entrant) -> dict[str, Any]:
    """Returns the fields of a config that say how this entrant computes."""
    fields = {"dtype": entrant.dtype, "remat": entrant.remat}
    return fields if entrant.attention is None else {**fields, "attention": entrant.attention}


def make_method(name: str, max_length: int = MAX_LENGTH) -> Method:
    """Returns the method of a name such as `dept20`."""
    if name == "full":
        return FullFineTuning()
    if name.startswith("lora"):
        return LoRA(rank=int(name.removeprefix("lora")), alpha=16.0)
    if name.startswith("dept"):
        return DePT(prompt_length=vectors(name), max_length=max_length, prompt_init="vocab")
    return PromptTuning(prompt_length=vectors(name), prompt_init="vocab")


def random_batch(entrant: Entrant, size: Size, seed: int = 1) -> dict[str, np.ndarray]:
    """Returns one batch of random tokens in the library's format, without padding."""
    random = np.random.default_rng(seed)
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
        check_device(entrant.device)
        size = SIZES[entrant.model]
        config = make_config(size, entrant.scan, **computed_fields(entrant))
        params = (
            cheap_params(config) if entrant.device == "cpu" and entrant.dtype == "float32" else device_params(config)
        )
        backbone = Backbone(entrant.model, config, params, None)
        if entrant.text is None:
            batches, label_tokens = [random_batch(entrant, size)], None
        else:
            from benchmarks.texts import text_batches

            batches, label_tokens = text_batches(entrant)
        model = PromptedModel.build(backbone, make_method(entrant.method, entrant.max_length), entrant.share_prompt)
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
        self._entrant, self._config, self._method = entrant, config, model.method

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
            self._wait(self._take(batch))
        return {"compile_s": seconds, "programs": len(self._programs)}

    def step(self) -> tuple[float, int]:
        """Takes as many steps as the entrant has batches a step, one behind the other."""
        rows = 0
        for _ in range(self._batches_a_step):
            batch = self._batches[self._taken % len(self._batches)]
            self._taken += 1
            loss = self._take(batch)
            rows += int(batch["label"].shape[0])
        return self._wait(loss), rows

    def describe(self) -> dict[str, Any]:
        """Returns the trainable parameters, the versions, and which attention the config asks for."""
        versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        return {
            "parameters": self._parameters,
            "versions": versions,
            "attention": self._config.attention,
        }

    def flops(self) -> int:
        """Returns the operations of a step by formula: what the method needs, whichever way layers are written down."""
        unrolled = dataclasses.replace(self._config, scan_layers=False)
        entrant = self._entrant
        return step_flops(unrolled, self._method, BatchShape(entrant.batch, entrant.source, entrant.target)).total

    def device_peak_mib(self) -> float:
        """Returns the peak of the device's memory that arrays of this process had, since its start, in MiB."""
        statistics = jax.local_devices()[0].memory_stats()
        assert statistics is not None
        return float(statistics["peak_bytes_in_use"] / 2**20)

    def _take(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Takes a step, without waiting for it, and returns its loss."""
        self._state, metrics = self._programs[self._shape(batch)](self._state, self._frozen, batch)
        return metrics["loss"]

    def _wait(self, loss: jax.Array) -> float:
        jax.block_until_ready(self._state)
        return float(loss)

    def _shape(self, batch: dict[str, jax.Array]) -> tuple[int, ...]:
        return (*batch["source"].shape, *batch["targets"].shape)
