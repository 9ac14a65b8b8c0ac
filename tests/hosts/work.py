"""What the processes of these tests do; a host of several, or one alone, runs the same function."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from deptjax.distributed import on_first_host, together
from deptjax.errors import UserError
from deptjax.inference.predictor import evaluate
from deptjax.interop.load import load_backbone
from deptjax.models.backbone import Backbone
from deptjax.sharding import Placement
from deptjax.testing import tiny_llama, tiny_t5
from deptjax.training.population import train_population
from deptjax.training.run import train
from tests.cases import METHODS
from tests.reviews import review_task

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "eval_every": 2,
    "log_every": 1,
    "buckets": 1,
    "max_length": 13,
}
LONG: dict[str, Any] = {**SETTINGS, "steps": 16, "eval_every": 8, "checkpoint_every": 2}


@functools.cache
def backbone_of(family: str) -> Backbone:
    """Returns a tiny backbone whose sizes are even."""
    sizes = {"vocab_size": 52, "num_heads": 4, "head_dim": 6, "mlp_dim": 36}
    return tiny_llama(num_kv_heads=2, **sizes) if family == "llama" else tiny_t5(width=24, **sizes)


def placed(family: str, mesh: str) -> Backbone:
    """Returns the backbone over all devices of all hosts."""
    backbone = backbone_of(family)
    placement = Placement.over(mesh=mesh, config=backbone.config)
    params = placement.put(backbone.params, placement.of_backbone(backbone.params))
    return dataclasses.replace(backbone, params=params, placement=placement)


def tune(folder: str, *cases: str) -> None:
    """Trains cases such as `llama-dept-fsdp:2`, each in a folder of its name; then scores the last one's prompt."""
    for case in cases:
        family, method, mesh = case.split("-")
        backbone = placed(family, mesh)
        run = train(backbone, METHODS[method], review_task(dev=5), pathlib.Path(folder) / case, **SETTINGS)
        assert run.finished
        assert run.prompt is not None
        if method == "dept":
            scores = evaluate(backbone, run.prompt, review_task(dev=5), split="dev", batch_size=4)
            assert scores == run.prompt.metrics
        if method == "full" and jax.process_count() > 1 and mesh.startswith("fsdp"):
            assert not backbone.embedding.is_fully_addressable
    print(jax.process_count(), jax.device_count())


def tune_population(folder: str, mesh: str) -> None:
    """Trains two members at once."""
    members = [{"seed": 42}, {"seed": 1}]
    backbone = placed("llama", mesh)
    population = train_population(backbone, METHODS["dept"], review_task(dev=5), folder, members, **SETTINGS)
    assert [member.ended for member in population.members] == ["finished", "finished"]
    assert sorted(population.prompts) == ["reviews"]


@dataclasses.dataclass(frozen=True)
class Struck(Placement):
    """A placement whose process is sent a signal as it places its n-th batch for training; steps are slow from then."""

    number: int = 0
    batches: int = 0
    count: list[int] = dataclasses.field(default_factory=list)

    def put_batch(self, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, jax.Array]:
        self.count.append(1)
        if len(self.count) == self.batches:
            print("struck", time.time(), flush=True)
            os.kill(os.getpid(), self.number)
        if len(self.count) >= self.batches:
            time.sleep(0.5)
        return super().put_batch(batch, axis)


def tune_long(folder: str, mesh: str, host: str = "", number: str = "0", batches: str = "0") -> None:
    """Trains on; one of the hosts is sent a signal."""
    backbone = placed("llama", mesh)
    assert backbone.placement is not None
    placement = backbone.placement
    if host == str(jax.process_index()):
        placement = Struck(placement.mesh, placement.rules, int(number), int(batches))
    run = train(backbone, METHODS["lora"], review_task(dev=5), folder, placement=placement, progress=None, **LONG)
    print("finished" if run.finished else f"stopped {run.signal}", run.step)


def refuse(where: str) -> None:
    """One host finds something wrong: the first, where the others wait for it, or another one while all work."""

    def wrong() -> None:
        raise UserError("this folder holds something else; choose another")

    with together():
        if where == "first":
            on_first_host(wrong)
        if jax.process_index() == 1:
            wrong()
        time.sleep(60)  # as a host hangs in a step that the other one never takes


def say(text: str) -> None:
    """Prints, on the first host what the first host says."""
    print(json.dumps(on_first_host(lambda: {"said": text, "by": jax.process_index()})))


def load(small: str, large: str) -> None:
    """Loads a folder, and prints how much memory that took at its peak; a small one first, for what is loaded once."""

    def resident(name: str) -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    load_backbone(small, mesh="fsdp")
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is resident now
    before = resident("VmRSS")
    params = load_backbone(large, mesh="fsdp").params
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    print(json.dumps({"peak": resident("VmHWM") - before, "held": held, "tree": sum(leaf.nbytes for leaf in leaves)}))
    on_first_host(lambda: None)
