"""What eight devices compute: every method on every backbone, on presets of a mesh, and on one device.

The first methods on the first backbones are on every preset. Of the others a pair of a backbone and a method is on one
of the four, so chosen that each backbone and each method meets them all: each pair costs two programs instead of five.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.methods.base import FIXED
from deptjax.models.backbone import Backbone
from deptjax.sharding import Placement, to_host
from deptjax.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from deptjax.training.optim import make_optimizer
from deptjax.training.state import TrainState
from deptjax.training.step import make_loss, make_train_step
from tests.cases import (
    ENCODED,
    METHODS,
    PROMPT_METHODS,
    RATES,
    SOURCED,
    VARIANTS,
    Case,
    batch_of,
    make_case,
    method_on,
    rows_of,
)

PRESETS = {"data": 8, "fsdp": 8, "tensor": 4, "fsdp+tensor": 8}  # with the number of devices
# Sizes that eight devices divide; the tiny backbones of other tests have prime ones.
FAMILIES = {
    "llama": (tiny_llama, {"num_heads": 8, "num_kv_heads": 4, "mlp_dim": 40, "vocab_size": 64}),
    "t5": (tiny_t5, {"width": 24, "num_heads": 4, "mlp_dim": 32, "vocab_size": 64, "gated": True, "tied": False}),
    "gpt2": (tiny_gpt2, {"num_heads": 4, "mlp_dim": 40, "vocab_size": 64}),
    "bert": (tiny_bert, {"num_heads": 4, "mlp_dim": 40, "vocab_size": 64}),
}
STEPS = 3
COMPILED: list[str] = []  # what XLA has compiled so far, by the name of the event
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **more: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def cases() -> list[tuple[str, str, list[str]]]:
    """Returns families and methods, and the presets that each pair is on."""
    presets, found = list(PRESETS), []
    for row, family in enumerate(FAMILIES):
        for column, method in enumerate([*METHODS, *PROMPT_METHODS, *ENCODED, SOURCED, *VARIANTS]):
            one = presets[(row + column) % len(presets)]
            found.append((family, method, presets if method in METHODS and family != "bert" else [one]))
    return found


@functools.cache
def backbone_of(family: str, scan: bool) -> Backbone:
    """Returns a tiny backbone that a mesh can split; the same one at each call."""
    make, fields = FAMILIES[family]
    return make(scan_layers=scan, **fields)


def batches_of(case: Case) -> list[dict[str, np.ndarray]]:
    """Returns a batch of eight rows for each step."""
    batches = []
    for seed in range(STEPS):
        sources = rows_of([7, 3, 5, 6, 1, 2, 4, 7], seed)
        targets = rows_of([2, 3, 1, 2, 3, 1, 2, 3], seed + 100)
        batch = case.read(case.taken(batch_of(sources, targets, 7, 3)))
        batches.append({name: np.asarray(array) for name, array in batch.items()})
    return batches


def trained(case: Case, batches: list[dict[str, np.ndarray]], placement: Placement) -> tuple[list[float], Any]:
    """Returns the losses of a few steps, dropout included, and the parameters after them."""
    groups, axes = case.model.method.groups(case.trainable), case.model.method.axes
    # Small steps: where a gradient is all but 0, Adam turns the rounding of a sum into a part of its step.
    used = {name: (lambda step, rate=RATES[name] / 50: rate) for name in set(jax.tree.leaves(groups)) - {FIXED}}
    tx = make_optimizer(used, groups)
    state = TrainState.create(jax.tree.map(jnp.copy, case.trainable), tx, jax.random.key(5))
    state = placement.put(state, placement.of_trainable(state, axes))
    frozen = placement.put(case.frozen, placement.of_backbone(case.frozen))
    step = make_train_step(make_loss(case.model, dropout=True), tx, placement, axes)
    losses = []
    for number, batch in enumerate(batches):
        before, compiled = jax.tree.map(lambda a: a.sharding, state), len(COMPILED)
        state, metrics = step(state, frozen, placement.put_batch(batch))
        losses.append(float(metrics["loss"]))
        assert before == jax.tree.map(lambda a: a.sharding, state), "a step leaves its state as it was laid out"
        assert number == 0 or len(COMPILED) == compiled, "a step is compiled once for each shape"
    return losses, to_host(state.trainable)


def train_all(folder: pathlib.Path) -> None:
    """Trains all cases on one device and on the meshes; writes losses and parameters to `results.npz`."""
    results: dict[str, np.ndarray] = {}
    for family, method, presets in cases():
        backbone = backbone_of(family, family != "gpt2")
        case = make_case(backbone, method_on(backbone, method))
        batches = batches_of(case)
        for preset in ("one", *presets):
            devices, mesh = (1, "data") if preset == "one" else (PRESETS[preset], preset)
            placement = Placement.over(jax.devices()[:devices], mesh, config=backbone.config)
            losses, trainable = trained(case, batches, placement)
            name = f"{family}-{method}-{preset}"
            results[f"{name}/loss"] = np.asarray(losses)
            for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
                results[f"{name}/{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
    np.savez(folder / "results.npz", **results)
