"""What is written comes back bit for bit, in the layout of T5X, and never in the place of something else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.interop.load import load_backbone
from deptjax.interop.t5x_save import save_t5x
from deptjax.interop.t5x_store import T5XStore
from deptjax.models.backbone import Backbone
from deptjax.models.t5 import T5Config
from deptjax.testing import random_params, tiny_llama, tiny_tokenizer
from tests.interop.t5x_folders import read, scalable, unpack

T5 = {"vocab_size": 61, "width": 24, "num_encoder_layers": 2, "num_decoder_layers": 3, "num_heads": 3}


def make(dtype: str = "float32", **fields: Any) -> Backbone:
    """Returns a random T5."""
    config = T5Config(**{**T5, "head_dim": 5, "mlp_dim": 31, **fields})
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    return Backbone("tiny", dataclasses.replace(config, dtype=dtype), params, tiny_tokenizer())


def load(place: Path, **options: Any) -> Backbone:
    return load_backbone(place, tokenizer=tiny_tokenizer(), **options)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [{"gated": True, "activation": "gelu_new", "tied": False}, {"dropout_rate": 0.0}],
    ids=["t5_1_1", "t5_1_0"],
)
def test_a_round_trip_is_exact(
    fields: dict[str, Any], dtype: str, scan_layers: bool, shards: int, tmp_path: Path
) -> None:
    backbone = make(dtype, scan_layers=scan_layers, **fields)
    place = save_t5x(backbone, tmp_path / "model", step=7, shards=shards)
    assert place == tmp_path / "model" / "checkpoint_7"
    again = load(place, dtype=dtype, scan_layers=scan_layers)
    assert again.config == backbone.config
    assert again.fingerprint == backbone.fingerprint
    jax.tree.map(np.testing.assert_array_equal, again.params, backbone.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {jnp.dtype(dtype)}
    other = load(save_t5x(load(place, dtype=dtype, scan_layers=not scan_layers), tmp_path), dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, other.params, load(place, dtype=dtype).params)


@pytest.mark.parametrize(("kind", "shards"), [("plain", 1), ("sharded", 4)])
def test_files_are_those_that_t5x_writes(kind: str, shards: int, tmp_path: Path) -> None:
    """Descriptions and chunks, all but the compression, on which T5X's versions differ; and no optimizer state."""
    theirs = unpack(tmp_path) / kind / "checkpoint_3"
    backbone = load(theirs)
    ours = save_t5x(backbone, tmp_path / "ours", step=3, shards=shards)
    wanted, got = read(theirs), read(ours)
    assert got["version"] == wanted["version"] == 3
    assert got["optimizer"]["state"]["param_states"] == {}
    assert (got["optimizer"]["state"]["step"], got["optimizer"]["state"]["step"].dtype) == (3, np.int32)
    for tree in (wanted["optimizer"]["target"], got["optimizer"]["target"]):
        assert drop(tree, "compressor")
    assert got["optimizer"]["target"] == wanted["optimizer"]["target"]
    for array in theirs.glob("target.*"):
        assert {file.name for file in array.iterdir()} == {file.name for file in (ours / array.name).iterdir()}
        zarray = [json.loads((place / array.name / ".zarray").read_text()) for place in (theirs, ours)]
        assert {**zarray[0], "compressor": None} == {**zarray[1], "compressor": None}


def drop(tree: Any, key: str) -> bool:
    """Takes a key out of all dicts of a tree, and returns whether it was there."""
    if not isinstance(tree, dict):
        return False
    return any([tree.pop(key, None) is not None, *(drop(value, key) for value in tree.values())])


def test_a_scanned_tree_is_written_for_scalable_t5(tmp_path: Path) -> None:
    """Names, shapes and values are those of T5X's network, whose parameters the golden holds."""
    weights, _ = scalable()
    fields = {"vocab_size": 53, "width": 12, "head_dim": 5, "mlp_dim": 17, "gated": True, "tied": False}
    config = T5Config(**{**T5, **fields}, activation="gelu_new", scan_layers=True)
    first = save_t5x(Backbone("b", config, random_params(config), None), tmp_path)
    store = T5XStore(first)
    assert {".".join(path): store.shape(path) for path in store.paths()} == {k: v.shape for k, v in weights.items()}
    gin = (first / "model.gin").read_text()
    assert "from t5x.examples.scalable_t5 import network\n\nnetwork.T5Config:\n  vocab_size = 53\n" in gin
    assert "  mlp_activations = ('gelu', 'linear')\n" in gin
    assert "  scan_layers = True\n" in gin


def test_nothing_is_overwritten_and_nothing_half_written_is_left(tmp_path: Path) -> None:
    place = save_t5x(make(), tmp_path)
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="checkpoint_0: there is a checkpoint already; choose another step or folder"):
        save_t5x(make(tied=False), tmp_path)
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the folder cannot be made"):
        save_t5x(make(), tmp_path / "file")
    broken = make()
    broken.params["decoder"]["decoder_norm"]["scale"] = np.array(["text"])
    with pytest.raises(UserError, match=r"'target\.decoder\.decoder_norm\.scale' cannot be written"):
        save_t5x(broken, tmp_path, step=1)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["checkpoint_0", "file"]


@pytest.mark.parametrize(
    ("backbone", "options", "match"),
    [
        (tiny_llama(), {}, "tiny-llama: T5X checkpoints are of T5, but this is a llama model; save a T5"),
        (make(norm_eps=1e-5), {}, r"norm_eps is 1e-05, but T5X's T5 has 1e-06 always"),
        (make(relative_max_distance=64), {}, "relative_max_distance is 64, but T5X's T5 has 128 always"),
        (make(decoder_start_token=2), {}, "decoder_start_token is 2, but T5X's T5 has 0 always"),
        (make(activation="gelu"), {}, "activation 'gelu' has no name in T5X"),
        (make(), {"step": -1}, "step is -1"),
        (make(), {"shards": 0}, "shards is 0"),
    ],
    ids=str,
)
def test_what_t5x_cannot_state_is_refused(
    backbone: Backbone, options: dict[str, int], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        save_t5x(backbone, tmp_path / "model", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="is written to a local folder"):
        save_t5x(make(), "gs://bucket/model")
