"""`load_backbone(quantize=...)`: what it gives from every format, over a mesh, and how much memory it takes."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.interop.load import load_backbone
from deptjax.interop.t5x_save import save_t5x
from deptjax.testing import save_hf_folder, tiny_llama, tiny_t5
from tests.interop.load_test import write_folder, write_gguf
from tests.sharding.process import cpu_devices

ROOT = pathlib.Path(__file__).resolve().parents[2]


def t5x(folder: Path) -> Path:
    """Writes a T5X checkpoint of scanned layers."""
    return save_t5x(
        tiny_t5(tied=False, activation="gelu_new", gated=True, relative_max_distance=128, scan_layers=True), folder
    )


WRITERS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: write_folder("llama_gqa", folder),
    "gpt2": lambda folder: write_folder("gpt2", folder),
    "t5": lambda folder: write_folder("t5_v1_1", folder),
    "gguf": lambda folder: write_gguf(folder / "m.gguf"),
    "t5x": t5x,
}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_loading_quantises_what_is_stored(kind: str, scan_layers: bool, tmp_path: Path) -> None:
    tokenizer = tiny_t5().tokenizer if kind == "t5x" else None
    load = functools.partial(load_backbone, WRITERS[kind](tmp_path), scan_layers=scan_layers, tokenizer=tokenizer)
    wide = load()
    scheme = "int8" if scan_layers else "nf4"
    got, wanted = load(quantize=scheme), wide.quantized(scheme)
    assert got.config == wanted.config
    assert got.fingerprint == wide.fingerprint
    assert got.nbytes == wanted.nbytes < wide.nbytes
    jax.tree.map(np.testing.assert_array_equal, got.params, wanted.params)


def test_kernels_are_rounded_once_whatever_the_dtype(tmp_path: Path) -> None:
    folder = write_folder("llama_gqa", tmp_path)
    kernels = [
        load_backbone(folder, dtype=dtype, quantize="int4").params["layers_1"]["mlp"]["up"]["kernel"]
        for dtype in ("float32", "bfloat16")
    ]
    jax.tree.map(np.testing.assert_array_equal, *kernels)


def test_an_unknown_scheme_is_one_line_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantize 'int-8' is not one of int8, int4, nf4\. Did you mean 'int8'\?"):
        load_backbone(tmp_path / "absent", quantize="int-8")


def test_quantised_weights_are_not_saved_as_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load the model without quantize"):
        save_t5x(tiny_t5().quantized("int8"), tmp_path)
    assert not list(tmp_path.iterdir())


OVER_A_MESH = """
import sys
import jax, numpy as np
from deptjax.interop.load import load_backbone

for scheme in ("int8", "nf4"):
    for scan in (False, True):
        load = lambda mesh: load_backbone(sys.argv[1], quantize=scheme, scan_layers=scan, mesh=mesh).params
        whole, split = load("data:4"), load("data:1,fsdp:2,model:2")
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, split)
        kernel = (split["layers"] if scan else split["layers_1"])["mlp"]["up"]["kernel"]
        assert kernel.qvalue.addressable_shards[0].data.shape[-2:] == (64, 32), kernel.qvalue.sharding
        tiles = kernel.scale.shape[-2]  # one, which no mesh splits, or two, which the axis of the rows does
        assert kernel.scale.addressable_shards[0].data.shape[-2:] == (1, 32), (tiles, kernel.scale.sharding)
"""


def test_a_mesh_splits_what_was_quantised_whole(tmp_path: Path) -> None:
    backbone = tiny_llama(width=128, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=52)
    folder = save_hf_folder(backbone, tmp_path)
    env = {
        **os.environ,
        "XLA_FLAGS": cpu_devices(4),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", OVER_A_MESH, str(folder)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


MEASURE = """
import gc, json, sys
import jax
from deptjax.interop.load import load_backbone

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
load_backbone(small, **options)  # imports, programs, and whatever is made once
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew, from what is resident now
before = status("VmRSS")
backbone = load_backbone(large, **options)
print(json.dumps({"peak": status("VmHWM") - before, "tree": backbone.nbytes}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models of one layer and of eight, whose kernels are 96 MB in float32, the largest of a layer 2.6 MB."""

    def write(layers: int) -> Path:
        sizes = {"width": 512, "mlp_dim": 1280, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
        return save_hf_folder(tiny_llama(num_layers=layers, **sizes), tmp_path_factory.mktemp("model"))

    return write(1), write(8)


@pytest.mark.parametrize(("scheme", "scan_layers"), [("int8", False), ("int4", True), ("nf4", True)])
def test_the_wide_tree_is_never_in_memory(scheme: str, scan_layers: bool, models: tuple[Path, Path]) -> None:
    options = {"quantize": scheme, "scan_layers": scan_layers, "dtype": "bfloat16"}
    command = [sys.executable, "-c", MEASURE, *map(str, models), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    # Beside the tree: a kernel in float32, a stack of kernels with a byte for four bits (5 MB) until the device has
    # packed it, and what the allocator keeps of the one before.
    assert measured["peak"] <= measured["tree"] + 25e6, measured
    assert measured["peak"] >= measured["tree"] * 0.8, measured
