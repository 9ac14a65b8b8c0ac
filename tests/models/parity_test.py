"""Our backbones against torch's: stored goldens that always run, and the live oracle where torch is installed."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from deptjax.interop.convert import fill_tree
from deptjax.interop.huggingface import read_config
from deptjax.interop.safetensors import SafetensorsFolder
from tests.goldens.make_goldens import FOLDER, VARIANTS, make, make_model, run, scalar_weights

TOLERANCE = 1e-4  # of a model, in float32, relative to the largest value


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Returns the stored arrays of a variant."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        return dict(stored)


def write_folder(name: str, folder: Path) -> Path:
    """Writes a golden's model as its publishers would, and returns the folder."""
    stored = golden(name)
    weights = {key.removeprefix("weight:"): value for key, value in stored.items() if key.startswith("weight:")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(stored["config"]))
    return folder


def logits_and_gradient(folder: Path, scan_layers: bool, data: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Returns our logits (B, U, V) for the model in a folder, and the gradient of the goldens' scalar (B, T, D)."""
    config = dataclasses.replace(read_config(folder), scan_layers=scan_layers)
    params = fill_tree(config, SafetensorsFolder(folder), scan_layers=scan_layers, dtype="float32")
    module = config.make()
    source, targets = jnp.asarray(data["source"]), jnp.asarray(data["targets"])
    embeds = module.apply({"params": params}, source, method="embed")

    def scalar(embeds: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = module.apply(
            {"params": params}, embeds, jnp.asarray(data["source_mask"]), None, targets, method="target_states"
        )
        logits = module.apply({"params": params}, states, method="head")
        return jnp.sum(logits * scalar_weights(logits.shape) * data["target_mask"][..., None]), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(embeds)
    return np.asarray(logits), np.asarray(gradient)


def assert_close(got: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Fails where the largest difference is above the tolerance, relative to the largest wanted value."""
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_are_those_of_torch(name: str, scan_layers: bool, tmp_path: Path) -> None:
    stored = golden(name)
    logits, gradient = logits_and_gradient(write_folder(name, tmp_path), scan_layers, stored)
    real = stored["target_mask"]
    assert_close(logits[real], stored["logits"][real])
    assert_close(gradient, stored["gradient"])
    assert not gradient[~stored["source_mask"]].any()


def test_every_variant_has_a_golden_of_its_own_config() -> None:
    others = ("bert_", "peft_", "t5x_")  # goldens of formats, with makers and tests of their own
    assert sorted(p.stem for p in FOLDER.glob("*.npz") if not p.stem.startswith(others)) == sorted(VARIANTS)
    for name, fields in VARIANTS.items():
        assert json.loads(str(golden(name)["config"])) == fields


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_still_gives_the_goldens(name: str) -> None:
    pytest.importorskip("torch")
    stored, made = golden(name), make(name)
    assert stored.keys() == made.keys()
    real = stored["target_mask"]
    for key, value in stored.items():
        if key == "logits":
            assert_close(made[key][real], value[real], 1e-5)
        elif key == "gradient":
            assert_close(made[key], value, 1e-5)
        else:
            np.testing.assert_array_equal(made[key], value)


@pytest.mark.parametrize("name", ["gpt2", "llama_rope_llama3", "llama_tied", "mistral", "t5_v1_0", "t5_v1_1", "mt5"])
def test_a_folder_that_transformers_saved_gives_the_same(name: str, tmp_path: Path) -> None:
    """The config as transformers 5 writes it, and its shards, against the live model with other weights."""
    pytest.importorskip("torch")
    model, data = make_model(VARIANTS[name], seed=71), golden(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    wanted_logits, wanted_gradient = run(model, data)
    logits, gradient = logits_and_gradient(tmp_path, False, data)
    real = data["target_mask"]
    assert_close(logits[real], wanted_logits[real])
    assert_close(gradient, wanted_gradient)
