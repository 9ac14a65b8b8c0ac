"""Files of torch.save: read as torch reads them, written as torch reads them, and never run."""

from __future__ import annotations

import collections
import io
import os
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from deptjax.errors import UserError
from deptjax.interop.torch_files import read_torch, torch_bytes

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor's values, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Returns numbers that every dtype holds."""
    return (torch.arange(int(np.prod(shape))) % 11 - (0 if dtype == torch.uint8 else 3)).reshape(shape).to(dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_reads_what_torch_wrote(name: str, tmp_path: pathlib.Path) -> None:
    base = some(DTYPES[name], 6, 4)
    stored = collections.OrderedDict(
        whole=base, turned=base.T, part=base[1:3, ::2], scalar=some(DTYPES[name], 1)[0], empty=base[:0]
    )
    torch.save(stored, tmp_path / "x.bin")
    got = read_torch(tmp_path / "x.bin")
    assert list(got) == list(stored)
    for key, tensor in stored.items():
        assert got[key].dtype.name == name
        np.testing.assert_array_equal(got[key], as_numpy(tensor))


def test_reads_a_modules_state_and_a_single_tensor(tmp_path: pathlib.Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "module.pt")
    got = read_torch(tmp_path / "module.pt")
    assert got.keys() == module.state_dict().keys()
    np.testing.assert_array_equal(got["0.weight"], module[0].weight.detach().numpy())
    torch.save(torch.arange(5.0), tmp_path / "one.pt")
    np.testing.assert_array_equal(read_torch(tmp_path / "one.pt"), np.arange(5, dtype=np.float32))


def test_reads_a_file_of_another_byte_order(tmp_path: pathlib.Path) -> None:
    torch.save({"x": torch.tensor([1.5, -2.0])}, tmp_path / "little.bin")
    with zipfile.ZipFile(tmp_path / "little.bin") as old, zipfile.ZipFile(tmp_path / "big.bin", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            data = b"big" if name.endswith("byteorder") else data
            new.writestr(name, struct.pack(">2f", 1.5, -2.0) if name.endswith("data/0") else data)
    np.testing.assert_array_equal(read_torch(tmp_path / "big.bin")["x"], [1.5, -2.0])


@pytest.mark.parametrize("name", DTYPES)
def test_torch_reads_what_is_written(name: str, tmp_path: pathlib.Path) -> None:
    arrays = {"a": as_numpy(some(DTYPES[name], 3, 5)).T, "b": as_numpy(some(DTYPES[name], 1)), "ü": np.zeros((0, 2))}
    loaded = torch.load(io.BytesIO(torch_bytes(arrays)), weights_only=True)
    assert list(loaded) == list(arrays)
    for key, array in arrays.items():
        assert loaded[key].shape == array.shape
        np.testing.assert_array_equal(as_numpy(loaded[key]), array)
    single = torch.load(io.BytesIO(torch_bytes(arrays["a"])), weights_only=True)
    assert single.dtype == DTYPES[name]
    np.testing.assert_array_equal(as_numpy(single), arrays["a"])
    (tmp_path / "own.bin").write_bytes(torch_bytes(arrays))
    np.testing.assert_array_equal(read_torch(tmp_path / "own.bin")["a"], arrays["a"])
    assert torch_bytes(arrays) == torch_bytes(arrays)


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


class Builds:
    """Unpickled, its state is set, by a call of `__setstate__`."""

    def __init__(self) -> None:
        self.value = 1


def archive(path: pathlib.Path, program: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """Writes a zip laid out as torch's, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        for name, data in members.items():
            file.writestr("archive/" + name.replace("__", "/"), data)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_runs_nothing(protocol: int, nested: bool, tmp_path: pathlib.Path) -> None:
    evil: Any = Touches(tmp_path / "touched")
    program = pickle.dumps({"prompt_embeddings": [{"x": (evil,)}]} if nested else evil, protocol)
    archive(tmp_path / "evil.bin", program)
    with pytest.raises(UserError, match=r"evil.bin: its pickle (asks for '\w+.mkdir', which is not run|has the instr)"):
        read_torch(tmp_path / "evil.bin")
    assert not (tmp_path / "touched").exists()
    pickle.loads(program)  # it would have
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (pickle.dumps(Builds(), 2), "asks for"),
        (b"\x80\x02cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.", "asks for 'builtins.eval'"),
        (b"\x80\x02ctorch\nload\n.", "asks for 'torch.load'"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n.", "asks for 'torch._utils._rebuild_parameter'"),
        (b"\x80\x02(X\x02\x00\x00\x00osX\x06\x00\x00\x00systemi\x00.", "damaged"),
        (b"(S'echo'\nios\nsystem\n.", "has the instruction STRING"),
        (b"\x80\x02\x82\x01.", "has the instruction EXT1"),
        (b"\x80\x02}ccollections\nOrderedDict\n}b.", "sets the state of an object"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "has the instruction NEWOBJ"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something that is no function"),
        (b"\x80\x02X\x01\x00\x00\x00xQ.", "damaged"),
        (b"\x80\x02}.", None),
        (b"\x80\x02}X\x01\x00\x00\x00xK\x01s.", "its entry 'x' is not a tensor"),
        (b"\x80\x02]q\x00h\x00a.", "it holds a list, not a dict of tensors"),
        (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "a dict with a tuple as key"),
        (b"\x80\x02)" + b"\x85" * 100_000 + b".", "it holds a tuple"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
    ],
)
def test_only_tensors_are_read(program: bytes, told: str | None, tmp_path: pathlib.Path) -> None:
    archive(tmp_path / "x.bin", program)
    if told is None:
        assert read_torch(tmp_path / "x.bin") == {}
        return
    with pytest.raises(UserError, match=told) as raised:
        read_torch(tmp_path / "x.bin")
    assert "\n" not in str(raised.value)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: pathlib.Path) -> None:
    whole = torch_bytes(np.arange(4, dtype=np.float32))
    for old, new in [
        (b"J\x04\x00\x00\x00t", b"J\xff\xff\xff\x7ft"),  # its size and that of its shape
        (b"K\x00(", b"K\x09("),  # its offset
        (b"J\x01\x00\x00\x00t", b"J\xff\xff\xff\xfft"),  # its stride
    ]:
        with zipfile.ZipFile(io.BytesIO(whole)) as file:
            program, data = file.read("archive/data.pkl"), file.read("archive/data/0")
        assert old in program
        archive(tmp_path / "x.bin", program.replace(old, new), data__0=data)
        with pytest.raises(UserError, match="the file is damaged"):
            read_torch(tmp_path / "x.bin")


def test_foreign_and_broken_files(tmp_path: pathlib.Path) -> None:
    stored = {"x": torch.arange(3000.0)}
    torch.save(stored, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(stored, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / "half.bin").write_bytes(whole[: len(whole) // 2])
    at = whole.index(stored["x"][1000:1010].numpy().tobytes())
    (tmp_path / "rotten.bin").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "empty.bin").write_bytes(b"")
    archive(tmp_path / "bomb.bin", torch_bytes(np.zeros(1)), zipfile.ZIP_DEFLATED, data__0=bytes(1 << 24))
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as file:
        file.writestr("readme", "x")
    for name, told in {
        "old": "a pickle of torch before 1.6, which is not read; torch.load it and torch.save it again",
        "half": "truncated or damaged",
        "rotten": "truncated or damaged",
        "text": "not a file that torch.save wrote",
        "empty": "not a file that torch.save wrote",
        "bomb": "the zip is compressed",
        "other": "holds no single data.pkl",
    }.items():
        with pytest.raises(UserError, match=told) as raised:
            read_torch(tmp_path / f"{name}.bin")
        assert f"{name}.bin: " in str(raised.value)
        assert "\n" not in str(raised.value)
