"""Checkpoints read into shards: the parts of each leaf are those of the leaf read whole, and they answer alike."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.interop.load import load_backbone
from deptjax.methods import LoRA
from deptjax.models.backbone import Backbone
from deptjax.models.sizes import SIZES
from deptjax.sharding import backbone_axes, sizes_of, trainable_axes
from deptjax.testing import random_params, save_hf_folder
from tests.cases import METHODS, make_case
from tests.interop.load_test import write_gguf
from tests.interop.t5x_folders import unpack
from tests.reviews import review_prompt, review_rows, review_task
from tests.sharding.eight import FAMILIES, backbone_of
from tests.sharding.process import on_eight

MESH = "data:2,fsdp:2,model:2"


def loads_the_same_on_eight(folder: pathlib.Path) -> None:
    """Loads every format whole and in shards; what the process of the test does."""
    places: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}
    for family in FAMILIES:
        place = save_hf_folder(backbone_of(family, False), folder / family)
        for scan in (False, True):
            places[f"{family} {scan}"] = (place, {"scan_layers": scan})
    places["gguf"] = (write_gguf(folder / "m.gguf"), {"sharding_rules": "kv_heads:none,mlp:none,vocab:none"})
    places["t5x"] = (unpack(folder) / "sharded" / "checkpoint_3", {"tokenizer": folder / "t5"})
    for name, (place, options) in places.items():
        whole = load_backbone(place, mesh="data", **options)
        split = load_backbone(place, mesh=MESH, **options)
        assert whole.placement is not None
        assert split.placement is not None
        wanted = split.placement.of_backbone(whole.params)
        there = 0
        for (path, a), b, sharding in zip(
            jax.tree_util.tree_leaves_with_path(whole.params),
            jax.tree.leaves(split.params),
            jax.tree.leaves(wanted),
            strict=True,
        ):
            np.testing.assert_array_equal(b, a, err_msg=f"{name} {jax.tree_util.keystr(path)}")
            assert b.sharding == sharding, (name, path)
            there += sum(shard.data.size for shard in b.addressable_shards)
        parts = there / sum(leaf.size for leaf in jax.tree.leaves(whole.params))
        assert parts < 4, f"{name}: all devices together hold {parts} models; 2 and, of norms and positions, some more"
        assert split.fingerprint == whole.fingerprint
        assert split.embedding_rms == whole.embedding_rms


def answers_the_same_on_eight(folder: pathlib.Path) -> None:
    """Prompts of every method answer alike on a model that is whole and on one that is split."""
    texts = [row["text"] for row in review_rows(9, seed=4)]
    for family in ("llama", "t5"):
        split = load_backbone(save_hf_folder(backbone_of(family, False), folder / family), mesh=MESH)
        whole = Backbone(split.name, split.config, jax.tree.map(np.asarray, split.params), split.tokenizer)
        prompts = {name: review_prompt(make_case(whole, method)) for name, method in METHODS.items()}
        one, many = Predictor(whole, prompts, batch_size=4), Predictor(split, prompts, batch_size=4)
        for name, prompt in prompts.items():
            for a, b in zip(one(texts, name), many(texts, name), strict=True):
                assert a.scores
                assert b.scores
                assert a.text == b.text
                np.testing.assert_allclose(list(a.scores.values()), list(b.scores.values()), rtol=1e-4, atol=1e-5)
            if name in ("dept", "full"):
                score, again = (evaluate(b, prompt, review_task(dev=9), split="dev") for b in (whole, split))
                assert score == again


@pytest.mark.parametrize("function", [loads_the_same_on_eight, answers_the_same_on_eight])
def test_a_split_model_is_the_model(function: Callable[[pathlib.Path], None], tmp_path: pathlib.Path) -> None:
    on_eight(function, tmp_path)


def test_a_mesh_of_more_devices_than_there_are_names_one_that_fits(tmp_path: pathlib.Path) -> None:
    place = save_hf_folder(backbone_of("llama", False), tmp_path / "m")
    with pytest.raises(UserError, match="mesh fsdp:8 is of 8 devices, and the number of devices is 1; use data:1"):
        load_backbone(place, mesh="fsdp:8")


@pytest.mark.parametrize("name", ["t5-small", "t5-1.1-small", "bert-base", "gpt2", "llama2-7b"])
def test_every_parameter_of_every_family_has_axes(name: str) -> None:
    """And each axis is of the size that the config says, so that what a mesh divides is what is split."""
    config = SIZES[name]
    shrunk = {"num_layers": 1} if hasattr(config, "num_layers") else {"num_encoder_layers": 1, "num_decoder_layers": 1}
    config = dataclasses.replace(config, **shrunk, scan_layers=True)
    sizes = sizes_of(config)
    shapes = jax.eval_shape(lambda: random_params(config))
    heads = {"heads": config.head_dim, "kv_heads": config.head_dim}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(key.key for key in path)
        axes = backbone_axes(names)
        assert len(axes) == leaf.ndim, names
        for axis, size in zip(axes, leaf.shape, strict=True):
            unit = 1 if names[-1] == "rel_embedding" else heads.get(axis or "", 1)
            assert axis not in sizes or size == sizes[axis] * unit, (names, axis)


def test_a_parameter_without_axes_is_an_error() -> None:
    with pytest.raises(UserError, match="no axis rule covers parameter 'layers_0/mlp/gate/shift'; add its logical"):
        backbone_axes(("layers_0", "mlp", "gate", "shift"))


def test_large_parameters_of_a_method_lie_as_the_kernels_beside_them() -> None:
    inside = ("backbone", "layers", "mlp", "down", "site")
    axes = LoRA.axes
    assert trainable_axes((*inside, "lora_a"), 3, axes) == ("layers", "mlp", None)
    assert trainable_axes(("opt_state", "1", "mu", *inside, "lora_b"), 3, axes) == ("layers", None, "embed")
    assert trainable_axes((*inside, "lora_b"), 4, axes, members=True) == ("members", "layers", None, "embed")
    assert trainable_axes((*inside, "keys"), 3, {}) == (None, None, None)
    assert trainable_axes(("input", "lora_a"), 2, axes) == (None, None)
    assert trainable_axes(("backbone", "layers_0", "attention", "query", "kernel"), 2, {}) == ("embed", "heads")
    assert trainable_axes(("opt_state", "backbone", "0", "count"), 0, {}) == ()
    for path in (("trainable",), ("opt_state", "inner_states", "backbone", "0", "mu")):
        assert trainable_axes((*path, "encoder", "layers_0", "attention", "query", "kernel"), 2, {}) == (
            "embed",
            "heads",
        )
        t5 = (*path, "backbone", "encoder", "layers_0", "attention", "query", "kernel")
        assert trainable_axes(t5, 2, {}) == ("embed", "heads")
        assert trainable_axes((*path, "input", "rows", "up", "kernel"), 2, {}) == (None, None)
    assert trainable_axes(("opt_state", "backbone", "0", "count"), 1, {}, members=True) == ("members",)
