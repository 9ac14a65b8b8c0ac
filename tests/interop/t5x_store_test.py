"""A T5X checkpoint that cannot be read whole is refused in one line, on disk and in a bucket."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from deptjax.errors import UserError
from deptjax.interop.load import load_backbone
from deptjax.interop.t5x_store import T5XStore, _regions, is_t5x, kvstore_spec
from deptjax.testing import tiny_tokenizer
from tests.interop.t5x_folders import change, read, unpack

KERNEL = "target.encoder.layers_0.mlp.wo.kernel"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of four chunks a kernel that T5X wrote."""
    return unpack(tmp_path) / "sharded" / "checkpoint_3"


def cut(folder: Path) -> None:
    file = folder / "checkpoint"
    file.write_bytes(file.read_bytes()[:-100])


def spec(**changes: Any) -> Callable[[Path], None]:
    """Changes the description of one array."""

    def damage(folder: Path) -> None:
        leaf = read(folder)["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
        change(folder, encoder__layers_0__mlp__wo__kernel={**leaf, **changes})

    return damage


def rewrite(dtype: Any) -> Callable[[Path], None]:
    """Writes one array anew with another dtype, and describes it so."""

    def damage(folder: Path) -> None:
        for file in (folder / KERNEL).iterdir():
            file.unlink()
        place = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / KERNEL}/"}}
        ts.open(place, create=True, dtype=dtype, shape=[128, 64]).result().write(np.ones((128, 64), dtype)).result()
        spec(dtype=np.dtype(dtype).name)(folder)

    return damage


def kvstore(path: str) -> Callable[[Path], None]:
    return spec(kvstore={"driver": "file", "path": path})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, r"checkpoint: not a T5X checkpoint, or truncated \("),
    "empty": (lambda f: (f / "checkpoint").write_bytes(b""), r"checkpoint: not a T5X checkpoint, or truncated \("),
    "foreign": (lambda f: (f / "checkpoint").write_bytes(b"PK\x03\x04 something else"), "not a T5X checkpoint"),
    "another msgpack": (lambda f: (f / "checkpoint").write_bytes(b"\x93\x01\x02\x03"), "its msgpack holds a list"),
    "tensorflow": (
        lambda f: (f / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-3"'),
        "this is a TensorFlow checkpoint; convert it",
    ),
    "version": (lambda f: change(f, version=1), "T5X checkpoint version 1 is not supported, expected 2 or 3"),
    "no parameters": (lambda f: change(f, optimizer={"state": {}}), r"no parameters under 'optimizer\.target'"),
    "no checkpoint": (lambda f: (f / "checkpoint").unlink(), "there is no file 'checkpoint' in it"),
    "no array": (
        lambda f: (f / KERNEL).rename(f / "moved"),
        r"wo\.kernel: parameter 'encoder\.layers_0\.mlp\.wo\.kernel' cannot be opened .* does not exist",
    ),
    "no chunk": (
        lambda f: (f / KERNEL / "2.0").unlink(),
        r"parameter 'encoder\.layers_0\.mlp\.wo\.kernel' cannot be read \(.*2\.0\" is missing\)",
    ),
    "damaged chunk": (
        lambda f: (f / KERNEL / "2.0").write_bytes(b"nothing of zstd"),
        r"parameter 'encoder\.layers_0\.mlp\.wo\.kernel' cannot be read",
    ),
    "short chunk": (
        lambda f: (f / KERNEL / "2.0").write_bytes((f / KERNEL / "2.0").read_bytes()[:-20]),
        r"parameter 'encoder\.layers_0\.mlp\.wo\.kernel' cannot be read",
    ),
    "damaged metadata": (lambda f: (f / KERNEL / ".zarray").write_text("{"), "cannot be opened .*Invalid JSON"),
    "integers": (rewrite("int32"), r"has dtype int32, .* expected one of float32, bfloat16"),
    "raw bfloat16": (rewrite("uint16"), r"has dtype uint16, .* expected one of float32, bfloat16"),
    "another dtype": (spec(dtype="bfloat16"), "has dtype float32, while 'checkpoint' says bfloat16"),
    "another shape": (spec(metadata={"shape": [128, 65]}), r"shape \(128, 64\), while 'checkpoint' says \(128, 65\)"),
    "another driver": (spec(driver="zarr3"), "is stored as 'zarr3', expected 'zarr'"),
    "parent": (kvstore("../../x/"), r"is said to be in '\.\./\.\./x/', which is no folder of this checkpoint"),
    "the parent itself": (kvstore("a/.."), "which is no folder of this checkpoint"),
    "the folder itself": (kvstore("/"), "which is no folder of this checkpoint"),
    "no path": (spec(kvstore={"driver": "file"}), "is said to be in None"),
    "inline integers": (
        lambda f: change(f, encoder__encoder_norm__scale=np.ones(64, np.int32)),
        r"'encoder\.encoder_norm\.scale' is dtype int32, expected an array",
    ),
    "inline text": (
        lambda f: change(f, encoder__encoder_norm__scale="PLACEHOLDER://encoder"),
        r"'encoder\.encoder_norm\.scale' is a str, expected an array",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_one_line(damage: str, folder: Path) -> None:
    make, match = DAMAGES[damage]
    make(folder)
    with pytest.raises(UserError, match=match) as caught:
        load_backbone(folder, tokenizer=tiny_tokenizer())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("name", ["checkpoint_4.tmp-1700000000", "checkpoint_4.orbax-checkpoint-tmp-17"])
def test_a_checkpoint_that_is_being_written_is_refused(name: str, folder: Path) -> None:
    unfinished = folder.rename(folder.with_name(name))
    with pytest.raises(UserError, match="still being written, or its writing was interrupted"):
        load_backbone(unfinished, tokenizer=tiny_tokenizer())


def test_of_a_folder_of_checkpoints_the_newest_is_named(folder: Path) -> None:
    for step in (12, 4):
        (folder.parent / f"checkpoint_{step}").mkdir()
    (folder.parent / "checkpoint_99.tmp-1").mkdir()
    with pytest.raises(UserError, match=r"holds 3 checkpoint\(s\); name one, the newest is .*/checkpoint_12$"):
        load_backbone(folder.parent)


def test_what_is_read_as_t5x(folder: Path, tmp_path: Path) -> None:
    assert is_t5x("gs://bucket/model/checkpoint_1")
    assert all(is_t5x(place) for place in (folder, folder / "checkpoint", folder.parent))
    assert not any(is_t5x(place) for place in (tmp_path, tmp_path / "absent", folder.parent / "golden.npz"))
    (folder / "model.safetensors").touch()
    assert not is_t5x(folder)


def test_places_as_tensorstore_has_them(tmp_path: Path) -> None:
    wanted = {"driver": "gcs", "bucket": "t5-data", "path": "a/b/checkpoint_7/"}
    assert kvstore_spec("gs://t5-data/a/b/checkpoint_7") == kvstore_spec("gs://t5-data/a/b/checkpoint_7/") == wanted
    assert kvstore_spec(tmp_path) == {"driver": "file", "path": f"{tmp_path}/"}
    for wrong in ("gs://", "gs://bucket", "gs://bucket/"):
        with pytest.raises(UserError, match="expected gs://BUCKET/PATH/checkpoint_N"):
            load_backbone(wrong)
    with pytest.raises(UserError, match="revision 'main' was given"):
        load_backbone("gs://bucket/checkpoint_7", revision="main")


@pytest.mark.parametrize(
    ("shape", "chunks", "count"),
    [
        ((1000, 512), (1000, 512), 1),  # one chunk, however large
        ((4096, 512), (64, 512), 8),
        ((4096, 512), (4096, 64), 8),
        ((30, 3, 7), (4, 2, 3), 1),
        ((5, 7), (2, 9), 1),
        ((1 << 20,), (1 << 10,), 4),
    ],
)
def test_regions_are_whole_chunks_and_cover_the_array_once(
    shape: tuple[int, ...], chunks: tuple[int, ...], count: int
) -> None:
    seen = np.zeros(shape, np.int8)
    regions = list(_regions(shape, chunks, 4))
    for region in regions:
        seen[region] += 1
        assert all(part.start % chunk == 0 for part, chunk in zip(region, chunks))
        assert all(part.stop % chunk == 0 or part.stop == size for part, chunk, size in zip(region, chunks, shape))
    assert (seen == 1).all()
    assert len(regions) == count
    assert math.prod(chunks) * 4 > 1 << 20 or all(seen[region].size * 4 <= 1 << 20 for region in regions)


def test_a_store_reads_what_is_stored(folder: Path) -> None:
    store = T5XStore(folder)
    path = ("encoder", "layers_0", "mlp", "wo", "kernel")
    values = ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / KERNEL}/"}}).result().read()
    np.testing.assert_array_equal(store.read(path), values.result())
    assert store.shape(path) == (128, 64)


# A bucket, as far as reading goes: tensorstore is told to ask this server, which gives it the files of a folder.
BUCKET = """
import http.server, json, os, pathlib, sys, threading, urllib.parse

root, place = pathlib.Path(sys.argv[1]), sys.argv[2]

class Files(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.rpartition("/o/")[2])
        there = self.path.startswith("/storage/v1/b/models/o/") and (root / name).is_file()
        content = (root / name).read_bytes() if there else b""
        self.send_response(200 if there else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
os.environ["GCE_METADATA_ROOT"] = "127.0.0.1:1"  # nobody is asked who we are
os.environ["CLOUDSDK_CONFIG"] = str(root)

import jax, numpy as np
from deptjax.errors import UserError
from deptjax.interop.load import load_backbone
from deptjax.testing import tiny_tokenizer

def load(where):
    return load_backbone(where, tokenizer=tiny_tokenizer())

same = jax.tree.map(lambda a, b: bool((a == b).all()), load("gs://models/" + place).params, load(root / place).params)
told = []
for where in ("gs://models/" + place.rpartition("/")[0], "gs://others/" + place):
    try:
        load(where)
    except UserError as error:
        told.append(str(error))
server.shutdown()
server.server_close()
try:
    load("gs://models/" + place)
except UserError as error:
    told.append(str(error))
print(json.dumps({"same": all(jax.tree.leaves(same)), "leaves": len(jax.tree.leaves(same)), "told": told}))
"""


def test_a_bucket_is_read_like_a_folder_and_one_that_does_not_answer_is_one_line(folder: Path) -> None:
    command = [sys.executable, "-c", BUCKET, str(folder.parents[1]), "sharded/checkpoint_3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["same"], result["leaves"]) == (True, 52)
    model_dir, other, gone = result["told"]
    assert model_dir.startswith("gs://models/sharded: there is no file 'checkpoint' in it")
    assert other.startswith("gs://others/sharded/checkpoint_3: there is no file 'checkpoint' in it")
    assert gone.startswith("gs://models/sharded/checkpoint_3: 'checkpoint' cannot be read (")
    assert not any("\n" in line for line in result["told"])
