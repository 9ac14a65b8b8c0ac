"""The one door for prompts: formats told apart, bare arrays both ways, nothing lost and nothing run."""

from __future__ import annotations

import io
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import deptjax
from deptjax.errors import UserError
from deptjax.interop import array_files
from deptjax.interop.prompts import export_prompt, load_prompt
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt
from tests.cases import METHODS, backbone_of, case_of
from tests.interop.adapter_cases import backbone_of as golden_backbone
from tests.interop.adapter_cases import write_adapter

WIDTH = 24


def prompt_of(method: str, scan: bool = False) -> Prompt:
    """Returns the moved parameters of a method on the tiny LLaMA."""
    return case_of("llama", method, scan).prompt({"name": "films", "input": "{review}"})


def llama() -> Backbone:
    """Returns the backbone of these prompts."""
    return backbone_of("llama")


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("method", METHODS)
def test_bare_arrays_come_back(method: str, ending: str, tmp_path: Path) -> None:
    prompt = prompt_of(method)
    file = export_prompt(prompt, llama(), tmp_path / f"films.{ending}", ending)
    again = load_prompt(file, llama())
    assert again.method == prompt.method
    assert again.task["name"] == "films"
    assert jax.tree.structure(again.trainable) == jax.tree.structure(prompt.trainable)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, prompt.trainable)
    first = file.read_bytes()
    assert export_prompt(prompt, llama(), file, ending, overwrite=True).read_bytes() == first


def test_numpy_and_safetensors_read_what_is_written(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    prompt = prompt_of("dept")
    with np.load(export_prompt(prompt, llama(), tmp_path / "x.npz", "npz")) as arrays:
        assert sorted(arrays) == ["input/lora_a", "input/lora_b", "input/prompt", "method"]
        assert json.loads(str(arrays["method"])) == prompt.method_config
        np.testing.assert_array_equal(arrays["input/lora_a"], prompt.trainable["input"]["lora_a"])
    prompt.save(tmp_path / "own")
    own = load_file(tmp_path / "own" / "prompt.safetensors")
    assert load_file(export_prompt(prompt, llama(), tmp_path / "x.safetensors", "safetensors")).keys() == own.keys()
    soft = prompt_of("prompt_tuning")
    array = np.load(export_prompt(soft, llama(), tmp_path / "x.npy", "npy"))
    np.testing.assert_array_equal(array, soft.trainable["input"]["prompt"])
    with pytest.raises(UserError, match="holds a soft prompt alone, and 'dept' has more; use npz"):
        export_prompt(prompt, llama(), tmp_path / "y.npy", "npy")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_a_bare_soft_prompt_of_others(dtype: Any, tmp_path: Path) -> None:
    """google-research/prompt-tuning saves (P, H) by `np.save`; others give it any name."""
    array = np.random.default_rng(0).standard_normal((7, WIDTH)).astype(dtype)
    if dtype != ml_dtypes.bfloat16:  # of which numpy's own files know nothing
        np.save(tmp_path / "google.npy", np.asfortranarray(array))
        np.savez_compressed(tmp_path / "named.npz", soft=array)
    save_file({"prompt_embeddings": array}, tmp_path / "embeddings.safetensors")
    import torch

    torch.save(torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16), tmp_path / "tensor.pt")
    for file in sorted(tmp_path.iterdir()):
        prompt = load_prompt(file, llama())
        assert prompt.method_config["method"] == "prompt_tuning"
        assert prompt.method.prompt_length == 7
        wanted = array.astype(np.float32)
        if file.suffix == ".pt":
            wanted = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(prompt.trainable["input"]["prompt"], wanted)


def test_bare_dept_is_scaled_as_usual_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leaves = prompt_of("dept").trainable["input"]
    np.savez(tmp_path / "x.npz", **leaves)
    with caplog.at_level(logging.WARNING, "deptjax"):
        prompt = load_prompt(tmp_path / "x.npz", llama())
    assert "does not say how its low-rank pair is scaled: taken as alpha / sqrt(rank) with alpha 8" in caplog.text
    assert prompt.method == prompt_of("dept").method.clone(prompt_init="random")
    jax.tree.map(np.testing.assert_array_equal, prompt.trainable["input"], leaves)


def test_our_own_folder_with_a_task(tmp_path: Path) -> None:
    prompt_of("dept").save(tmp_path / "own")
    loaded = load_prompt(tmp_path / "own", llama())
    assert loaded.run_id == Prompt.load(tmp_path / "own").run_id
    task = deptjax.Task("mine", None, "{text}", labels=("a", "b"))
    renamed = load_prompt(tmp_path / "own", llama(), task)
    assert renamed.task == task.to_config()
    assert renamed.run_id != loaded.run_id
    with pytest.raises(UserError, match=r"own was tuned on 'tiny-llama', not on 'tiny-t5': "):
        load_prompt(tmp_path / "own", backbone_of("t5"))


def test_a_prompt_that_is_loaded_answers(tmp_path: Path) -> None:
    np.save(tmp_path / "soft.npy", prompt_of("prompt_tuning").trainable["input"]["prompt"])
    task = deptjax.Task("films", None, "{review} label :", labels=("good", "bad"))
    prompt = load_prompt(tmp_path / "soft.npy", llama(), task)
    answer = deptjax.Predictor(llama(), prompt)(["this film was good"])[0]
    assert answer.text in ("good", "bad")


def refused(path: Path, told: str, backbone: Backbone | None = None) -> None:
    """Asserts that a path is refused in one line that says `told`."""
    with pytest.raises(UserError, match=told) as raised:
        load_prompt(path, backbone or llama())
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value) or path.name in str(raised.value)


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    def saved(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "x.npz", **arrays)
        return tmp_path / "x.npz"

    prompt = np.zeros((3, WIDTH), np.float32)
    refused(saved(prompt=prompt[:, :5]), r"'input/prompt' has shape \(3, 5\), expected \(any, 24\)")
    refused(saved(prompt=prompt[0]), r"'input/prompt' has shape \(24,\), expected \(any, 24\)")
    refused(saved(prompt=prompt[:0]), "the prompt has no vectors")
    refused(saved(prompt=prompt.astype(np.int32)), "has dtype int32; it must hold floating point numbers")
    refused(saved(prompt=prompt + np.inf), "holds numbers that are not finite")
    refused(saved(a=prompt, b=prompt), r"no soft prompt and no 'method' among its arrays \('a' \(3, 24\), 'b'")
    refused(saved(prompt=prompt, lora_a=np.zeros((5, 2))), "tensor 'input/lora_b' is missing")
    refused(saved(prompt=prompt, other=prompt), "tensor 'other' has no place")
    refused(saved(method=np.array("{")), "its 'method' is not the JSON of a method")
    refused(saved(method=np.array('{"method": "dep"}')), "unknown method 'dep'; .* Did you mean 'dept'")
    refused(saved(method=np.array('{"method": "dept", "rnk": 1}')), "has no field 'rnk'")
    refused(saved(method=np.array('{"method": "dept", "rank": "x"}')), "rank is 'x'; it must be a whole number")
    config = '{"method": "prompt_tuning", "prompt_length": 3, "prompt_init": "/dev/null"}'
    refused(saved(method=np.array(config)), "tensor 'input/prompt' is missing, expected")
    refused(
        saved(method=np.array(config), **{"input/prompt": prompt[:2]}),
        r"tensor 'input/prompt' has shape \(2, 24\), expected \(3, 24\) for 'tiny-llama'",
    )
    refused(saved(method=np.array(config), **{"a": prompt, "a/b": prompt}), "make no tree")
    refused(saved(prompt=np.array([{}], object)), "holds Python objects")


def test_broken_and_foreign_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", prompt=np.ones((9, WIDTH), np.float32))
    np.save(tmp_path / "whole.npy", np.ones((9, WIDTH), np.float32))
    save_file({"prompt": np.ones((9, WIDTH), np.float32)}, tmp_path / "whole.safetensors")
    for file in sorted(tmp_path.iterdir()):
        data = file.read_bytes()
        for part in (0, 3, len(data) // 2, len(data) - 1):
            half = tmp_path / f"half{file.suffix}"
            half.write_bytes(data[:part])
            refused(half, "half")
    (tmp_path / "text.npz").write_text("hello")
    refused(tmp_path / "text.npz", "not an .npz file, truncated or damaged")
    (tmp_path / "text.npy").write_text("hello")
    refused(tmp_path / "text.npy", "is not an .npy array")
    for header in ("[]", "{", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', '{"a": {}}'):
        file = tmp_path / "text.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
        refused(file, "text.safetensors")
    (tmp_path / "x.txt").write_text("hello")
    refused(tmp_path / "x.txt", "files that end in '.txt' are not read")
    refused(tmp_path / "nowhere", "there is no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds neither prompt.json nor adapter_config.json")


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "_MAX_UNPACKED", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file, file.open("x.npy", "w") as member:
        member.write(bytes(1 << 21))
    refused(tmp_path / "bomb.npz", "it unpacks to 2,097,152 bytes, more than a prompt can have")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, WIDTH)})
    (tmp_path / "claims.npy").write_bytes(header.getvalue() + bytes(100))
    refused(tmp_path / "claims.npy", r"the array has 100 bytes, which its shape \(1099511627776, 24\) denies")


def test_what_is_still_being_written_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "soft.npy", np.ones((2, WIDTH), np.float32))
    os.replace(tmp_path / "soft.npy", tmp_path / "soft.npy.part")
    refused(tmp_path / "soft.npy.part", "is that of something still being written")
    prompt_of("dept").save(tmp_path / ".own.0123abcd.new")
    refused(tmp_path / ".own.0123abcd.new", "is that of something still being written")
    folder = write_adapter("peft_prompt_llama", tmp_path / "adapter")
    os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.safetensors.incomplete")
    refused(
        folder,
        "adapter_model.safetensors.incomplete: the name is that of something still",
        golden_backbone("llama_gqa"),
    )
    (folder / "adapter_model.safetensors.incomplete").unlink()
    refused(folder, "holds neither adapter_model.safetensors nor adapter_model.bin", golden_backbone("llama_gqa"))


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    backbone = golden_backbone("llama_gqa")
    write_adapter("peft_prompt_llama", tmp_path / "secret")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = write_adapter("peft_prompt_llama", tmp_path / f"linked_{name}")
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret" / name)
        refused(folder, f"{name} leads out of .*copy the file into the folder", backbone)
    prompt_of("dept").save(tmp_path / "own")
    os.replace(tmp_path / "own" / "prompt.safetensors", tmp_path / "secret" / "prompt.safetensors")
    (tmp_path / "own" / "prompt.safetensors").symlink_to(tmp_path / "secret" / "prompt.safetensors")
    refused(tmp_path / "own", "leads out of")
    # The cache of a hub is made of such links, from a snapshot to its blobs.
    hub = write_adapter("peft_prompt_llama", tmp_path / "models--x" / "snapshots" / "1234")
    (tmp_path / "models--x" / "blobs").mkdir()
    os.replace(hub / "adapter_model.safetensors", tmp_path / "models--x" / "blobs" / "abcd")
    (hub / "adapter_model.safetensors").symlink_to("../../blobs/abcd")
    assert load_prompt(hub, backbone).method.prompt_length == 5
    (tmp_path / "link").symlink_to(hub)  # the folder itself may be named by a link
    assert load_prompt(tmp_path / "link", backbone).method.prompt_length == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udcff"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    folder = write_adapter("peft_prompt_llama", tmp_path / "x")
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "adapter_config.json: (not JSON|expected a JSON object)", golden_backbone("llama_gqa"))


@pytest.mark.parametrize("format", ["peft", "npz"])
def test_nothing_is_overwritten_unasked(format: str, tmp_path: Path) -> None:
    prompt, path = prompt_of("prompt_tuning"), tmp_path / ("x.npz" if format == "npz" else "x")
    export_prompt(prompt, llama(), path, format)
    with pytest.raises(UserError, match="exists; name another"):
        export_prompt(prompt, llama(), path, format)
    export_prompt(prompt, llama(), path, format, overwrite=True)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_only_an_adapter_is_replaced(tmp_path: Path) -> None:
    prompt = prompt_of("prompt_tuning")
    folder = export_prompt(prompt, llama(), tmp_path / "x", "peft")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'notes.txt', which is no part of an adapter; name another folder"):
        export_prompt(prompt, llama(), folder, "peft", overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file; name a folder"):
        export_prompt(prompt, llama(), folder / "notes.txt", "peft", overwrite=True)
    with pytest.raises(UserError, match=r"must end in \.npz"):
        export_prompt(prompt, llama(), tmp_path / "x.bin", "npz")
    with pytest.raises(UserError, match=r"format 'pefd' is not one of .* Did you mean 'peft'"):
        export_prompt(prompt, llama(), tmp_path / "y", "pefd")
    with pytest.raises(UserError, match="was tuned on 'tiny-llama', not on 'tiny-t5'"):
        export_prompt(prompt, backbone_of("t5"), tmp_path / "y", "peft")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("ending", ["npz", "npy", "safetensors", "bin"])
def test_a_damaged_file_is_one_line_or_other_numbers(ending: str, tmp_path: Path) -> None:
    """Whatever bytes are changed: arrays of the same shapes, or a `UserError`; never another exception."""
    array = np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)
    whole = array_files.array_bytes({"prompt": array}, f".{ending}")
    file, random, read, refusals = tmp_path / f"x.{ending}", np.random.default_rng(1), [], []
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(random.choice([1, 2, 8])):
            at = int(random.integers(len(data)))
            if random.random() < 0.6:
                data[at] = random.integers(256)
            else:
                data[at : at + int(random.integers(4))] = random.bytes(int(random.integers(4)))
        file.write_bytes(data)
        try:
            read += array_files.read_arrays(file).values()
        except UserError as error:
            refusals.append(str(error))
    assert read
    assert refusals
    assert all(isinstance(value, np.ndarray) for value in read)
    assert all(str(file) in told and "\n" not in told for told in refusals)


def test_a_zip_that_python_cannot_open_is_one_line(tmp_path: Path) -> None:
    for ending in ("npz", "bin"):
        whole = array_files.array_bytes({"prompt": np.ones((4, WIDTH), np.float32)}, f".{ending}")
        central = whole.index(b"PK\x01\x02")
        for at, value in ((central + 6, 99), (central + 8, 1), (central + 10, 99), (central + 45, 255)):
            data = bytearray(whole)  # another version, encrypted, an unknown compression, a place that is not there
            data[at] = value
            (tmp_path / f"x.{ending}").write_bytes(data)
            refused(tmp_path / f"x.{ending}", "damaged|compressed")
