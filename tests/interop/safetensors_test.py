"""Reading safetensors: every dtype, blocks, shards, and files that are not whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from deptjax.errors import UserError
from deptjax.interop import safetensors
from deptjax.interop.safetensors import SafetensorsFile, SafetensorsFolder


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "a": random.standard_normal((13, 7)).astype(np.float32),
        "b": random.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
        "c": random.standard_normal(11).astype(np.float16),
        "d": random.standard_normal((2, 3, 5)),
    }


def whole(file: SafetensorsFile | SafetensorsFolder, name: str) -> np.ndarray:
    return np.concatenate([rows for _, rows in file.blocks(name)])


@pytest.mark.parametrize("block_bytes", [1, 60, 1 << 20])
def test_blocks_join_to_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(safetensors, "BLOCK_BYTES", block_bytes)
    wanted = tensors()
    save_file(wanted, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert sorted(file.names()) == sorted(wanted)
    for name, value in wanted.items():
        got = whole(file, name)
        assert (got.dtype, file.shape(name)) == (value.dtype, value.shape)
        np.testing.assert_array_equal(got, value)
        assert next(start for start, _ in file.blocks(name)) == 0


def write_shards(folder: Path) -> dict[str, str]:
    wanted = tensors()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(wanted)}
    for shard in set(places.values()):
        save_file({name: wanted[name] for name, place in places.items() if place == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_shards_are_one_set_of_tensors(tmp_path: Path) -> None:
    places = write_shards(tmp_path)
    folder = SafetensorsFolder(tmp_path)
    assert sorted(folder.names()) == sorted(places)
    for name, value in tensors().items():
        np.testing.assert_array_equal(whole(folder, name), value)
        assert folder.where(name).endswith(places[name])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    places = write_shards(tmp_path)
    (tmp_path / places["b"]).unlink()
    with pytest.raises(UserError, match=places["b"]):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(("change", "match"), [("forget", "tensor 'c' is not in"), ("move", "tensor 'c' is missing")])
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, change: str, match: str) -> None:
    places = write_shards(tmp_path)
    moved = {**places, "c": places["b"]} if change == "move" else {n: p for n, p in places.items() if n != "c"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(UserError, match=match):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("keep", [3, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: .*truncated"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 4), np.float32)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="ends inside tensor 'a'"):
        whole(file, "a")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b"abcd")
    with pytest.raises(UserError, match="not a safetensors file"):
        SafetensorsFile(path)
    save_file({"a": np.ones((3, 4), np.int8)}, path)
    with pytest.raises(UserError, match="tensor 'a' has dtype I8"):
        whole(SafetensorsFile(path), "a")


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model\.safetensors"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safe_serialization=True"):
        SafetensorsFolder(tmp_path)
