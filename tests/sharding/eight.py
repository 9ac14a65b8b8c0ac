"""What eight devices compute: every method on every backbone, under every preset of a mesh, and on one device."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.sharding import Placement, to_host
from deptjax.testing import tiny_gpt2, tiny_llama, tiny_t5
from deptjax.training.optim import make_optimizer
from deptjax.training.state import TrainState
from deptjax.training.step import make_loss, make_train_step
from tests.cases import METHODS, RATES, batch_of, rows_of

PRESETS = {"data": 8, "fsdp": 8, "tensor": 4, "fsdp+tensor": 8}  # with the number of devices
# Sizes that eight devices divide; the tiny backbones of other tests have prime ones.
FAMILIES = {
    "llama": (tiny_llama, {"num_heads": 8, "num_kv_heads": 4, "mlp_dim": 40, "vocab_size": 64}),
    "t5": (tiny_t5, {"width": 24, "num_heads": 4, "mlp_dim": 32, "vocab_size": 64, "gated": True, "tied": False}),
    "gpt2": (tiny_gpt2, {"num_heads": 4, "mlp_dim": 40, "vocab_size": 64}),
}
STEPS = 3
COMPILED: list[str] = []  # what XLA has compiled so far, by the name of the event
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **more: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def cases() -> list[tuple[str, str, bool]]:
    """Returns family, method, and whether layers are scanned."""
    return [(family, method, family != "gpt2") for family in FAMILIES for method in METHODS]


def backbone_of(family: str, scan: bool) -> Backbone:
    """Returns a tiny backbone that a mesh can split."""
    make, fields = FAMILIES[family]
    return make(scan_layers=scan, **fields)


def trained(backbone: Backbone, method: str, placement: Placement) -> tuple[list[float], Any]:
    """Returns the losses of a few steps, dropout included, and the parameters after them."""
    model = PromptedModel.build(backbone, METHODS[method])
    trainable, frozen = model.init(jax.random.key(1), backbone.params, backbone.vocabulary())
    groups, axes = model.method.groups(trainable), model.method.axes
    # Small steps: where a gradient is all but 0, Adam turns the rounding of a sum into a part of its step.
    used = {name: (lambda step, rate=RATES[name] / 50: rate) for name in set(jax.tree.leaves(groups))}
    tx = make_optimizer(used, groups)
    state = TrainState.create(jax.tree.map(jnp.copy, trainable), tx, jax.random.key(5))
    state = placement.put(state, placement.of_trainable(state, axes))
    frozen = placement.put(frozen, placement.of_backbone(frozen))
    step = make_train_step(make_loss(model, dropout=True), tx, placement, axes)
    lengths = [7, 3, 5, 6, 1, 2, 4, 7]
    losses = []
    for seed in range(STEPS):
        sources, targets = rows_of(lengths, seed), rows_of([2, 3, 1, 2, 3, 1, 2, 3], seed + 100)
        batch = {name: np.asarray(array) for name, array in batch_of(sources, targets, 7, 3).items()}
        before, compiled = jax.tree.map(lambda a: a.sharding, state), len(COMPILED)
        state, metrics = step(state, frozen, placement.put_batch(batch))
        losses.append(float(metrics["loss"]))
        assert before == jax.tree.map(lambda a: a.sharding, state), "a step leaves its state as it was laid out"
        assert seed == 0 or len(COMPILED) == compiled, "a step is compiled once for each shape"
    return losses, to_host(state.trainable)


def train_all(folder: pathlib.Path) -> None:
    """Trains all cases on one device and on the meshes; writes losses and parameters to `results.npz`."""
    results: dict[str, np.ndarray] = {}
    for family, method, scan in cases():
        backbone = backbone_of(family, scan)
        for preset, devices in {"one": 1, **PRESETS}.items():
            mesh = "data" if preset == "one" else preset
            placement = Placement.over(jax.devices()[:devices], mesh, config=backbone.config)
            losses, trainable = trained(backbone, method, placement)
            name = f"{family}-{method}-{preset}"
            results[f"{name}/loss"] = np.asarray(losses)
            for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
                results[f"{name}/{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
    np.savez(folder / "results.npz", **results)
