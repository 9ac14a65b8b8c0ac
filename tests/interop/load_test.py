"""`load_backbone` from end to end: every source, what does not fit, and the promise about memory."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deptjax.errors import UserError
from deptjax.interop.load import _is_large, load_backbone
from deptjax.interop.names import entries
from deptjax.models.rope import RopeScaling
from deptjax.models.sizes import SIZES
from deptjax.models.t5 import T5Config
from deptjax.testing import random_params, tiny_llama, tiny_t5, tiny_tokenizer
from tests.goldens.make_goldens import FOLDER
from tests.interop.gguf_test import Golden, write
from tests.interop.tokenizers_test import byte_level


def write_folder(name: str, folder: Path, dtype: Any = np.float32, **fields: Any) -> Path:
    """Writes a golden's model with a tokenizer of whole words cut to its vocabulary."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        arrays = dict(stored)
    config = {**json.loads(str(arrays["config"])), **fields}
    weights = {k.removeprefix("weight:"): v.astype(dtype) for k, v in arrays.items() if k.startswith("weight:")}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(("this", "film", "is", "good", "bad")).save_pretrained(folder)
    return folder


def change_weights(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (`None`) removes tensors of a folder; `__` in a name stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "llama_tied", "t5_v1_0", "t5_v1_1", "byt5"])
def test_the_tree_is_the_one_that_the_module_expects(name: str, scan_layers: bool, dtype: str, tmp_path: Path) -> None:
    backbone = load_backbone(write_folder(name, tmp_path), dtype=dtype, scan_layers=scan_layers)
    config = backbone.config
    assert (config.dtype, config.scan_layers) == (dtype, scan_layers)
    expected = jax.eval_shape(lambda: random_params(dataclasses.replace(config, dtype="float32")))
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (backbone.params, expected)]
    assert shapes[0] == shapes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(backbone.params)} == {jnp.dtype(dtype)}
    assert backbone.width == config.width
    assert backbone.embedding.shape == (config.vocab_size, config.width)
    assert backbone.tokenizer("film good").input_ids == [4, 6]


def test_a_bfloat16_file_is_read_exactly(tmp_path: Path) -> None:
    folder = write_folder("llama_gqa", tmp_path, dtype=ml_dtypes.bfloat16)
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    got = load_backbone(folder, scan_layers=True).params["layers"]["mlp"]["up"]["kernel"][1]
    np.testing.assert_array_equal(np.asarray(got), stored.astype(np.float32).T)


def test_the_fingerprint_is_that_of_the_function(tmp_path: Path) -> None:
    folder = write_folder("t5_v1_1", tmp_path)
    plain = load_backbone(folder).fingerprint
    assert load_backbone(folder, dtype="bfloat16", scan_layers=True, dropout_rate=0.0).fingerprint == plain
    assert json.loads(json.dumps(plain)) == plain
    assert plain["family"] == "t5"
    assert len(plain["embedding"]) == 16
    assert not {"dtype", "scan_layers", "dropout_rate"} & plain.keys()
    table = load_file(folder / "model.safetensors")["shared.weight"]
    change_weights(folder, shared__weight=table + np.float32(0.5))
    assert load_backbone(folder).fingerprint["embedding"] != plain["embedding"]
    scaled = dataclasses.replace(tiny_llama().config, rope_scaling=RopeScaling("linear", 2.0))
    fields = dataclasses.replace(tiny_llama(), config=scaled).fingerprint
    assert (fields["rope_scaling.kind"], fields["rope_scaling.factor"]) == ("linear", 2.0)


def test_the_scale_of_the_embeddings() -> None:
    backbone = tiny_t5()
    table = np.asarray(backbone.embedding, np.float64)
    assert math.isclose(backbone.embedding_rms, np.sqrt((table**2).mean()), rel_tol=1e-6)


def test_dropout_can_be_replaced_where_there_is_any(tmp_path: Path) -> None:
    t5 = write_folder("t5_v1_0", tmp_path / "t5")
    llama = write_folder("llama_mha", tmp_path / "llama")
    assert load_backbone(write_folder("gpt2", tmp_path / "gpt2"), dropout_rate=0.3).config.dropout_rate == 0.3
    config = load_backbone(t5, dropout_rate=0.3).config
    assert isinstance(config, T5Config)
    assert (config.dropout_rate, load_backbone(t5).config.dropout_rate) == (0.3, 0.1)
    load_backbone(llama, dropout_rate=0.0)
    with pytest.raises(UserError, match="has no dropout"):
        load_backbone(llama, dropout_rate=0.1)
    with pytest.raises(UserError, match=r"dropout_rate is 1\.5"):
        load_backbone(t5, dropout_rate=1.5)


def test_tied_copies_may_be_there_and_must_agree(tmp_path: Path) -> None:
    folder = write_folder("t5_v1_0", tmp_path)
    plain = load_backbone(folder)
    table = load_file(folder / "model.safetensors")["shared.weight"]
    copies = {"encoder__embed_tokens__weight": table, "lm_head__weight": table.copy()}
    change_weights(folder, **copies, decoder__embed_tokens__weight=table.copy())
    jax.tree.map(np.testing.assert_array_equal, load_backbone(folder).params, plain.params)
    change_weights(folder, shared__weight=None)
    jax.tree.map(np.testing.assert_array_equal, load_backbone(folder).params, plain.params)
    change_weights(folder, shared__weight=table.copy(), lm_head__weight=table + np.float32(1))
    with pytest.raises(UserError, match=r"tensor 'lm_head\.weight' differs from 'shared\.weight'"):
        load_backbone(folder)


def test_a_head_that_is_neither_scaled_nor_stored_is_the_embedding(tmp_path: Path) -> None:
    folder = write_folder("t5_v1_1", tmp_path)
    change_weights(folder, lm_head__weight=None)
    params = load_backbone(folder).params
    table = np.asarray(params["token_embedder"]["embedding"])
    np.testing.assert_array_equal(np.asarray(params["decoder"]["logits_dense"]["kernel"]), table.T)


def test_tensors_of_old_files_that_nobody_reads_are_passed_over(tmp_path: Path) -> None:
    llama, t5 = write_folder("llama_mha", tmp_path / "llama"), write_folder("t5_v1_0", tmp_path / "t5")
    change_weights(llama, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(2, np.float32))
    unused = "decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight"
    change_weights(t5, **{unused: np.ones((8, 3), np.float32)})
    assert load_backbone(llama).config.family == "llama"
    assert load_backbone(t5).config.family == "t5"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model__norm__weight": None}, r"tensor 'model\.norm\.weight' is missing"),
        ({"lm_head__weight": None}, r"tensor 'lm_head\.weight' is missing"),
        ({"model__norm__bias": np.ones(24, np.float32)}, r"tensor 'model\.norm\.bias' is not one"),
        (
            {"model__norm__weight": np.ones(23, np.float32)},
            r"'model\.norm\.weight' has shape \(23,\), expected \(24,\)",
        ),
        ({"model__embed_tokens__weight": np.ones((61, 24), np.int8)}, r"'model\.embed_tokens\.weight' has dtype I8"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    folder = write_folder("llama_gqa", tmp_path)
    change_weights(folder, **changes)
    with pytest.raises(UserError, match=match) as caught:
        load_backbone(folder)
    assert "model.safetensors" in str(caught.value) or "is missing" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    folder = write_folder("llama_gqa", tmp_path)
    tiny_tokenizer(tuple(f"w{i}" for i in range(80))).save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer has 83 tokens but the model only 61 embeddings"):
        load_backbone(folder)


def test_gpt2_is_read_with_or_without_its_prefix_and_its_mask(tmp_path: Path) -> None:
    """The hub's files have no `transformer.` in front, and the causal mask as a buffer in each layer."""
    prefixed = write_folder("gpt2_untied", tmp_path / "prefixed")
    weights = load_file(prefixed / "model.safetensors")
    body = write_folder("gpt2_untied", tmp_path / "body")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    mask = np.tril(np.ones((1, 1, 64, 64), np.float32))
    save_file({**bare, "h.0.attn.bias": mask, "h.0.attn.masked_bias": mask[0, 0, 0]}, body / "model.safetensors")
    loaded, again = load_backbone(prefixed).params, load_backbone(body).params
    jax.tree.map(np.testing.assert_array_equal, again, loaded)
    attention = loaded["layers_1"]["attention"]
    for leaf, axis in (("kernel", 1), ("bias", 0)):
        whole = np.concatenate([attention[name][leaf] for name in ("query", "key", "value")], axis=axis)
        stored = weights[f"transformer.h.1.attn.c_attn.{leaf.replace('kernel', 'weight')}"]
        np.testing.assert_array_equal(whole, stored)
    change_weights(body, h__1__ln_1__weight=None)
    with pytest.raises(UserError, match=r"tensor 'transformer\.h\.1\.ln_1\.weight' is missing"):
        load_backbone(body)
    change_weights(prefixed, wte__weight=bare["wte.weight"])
    with pytest.raises(UserError, match=r"tensor 'wte\.weight' is not one that this model has"):
        load_backbone(prefixed)


def test_a_vector_that_is_cut_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder("gpt2", tmp_path)
    whole = load_backbone(folder).params
    monkeypatch.setattr("deptjax.interop.safetensors.BLOCK_BYTES", 40)  # ten numbers, of a vector of three times 24
    jax.tree.map(np.testing.assert_array_equal, load_backbone(folder).params, whole)


def write_gguf(path: Path) -> Path:
    """Writes a golden as a GGUF file whose tokenizer has as many tokens as the model has embeddings."""
    golden, (_, metadata) = Golden("llama_gqa"), byte_level("smollm")
    count = len(metadata["tokenizer.ggml.tokens"])
    golden.config = dataclasses.replace(golden.config, vocab_size=count)
    random = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        golden.weights[name] = random.standard_normal((count, golden.config.width)).astype(np.float32)
    return write(path, golden, gguf.GGMLQuantizationType.F32, tokenizer=metadata)


def test_a_gguf_file_is_a_backbone(tmp_path: Path) -> None:
    backbone = load_backbone(write_gguf(tmp_path / "m.gguf"), dtype="bfloat16")
    original, _ = byte_level("smollm")
    assert backbone.tokenizer("the film 2024").input_ids == original.encode("the film 2024").ids
    assert backbone.embedding.dtype == jnp.bfloat16
    states = backbone.module().apply({"params": backbone.params}, jnp.zeros((1, 2), jnp.int32), method="embed")
    assert states.shape == (1, 2, 24)


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_name_on_the_hub_is_fetched_and_read(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own function gets name, revision and patterns, and the folder that it returns is what is loaded."""
    folder = write_folder("t5_v1_1", tmp_path / "snapshot")
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def snapshot_download(*args: Any, **options: Any) -> str:
        asked.append((args, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    backbone = load_backbone("nobody/tiny-t5", revision=revision)
    ((args, options),) = asked
    assert args == ("nobody/tiny-t5",)
    assert options.pop("revision") == revision
    kept = set(huggingface_hub.utils.filter_repo_objects(REPOSITORY, **options))
    assert kept == WANTED
    assert backbone.name == "nobody/tiny-t5"
    local = load_backbone(folder)
    assert backbone.fingerprint == local.fingerprint
    jax.tree.map(np.testing.assert_array_equal, backbone.params, local.params)


WANTED = {
    "config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.txt",
    "chat_template.jinja",
}
# What a repository may hold beside: weights of other formats, and second copies of the same.
REPOSITORY = [
    *WANTED,
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/model.safetensors",
    "consolidated.safetensors",
    "README.md",
    "modeling.py",
]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("./absent", {}, "no such file or folder"),
        ("absent.gguf", {}, "no such file or folder"),
        ("a/b/c", {}, "no such file or folder"),
        ("", {}, "no such file or folder"),
        ("nobody/no-such-model", {}, "'nobody/no-such-model' is not a local path and the model hub is not reachable"),
        ("packaged:no-such", {}, "unknown packaged model 'no-such'"),
        ("nobody/no-such-model", {"dtype": "float16"}, "dtype 'float16' is not one of float32, bfloat16"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_backbone(name, **options)
    assert "\n" not in str(caught.value)


def test_local_paths_have_no_revision_and_are_of_two_kinds(tmp_path: Path) -> None:
    folder = write_folder("llama_gqa", tmp_path)
    with pytest.raises(UserError, match="revision 'main' was given"):
        load_backbone(folder, revision="main")
    with pytest.raises(UserError, match=r"expected a folder or a \.gguf file"):
        load_backbone(folder / "model.safetensors")
    with pytest.raises(UserError, match="there is no such file"):
        load_backbone(Path("nobody/no-such-model"))


MEASURE = """
import gc, json, sys
import jax
from deptjax.interop.load import load_backbone

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
load_backbone(small, **options)  # imports, and whatever is made once
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew, from what is resident now: anonymous and mapped pages alike
before = status("VmRSS")
assert abs(status("VmHWM") - before) < 2 << 20
backbone = load_backbone(large, **options)
leaves = jax.tree.leaves(backbone.params)
print(json.dumps({"peak": status("VmHWM") - before, "tree": sum(leaf.nbytes for leaf in leaves)}))
"""


@pytest.mark.parametrize(
    ("kind", "stored", "options"),
    [
        ("folder", "float32", {"dtype": "float32", "scan_layers": False}),
        ("folder", "bfloat16", {"dtype": "float32", "scan_layers": True}),
        ("folder", "float32", {"dtype": "bfloat16", "scan_layers": True}),
        ("gguf", "Q8_0", {"dtype": "float32", "scan_layers": True}),
    ],
)
def test_the_peak_of_memory_is_the_tree_and_one_tensor(
    kind: str, stored: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Resident pages, those of mapped files included, of a process that loads 63 MB of tensors, the largest 14 MB."""
    size = {"hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 4, "num_attention_heads": 8}
    large = _large_model(kind, stored, tmp_path, **size, num_key_value_heads=8, vocab_size=7000)
    small = write_gguf(tmp_path / "s.gguf") if kind == "gguf" else write_folder("llama_gqa", tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, str(small), str(large), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    width = 2 if options["dtype"] == "bfloat16" else 4
    assert measured["tree"] > 15e6 * width
    assert measured["tree"] <= measured["peak"] * 1.05
    assert measured["peak"] <= measured["tree"] + 7000 * 512 * 4, measured


def _large_model(kind: str, stored: str, folder: Path, **fields: int) -> Path:
    golden = Golden("llama_tied")
    golden.config = dataclasses.replace(
        golden.config,
        width=fields["hidden_size"],
        mlp_dim=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["hidden_size"] // fields["num_attention_heads"],
        vocab_size=fields["vocab_size"],
    )
    golden.weights = {e.name: np.full(e.shape, 0.25, np.float32) for e in entries(golden.config)}
    if kind == "gguf":
        _, metadata = byte_level("smollm")
        return write(folder / "m.gguf", golden, gguf.GGMLQuantizationType[stored], tokenizer=metadata)
    large = write_folder("llama_tied", folder / "large", **fields)
    dtype = ml_dtypes.bfloat16 if stored == "bfloat16" else np.float32
    save_file({name: value.astype(dtype) for name, value in golden.weights.items()}, large / "model.safetensors")
    return large


def test_layers_are_scanned_by_size_unless_somebody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder("llama_gqa", tmp_path)
    assert not load_backbone(folder).config.scan_layers
    monkeypatch.setattr("deptjax.interop.load.SCANNED_FROM", 1000)
    assert load_backbone(folder).config.scan_layers
    assert not load_backbone(folder, scan_layers=False).config.scan_layers


@pytest.mark.parametrize(("name", "scanned"), [("smollm2-360m", False), ("t5-3b", True), ("llama2-7b", True)])
def test_models_of_billions_are_large(name: str, scanned: bool) -> None:
    assert _is_large(SIZES[name]) == scanned
