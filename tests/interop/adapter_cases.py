"""Adapters to read: the goldens as folders, their backbones, and our logits for a prompt."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.interop.convert import fill_tree
from deptjax.interop.huggingface import config_from_dict
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.prompt import Prompt
from deptjax.testing import tiny_tokenizer
from tests.goldens.make_goldens import FOLDER
from tests.goldens.make_peft_goldens import ADAPTERS


class Arrays:
    """Arrays in memory, as a `TensorSource`."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def where(self, name: str) -> str:
        return "memory"

    def blocks(self, name: str, wanted: tuple[int, int] | None = None) -> Any:
        yield 0, self.arrays[name]


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Returns the stored arrays of a golden."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        return dict(stored)


@functools.cache
def backbone_of(variant: str, scan_layers: bool = False) -> Backbone:
    """Returns a golden's frozen model."""
    stored = golden(variant)
    config = dataclasses.replace(config_from_dict(json.loads(str(stored["config"]))), scan_layers=scan_layers)
    weights = {key.removeprefix("weight:"): value for key, value in stored.items() if key.startswith("weight:")}
    params = fill_tree(config, Arrays(weights), scan_layers=scan_layers, dtype="float32")
    return Backbone(variant, config, params, tiny_tokenizer())


def write_adapter(name: str, folder: Path, tensors: dict[str, np.ndarray] | None = None, **fields: Any) -> Path:
    """Writes a golden's folder, with some fields of its config changed (or left out: `...`), or other tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, data in golden(name).items():
        if key.startswith("file:"):
            (folder / key.removeprefix("file:")).write_bytes(data.tobytes())
    config = {**json.loads((folder / "adapter_config.json").read_text()), **fields}
    config = {field: value for field, value in config.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        from safetensors.numpy import save_file

        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def our_logits(backbone: Backbone, prompt: Prompt, data: dict[str, np.ndarray]) -> np.ndarray:
    """Returns our logits (B, U, V) for a batch."""
    model = PromptedModel.build(backbone, prompt.method)
    arrays = {key: jnp.asarray(data[key]) for key in ("source", "source_mask", "targets")}
    trainable = jax.tree.map(jnp.asarray, prompt.trainable)
    return np.asarray(jax.jit(model.target_logits)(trainable, backbone.params, arrays))


def assert_close(got: np.ndarray, wanted: np.ndarray, mask: np.ndarray, tolerance: float = 1e-4) -> None:
    """Asserts that logits at real targets are equal, relative to the largest."""
    got, wanted = got[mask], wanted[mask]
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


__all__ = ["ADAPTERS", "assert_close", "backbone_of", "golden", "our_logits", "write_adapter"]
