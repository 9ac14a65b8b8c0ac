"""GGUF files, written by the gguf package from goldens' weights: config, rows in order, quantisation, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.interop.convert import fill_tree
from deptjax.interop.gguf import GGUFFile, config_from_gguf
from deptjax.interop.huggingface import config_from_dict
from deptjax.interop.names import entries
from deptjax.models.rope import RopeScaling, rope_frequencies
from tests.goldens.make_goldens import FOLDER

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Golden:
    """A golden's config and Hugging Face weights, by name."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as stored:
            arrays = dict(stored)
        self.config: Any = config_from_dict(json.loads(str(arrays["config"])))
        self.weights = {k.removeprefix("weight:"): v for k, v in arrays.items() if k.startswith("weight:")}

    def names(self) -> list[str]:
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[name].shape

    def where(self, name: str) -> str:
        return name

    def blocks(self, name: str, wanted: tuple[int, int] | None = None) -> Any:
        yield 0, self.weights[name]


def ggml_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows as llama.cpp's converter orders them: dimension i beside i + H / 2."""
    half = weight.shape[0] // heads // 2
    rows = [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]
    return weight[rows]


def write(
    path: Path,
    golden: Golden,
    kind: gguf.GGMLQuantizationType,
    tokenizer: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Writes a golden as a GGUF file; `fields` replaces or adds `llama.` metadata, `None` leaves it out."""
    config, writer = golden.config, gguf.GGUFWriter(path, "llama")
    known: dict[str, Any] = {
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
    }
    for name, value in {**known, **fields}.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{name}", value)
        elif isinstance(value, list):
            writer.add_array(f"llama.{name}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{name}", value)
    for name, value in (tokenizer or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        kinds[type(value)](name, value)
    for name, weight in golden.weights.items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2], 0)
        weight = interleave(weight, heads) if heads else weight
        if weight.ndim == 1:
            writer.add_tensor(ggml_name(name), weight)
        else:
            writer.add_tensor(ggml_name(name), gguf.quantize(weight, kind), raw_dtype=kind)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", np.asarray(plain / rope_frequencies(config), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_tree(got: Any, wanted: Any, path: str = "") -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert_same_tree(got[key], value, f"{path}/{key}")
        else:
            np.testing.assert_array_equal(np.asarray(got[key]), np.asarray(value), err_msg=f"{path}/{key}")


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa", "llama_tied", "mistral"])
def test_a_gguf_gives_the_tree_of_the_folder(name: str, scan_layers: bool, tmp_path: Path) -> None:
    golden = Golden(name)
    file = GGUFFile(write(tmp_path / "m.gguf", golden, gguf.GGMLQuantizationType.F32))
    assert config_from_gguf(file) == golden.config
    wanted = fill_tree(golden.config, golden, scan_layers=scan_layers, dtype="float32")
    assert_same_tree(fill_tree(config_from_gguf(file), file, scan_layers=scan_layers, dtype="float32"), wanted)


def test_blocks_smaller_than_a_tensor_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden("llama_gqa")
    file = GGUFFile(write(tmp_path / "m.gguf", golden, gguf.GGMLQuantizationType.F32))
    monkeypatch.setattr("deptjax.interop.gguf.BLOCK_BYTES", 200)
    assert len(list(file.blocks("model.layers.0.self_attn.q_proj.weight"))) > 1
    wanted = fill_tree(golden.config, golden, scan_layers=False, dtype="float32")
    assert_same_tree(fill_tree(golden.config, file, scan_layers=False, dtype="float32"), wanted)


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q4_1", 2e-1)])
def test_quantised_tensors_are_near_the_original(kind: str, error: float, tmp_path: Path) -> None:
    golden = Golden("llama_gqa")
    random = np.random.default_rng(0)
    # Quantised rows are whole blocks of 32, which the goldens' widths are not.
    golden.config = dataclasses.replace(golden.config, width=32, mlp_dim=64, head_dim=32, num_heads=2, num_kv_heads=1)
    for entry in entries(golden.config):
        golden.weights[entry.name] = random.standard_normal(entry.shape).astype(np.float32)
    file = GGUFFile(write(tmp_path / "m.gguf", golden, gguf.GGMLQuantizationType[kind]))
    for name, weight in golden.weights.items():
        got = np.concatenate([rows for _, rows in file.blocks(name)])
        assert np.abs(got - weight).max() <= error * np.abs(weight).max(), name


def test_the_scaling_of_llama_3_is_found_in_its_factors(tmp_path: Path) -> None:
    golden = Golden("llama_gqa")
    scaling = RopeScaling("llama3", 32.0)
    golden.config = dataclasses.replace(golden.config, rope_scaling=scaling, head_dim=64)
    path = write(tmp_path / "m.gguf", golden, gguf.GGMLQuantizationType.F32)
    assert config_from_gguf(GGUFFile(path)).rope_scaling == scaling
    golden.config = dataclasses.replace(golden.config, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 2.0))
    path = write(tmp_path / "other.gguf", golden, gguf.GGMLQuantizationType.F32)
    with pytest.raises(UserError, match=r"'rope_freqs\.weight' does not follow"):
        config_from_gguf(GGUFFile(path))


def test_linear_scaling(tmp_path: Path) -> None:
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}
    path = write(tmp_path / "m.gguf", Golden("llama_rope_linear"), gguf.GGMLQuantizationType.F32, **fields)
    assert config_from_gguf(GGUFFile(path)).rope_scaling == RopeScaling("linear", 2.5)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type"),
        ({"rope.dimension_count": 2}, "rope.dimension_count"),
        ({"attention.value_length": 6}, "attention.value_length"),
        ({"attention.sliding_window": 16}, "attention.sliding_window"),
        ({"expert_count": 4}, "expert_count"),
        ({"block_count": None}, "block_count"),
        ({"feed_forward_length": [37, 37]}, "feed_forward_length"),
        ({"logit_scale": 0.5}, "logit_scale"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", Golden("llama_gqa"), gguf.GGMLQuantizationType.F32, **fields)
    with pytest.raises(UserError, match=rf"m\.gguf: .*'llama\.{field}'") as caught:
        config_from_gguf(GGUFFile(path))
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"'general\.architecture' is 'gemma3'"):
        config_from_gguf(GGUFFile(tmp_path / "m.gguf"))


@pytest.mark.parametrize("keep", [2, 30, 300, -1000])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", Golden("llama_gqa"), gguf.GGMLQuantizationType.F32)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.gguf: "):
        GGUFFile(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        GGUFFile(tmp_path / "absent.gguf")
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4 and more")
    with pytest.raises(UserError, match="not a GGUF file"):
        GGUFFile(tmp_path / "m.gguf")
