"""What T5X wrote becomes the same function here, whatever the layout of the layers on either side."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.interop.load import load_backbone
from deptjax.interop.t5x import t5x_config
from deptjax.interop.t5x_save import save_t5x
from deptjax.interop.t5x_store import T5XStore
from deptjax.models.backbone import Backbone
from deptjax.models.t5 import T5Config
from deptjax.testing import random_params, tiny_tokenizer
from tests.interop.load_test import MEASURE
from tests.interop.t5x_folders import change, read, scalable, unpack, write_inline


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the checkpoints that T5X wrote; not to be changed."""
    return unpack(tmp_path_factory.mktemp("t5x"))


def load(place: str | Path, **options: Any) -> Backbone:
    """Loads with a tokenizer of whole words."""
    return load_backbone(place, tokenizer=tiny_tokenizer(), **options)


def logits(backbone: Backbone, source: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the logits (B, U, V) that predict each target."""

    def run(module: Any) -> Any:
        states = module.target_states(module.embed(jnp.asarray(source)), jnp.asarray(source) > 0, None, targets)
        return module.head(states)

    return np.asarray(backbone.module().apply({"params": backbone.params}, method=run))


def golden(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns source, targets and logits of a checkpoint that T5X wrote."""
    with np.load(folder / "golden.npz") as stored:
        return stored["encoder_input_tokens"], jnp.asarray(stored["decoder_target_tokens"]), stored["logits"]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_the_logits_are_those_of_t5x(kind: str, scan_layers: bool, written: Path) -> None:
    source, targets, wanted = golden(written / kind)
    backbone = load(written / kind / "checkpoint_3", scan_layers=scan_layers)
    np.testing.assert_allclose(logits(backbone, source, targets), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_in_bfloat16_each_parameter_is_rounded_once(kind: str, written: Path) -> None:
    """The logits differ by bfloat16's own rounding, a relative 2^-9 for each of the 60 results between ids and logits.

    There are 4 layers of 2 or 3 parts with about 5 products each, and their errors are independent: 60^0.5 * 2^-9 is
    1.5 %, the parameters' own rounding is as much again, and twice the sum of both squares is the bound here.
    """
    source, targets, wanted = golden(written / kind)
    exact = load(written / kind / "checkpoint_3")
    backbone = load(written / kind / "checkpoint_3", dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), exact.params)
    jax.tree.map(np.testing.assert_array_equal, backbone.params, rounded)
    error = np.linalg.norm(logits(backbone, source, targets) - wanted) / np.linalg.norm(wanted)
    assert error < 2 * (2 * 60) ** 0.5 * 2**-9


def test_the_config_is_inferred(written: Path) -> None:
    config = t5x_config(T5XStore(written / "plain" / "checkpoint_3"))
    sizes = {"vocab_size": 512, "width": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    assert config == T5Config(**sizes, head_dim=16, mlp_dim=128, activation="gelu_new", gated=True, tied=False)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("key", [None, "layers"])
def test_scanned_layers_of_scalable_t5(key: str | None, axis: int, scan_layers: bool, tmp_path: Path) -> None:
    weights, batch = scalable()
    stored = {}
    for name, values in weights.items():
        stack, *rest = name.split(".")
        inside = rest[0] == stack
        stored[".".join([stack, key, *rest[1:]]) if inside and key else name] = (
            np.moveaxis(values, 1, axis) if inside else values
        )
    backbone = load(write_inline(tmp_path / "checkpoint_9", stored), scan_layers=scan_layers)
    assert (backbone.config.num_encoder_layers, backbone.config.num_decoder_layers) == (2, 3)
    assert (backbone.config.num_heads, backbone.config.head_dim, backbone.config.mlp_dim) == (3, 5, 17)
    got = logits(backbone, batch["source"], jnp.asarray(batch["targets"]))
    np.testing.assert_allclose(got, batch["logits"], rtol=0, atol=1e-4)


def test_unrolled_layers_of_scalable_t5(tmp_path: Path) -> None:
    """Each layer has a bias of its own there, and heads apart."""
    weights, batch = scalable()
    stored = {}
    for name, values in weights.items():
        stack, *rest = name.split(".")
        if rest[0] != stack:
            stored[name] = values
            continue
        for i in range(values.shape[1]):
            stored[".".join([stack, f"layers_{i}", *rest[1:]])] = values[:, i]
    backbone = load(write_inline(tmp_path / "checkpoint_9", stored))
    got = logits(backbone, batch["source"], jnp.asarray(batch["targets"]))
    np.testing.assert_allclose(got, batch["logits"], rtol=0, atol=1e-4)
    stored["decoder.layers_2.relpos_bias.rel_embedding"] = stored["decoder.layers_2.relpos_bias.rel_embedding"] + 1
    with pytest.raises(UserError, match="the layers of 'decoder' have different 'relpos_bias'"):
        load(write_inline(tmp_path / "checkpoint_10", stored))


def test_scanned_biases_that_differ_are_refused(tmp_path: Path) -> None:
    weights, _ = scalable()
    weights["encoder.encoder.relpos_bias.rel_embedding"][1, 1, 7] += 0.5
    with pytest.raises(UserError, match=r"the layers of 'encoder' have different 'relpos_bias' \(UMT5 has such\)"):
        load(write_inline(tmp_path / "checkpoint_9", weights))


def test_as_many_layers_as_features_are_on_axis_one(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "width": 3, "num_encoder_layers": 3, "num_decoder_layers": 3, "num_heads": 3}
    config = T5Config(**sizes, head_dim=3, mlp_dim=3, scan_layers=True)
    backbone = Backbone("square", config, random_params(config), tiny_tokenizer())
    again = load(save_t5x(backbone, tmp_path), scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, backbone.params)


def test_arrays_may_stand_in_the_msgpack_file(written: Path, tmp_path: Path) -> None:
    place = written / "sharded" / "checkpoint_3"
    store = T5XStore(place)
    wanted = load(place).params
    inline = {".".join(path): store.read(path) for path in store.paths()}
    jax.tree.map(np.testing.assert_array_equal, load(write_inline(tmp_path / "checkpoint_3", inline)).params, wanted)
    half = {name: values.astype(ml_dtypes.bfloat16) for name, values in inline.items()}
    got = load(write_inline(tmp_path / "checkpoint_4", half), dtype="bfloat16").params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(ml_dtypes.bfloat16)), got, wanted)


def test_where_an_array_was_first_written_does_not_matter(tmp_path: Path) -> None:
    """Drivers and directories are those of another machine; before tensorstore 0.1.14 the path stood elsewhere."""
    folder = unpack(tmp_path) / "plain" / "checkpoint_3"
    wanted = load(folder).params
    target = read(folder)["optimizer"]["target"]
    old, gone = target["encoder"]["encoder_norm"]["scale"], target["decoder"]["decoder_norm"]["scale"]
    old["path"], old["kvstore"] = old["kvstore"].pop("path"), {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
    gone["kvstore"] = {"driver": "gfile", "path": "/cns/home/somebody/checkpoint_3/" + gone["kvstore"]["path"]}
    url = target["token_embedder"]["embedding"]
    url["kvstore"] = "gs://bucket/model/checkpoint_3/" + url["kvstore"]["path"]
    change(folder, encoder__encoder_norm__scale=old, decoder__decoder_norm__scale=gone, token_embedder__embedding=url)
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, wanted)
    jax.tree.map(np.testing.assert_array_equal, load(folder / "checkpoint").params, wanted)


@pytest.mark.parametrize(
    ("name", "text", "changes"),
    [
        ("model.gin", "network.T5Config:\n  mlp_activations = ('silu', 'linear')\n", {"activation": "silu"}),
        ("../config.gin", "network.T5Config.dropout_rate = %RATE\nRATE = 0.25\n", {"dropout_rate": 0.25}),
        ("../config.gin", "network.T5Config.logits_via_embedding = False\nOther.dropout_rate = 0.9\n", {}),
    ],
)
def test_gin_files_say_what_shapes_do_not(name: str, text: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = unpack(tmp_path) / "plain" / "checkpoint_3"
    plain = load(folder).config
    (folder / name).write_text(text)
    assert load(folder).config == dataclasses.replace(plain, **changes)
    assert load(folder, dropout_rate=0.0).config.dropout_rate == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("T5Config.mlp_activations = ('gelu',)", r"model\.gin: 'mlp_activations' is \('gelu',\), but .* two input"),
        ("T5Config.mlp_activations = ('linear', 'gelu')", r"model\.gin: 'mlp_activations' is .* expected one of relu"),
        ("T5Config.mlp_activations = @f()", r"model\.gin: 'T5Config\.mlp_activations' is @f\(\), expected a plain"),
        (
            "T5Config.logits_via_embedding = True",
            r"'logits_via_embedding' is True, but .* has a 'decoder\.logits_dense",
        ),
        ("T5Config.dropout_rate = 1.5", r"'dropout_rate' is 1\.5, expected a number from 0"),
    ],
)
def test_a_gin_file_that_denies_the_checkpoint_is_refused(text: str, match: str, tmp_path: Path) -> None:
    folder = unpack(tmp_path) / "plain" / "checkpoint_3"
    (folder / "model.gin").write_text(text)
    refused(folder, match)


def test_a_hugging_face_config_goes_first(tmp_path: Path) -> None:
    folder = unpack(tmp_path) / "plain" / "checkpoint_3"
    (folder / "model.gin").write_text("T5Config.dropout_rate = 0.3")
    fields = {"model_type": "t5", "vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}
    fields |= {"num_heads": 4, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**fields, "dropout_rate": 0.05}))
    config = load(folder).config
    assert (config.activation, config.dropout_rate) == ("silu", 0.05)
    for changed, match in (
        ({"num_layers": 1}, r"parameter 'decoder\.layers_1\..*' is not one that this model has"),
        ({"num_layers": 3}, r"parameter 'encoder\.layers_2\..*' is missing"),
        ({"d_ff": 127}, r"'encoder\.layers_0\.mlp\.wi_0\.kernel' has shape \(64, 128\), expected \(64, 127\)"),
        ({"num_heads": 8}, r"'encoder\.relpos_bias\.rel_embedding' has shape \(4, 32\), expected \(8, 32\)"),
        (
            {"model_type": "llama", "hidden_size": 64},
            r"config\.json: 'd_model'|config\.json: 'd_kv'|is 't5'|is 'llama'",
        ),
    ):
        (folder / "config.json").write_text(json.dumps({**fields, **changed}))
        refused(folder, match)
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: not JSON")


def refused(folder: Path, match: str) -> None:
    """Asserts that a checkpoint is refused in one line."""
    with pytest.raises(UserError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder.parent) in str(caught.value)


def test_parameters_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    folder = unpack(tmp_path) / "plain" / "checkpoint_3"
    change(folder, encoder__layers_1__extra=np.ones(3, np.float32))
    refused(folder, r"parameter 'encoder\.layers_1\.extra' is not one that this model has")
    change(folder, encoder__layers_1__extra=None, decoder__layers_0__mlp__wo=None)
    refused(folder, r"parameter 'decoder\.layers_0\.mlp\.wo\.kernel' is missing")
    change(folder, token_embedder__embedding=None)
    refused(folder, r"there is no parameter 'token_embedder\.embedding'; not a T5 with T5X's names")


def test_other_models_of_t5x_are_refused(tmp_path: Path) -> None:
    embedding = {"token_embedder.embedding": np.ones((60, 4), np.float32)}
    refused(write_inline(tmp_path / "checkpoint_1", embedding), "there are no layers under 'encoder'")
    decoder = {**embedding, "decoder.layers_0.mlp.wo.kernel": np.ones((8, 4), np.float32)}
    refused(write_inline(tmp_path / "checkpoint_2", decoder), "not an encoder-decoder T5 of T5X's")


def test_a_tokenizer_must_be_given_or_stand_there(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer; give one with tokenizer= .* packaged:t5"):
        load_backbone(written / "plain" / "checkpoint_3")
    folder = unpack(tmp_path) / "plain" / "checkpoint_3"
    tiny_tokenizer(("this", "film")).save_pretrained(folder)
    assert load_backbone(folder).tokenizer("film").input_ids == [4]
    given = tiny_tokenizer(("film",))
    assert load_backbone(folder, tokenizer=given).tokenizer is given
    many = tiny_tokenizer(tuple(f"w{i}" for i in range(512)))
    with pytest.raises(UserError, match="the tokenizer has 515 tokens but the model only 512 embeddings"):
        load_backbone(folder, tokenizer=many)


@pytest.mark.parametrize(
    ("saved", "options"),
    [
        (False, {"dtype": "float32", "scan_layers": False}),
        (True, {"dtype": "float32", "scan_layers": False}),
        (False, {"dtype": "bfloat16", "scan_layers": True}),
    ],
)
def test_the_peak_of_memory_is_the_tree_and_a_few_chunks(saved: bool, options: dict[str, Any], tmp_path: Path) -> None:
    """Resident pages of a process that loads 63 MB, stored in chunks of at most 1.8 MB."""

    def checkpoint(folder: Path, **sizes: int) -> Path:
        config = T5Config(num_encoder_layers=2, num_decoder_layers=2, scan_layers=saved, tied=False, **sizes)
        # Compressible, so that the test is quick; memory depends on the shapes alone.
        params = jax.tree.map(jnp.round, random_params(config))
        place = save_t5x(Backbone("b", config, params, None), folder, shards=8)
        tiny_tokenizer(("film",)).save_pretrained(place)
        return place

    small = checkpoint(tmp_path / "small", vocab_size=60, width=16, num_heads=2, head_dim=8, mlp_dim=16)
    large = checkpoint(tmp_path / "large", vocab_size=7000, width=512, num_heads=8, head_dim=64, mlp_dim=1280)
    command = [sys.executable, "-c", MEASURE, str(small), str(large), json.dumps(options)]
    for _ in range(3):  # beside other work, threads that read may be slow to give back what they hold: the least counts
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        if measured["peak"] <= measured["tree"] + (16 << 20):
            break
    assert measured["tree"] > 15e6 * (2 if options["dtype"] == "bfloat16" else 4)
    assert measured["tree"] <= measured["peak"] * 1.05
    assert measured["peak"] <= measured["tree"] + (16 << 20), measured
