"""Opens the arrays of a T5X checkpoint, on disk or in a Google Cloud bucket, without T5X and without TensorFlow.

A checkpoint is a folder `checkpoint_N`. Its file `checkpoint` is msgpack as `flax.serialization` writes it: `{version,
optimizer: {target, state}}`, where `target` is the parameter tree and a leaf is either an array or a description of a
zarr array (version 2 of zarr) in a folder of its own beside the file. A description names the place where it was first
written, so only the last part of its path counts (github.com/google-research/t5x, t5x/checkpoints.py).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deptjax.errors import UserError
from deptjax.interop.names import Path as TreePath

FILE = "checkpoint"
BUCKET = "gs://"
UNFINISHED = re.compile(
    r".*(\.tmp-|orbax-checkpoint-tmp)"
)  # T5X's and orbax's names for a folder that is being written
CHECKPOINT = re.compile(r"checkpoint_(\d+)")
DTYPES = ("float32", "bfloat16", "float16", "float64")
_BLOCK_BYTES = 1 << 20  # what is read at a time; tensorstore holds it several times over
_SECONDS = 60.0  # to wait for an answer of a bucket about one file
# The defaults repeat for many minutes. A chunk that was decoded is not kept: each is asked for once.
_CONTEXT = {
    "gcs_request_retries": {"max_retries": 4, "initial_delay": "200ms", "max_delay": "2s"},
    "cache_pool": {"total_bytes_limit": 0},
}

Region = tuple[slice, ...]


class _Array(NamedTuple):
    """A leaf: its `values` (a numpy array, or an open tensorstore), the `chunks` to read it by, and `where` it is."""

    values: Any
    chunks: tuple[int, ...]
    where: str


def is_t5x(name_or_path: str | Path) -> bool:
    """Returns whether a place is to be read as a T5X checkpoint.

    That is what stands in a bucket, and a local folder that has no safetensors and either holds the file `checkpoint`,
    is named as a checkpoint (finished or not), or holds checkpoints.
    """
    if str(name_or_path).startswith(BUCKET):
        return True
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.name == FILE
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return False
    named = CHECKPOINT.match(path.name) or (path / FILE).is_file()
    return bool(named) or any(CHECKPOINT.fullmatch(child.name) for child in path.iterdir())


def kvstore_spec(location: str | Path) -> dict[str, Any]:
    """Returns tensorstore's description of a folder of files: a local folder, or `gs://bucket/folder`.

    >>> kvstore_spec("gs://t5-data/pretrained_models/t5x/t5_1_1_small/checkpoint_1000000")["bucket"]
    't5-data'
    """
    if not str(location).startswith(BUCKET):
        return {"driver": "file", "path": f"{Path(location).expanduser().absolute()}/"}
    bucket, _, path = str(location).removeprefix(BUCKET).partition("/")
    if not bucket or not path.strip("/"):
        raise UserError(f"'{location}': expected {BUCKET}BUCKET/PATH/checkpoint_N")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path.strip('/')}/"}


class T5XStore:
    """The arrays of one T5X checkpoint, by their path in the tree that T5X saved (`optimizer.target`).

    `location` is the folder `checkpoint_N`, or its file `checkpoint`; local, or in a bucket (`gs://...`). All arrays
    are opened at once, and none is read; arrays that stand in the msgpack file itself are in memory with it.

    Raises `UserError`, in one line, for a place without a finished checkpoint, a file that is not one, and an array
    that is missing or is not of floating point.
    """

    def __init__(self, location: str | Path) -> None:
        self.where = re.sub(f"(?<=[^/:])/+({FILE}/*)?$", "", str(location))
        _check_place(self.where)
        self._folder = kvstore_spec(self.where)
        raw = self.beside(FILE)
        if raw is None:
            raise UserError(
                f"{self.where}: there is no file '{FILE}' in it: not a T5X checkpoint_N, or one that was never finished"
            )
        tree = _target(raw, f"{self.where}/{FILE}")
        del raw
        self._arrays = self._open(dict(_flatten(tree)))

    def paths(self) -> list[TreePath]:
        """Returns the paths of all parameters."""
        return list(self._arrays)

    def shape(self, path: TreePath) -> tuple[int, ...]:
        """Returns the stored shape of a parameter."""
        return tuple(int(n) for n in self._arrays[path].values.shape)

    def blocks(self, path: TreePath) -> Iterator[tuple[Region, np.ndarray]]:
        """Yields `(region, values)` until the parameter is complete, in its stored dtype.

        A region is as many neighbouring chunks as fit in a megabyte, and at least one chunk: each chunk is
        fetched and decompressed once. Raises `UserError` for a chunk that is missing or damaged.
        """
        array = self._arrays[path]
        if isinstance(array.values, np.ndarray):
            yield tuple(slice(0, n) for n in array.values.shape), array.values
            return
        for region in _regions(self.shape(path), array.chunks, array.values.dtype.numpy_dtype.itemsize):
            try:
                values = array.values[region].read().result()
            except (ValueError, OSError) as error:
                raise UserError(
                    f"{array.where}: parameter '{dotted(path)}' cannot be read ({reason(error)}); fetch it again"
                ) from None
            yield region, values

    def read(self, path: TreePath) -> np.ndarray:
        """Returns a whole parameter, in its stored dtype; for small ones."""
        pieces = list(self.blocks(path))
        whole = np.empty(self.shape(path), pieces[0][1].dtype)
        for region, values in pieces:
            whole[region] = values
        return whole

    def beside(self, name: str, above: bool = False) -> bytes | None:
        """Returns a file of the checkpoint's folder, or of the one `above` it; `None` where it is not there."""
        import tensorstore as ts

        folder = dict(self._folder)
        if above:
            folder["path"] = folder["path"].rstrip("/").rpartition("/")[0] + "/"
        try:
            store = ts.KvStore.open(folder, context=ts.Context(_CONTEXT)).result(timeout=_SECONDS)
            found = store.read(name).result(timeout=_SECONDS)
        except (ValueError, OSError) as error:  # a TimeoutError is an OSError
            raise UserError(f"{self.where}: '{name}' cannot be read ({reason(error)}); check the place") from None
        return bytes(found.value) if found.state == "value" else None

    def _open(self, leaves: dict[TreePath, Any]) -> dict[TreePath, _Array]:
        """Returns every leaf opened. All zarr arrays are opened together, for a bucket's answers take their time."""
        import tensorstore as ts

        context = ts.Context(_CONTEXT)
        opening = {}
        for path, leaf in leaves.items():
            if isinstance(leaf, dict):
                folder = {**self._folder, "path": f"{self._folder['path']}{self._array_folder(path, leaf)}/"}
                # Of a missing chunk, zarr says zeros. T5X writes every chunk, so one that is missing was lost.
                spec = {"driver": "zarr", "kvstore": folder, "fill_missing_data_reads": False}
                opening[path] = ts.open(spec, open=True, read=True, context=context)
        found = {}
        for path, leaf in leaves.items():
            if path in opening:
                found[path] = self._opened(path, leaf, opening[path])
            elif isinstance(leaf, np.ndarray) and leaf.dtype.name in DTYPES:
                found[path] = _Array(leaf, leaf.shape, f"{self.where}/{FILE}")
            else:
                what = f"dtype {leaf.dtype.name}" if isinstance(leaf, np.ndarray) else f"a {type(leaf).__name__}"
                self._refuse(FILE, path, f"is {what}, expected an array of {', '.join(DTYPES)}")
        return found

    def _opened(self, path: TreePath, leaf: dict[str, Any], opening: Any) -> _Array:
        name = self._array_folder(path, leaf)
        try:
            store = opening.result(timeout=_SECONDS)
        except (ValueError, OSError) as error:
            self._refuse(name, path, f"cannot be opened ({reason(error)})")
        if store.dtype.name not in DTYPES or store.dtype.name != leaf.get("dtype", store.dtype.name):
            said = leaf.get("dtype", store.dtype.name)
            why = f"has dtype {store.dtype.name}, while '{FILE}' says {said}; expected one of {', '.join(DTYPES)}"
            self._refuse(name, path, why)
        metadata = leaf.get("metadata")
        shape = metadata.get("shape", store.shape) if isinstance(metadata, dict) else store.shape
        if tuple(shape) != tuple(store.shape):
            self._refuse(name, path, f"has shape {tuple(store.shape)}, while '{FILE}' says {tuple(shape)}")
        return _Array(store, tuple(store.chunk_layout.read_chunk.shape), f"{self.where}/{name}")

    def _array_folder(self, path: TreePath, leaf: dict[str, Any]) -> str:
        """Returns the name of a zarr array's folder: the last part of the path in its description."""
        kvstore = leaf.get("kvstore")
        # tensorstore before 0.1.14 wrote the path beside the kvstore; later ones may write a URL.
        place = kvstore if isinstance(kvstore, str) else (kvstore or {}).get("path", leaf.get("path"))
        parts = str(place or "").rstrip("/").split("/")
        if leaf.get("driver") != "zarr":
            self._refuse(FILE, path, f"is stored as {leaf.get('driver')!r}, expected 'zarr'")
        if parts[-1] in ("", ".") or ".." in parts or "\\" in parts[-1] or "\0" in parts[-1]:
            self._refuse(FILE, path, f"is said to be in {place!r}, which is no folder of this checkpoint")
        return parts[-1]

    def _refuse(self, file: str, path: TreePath, why: str) -> Any:
        raise UserError(f"{self.where}/{file}: parameter '{dotted(path)}' {why}; fetch the checkpoint again")


def dotted(path: TreePath) -> str:
    """Returns a path as T5X spells it: `encoder.layers_0.mlp.wo.kernel`."""
    return ".".join(path)


def _check_place(where: str) -> None:
    """Raises `UserError` for a checkpoint that is still being written, and for the folder that holds checkpoints."""
    name = where.rpartition("/")[2]
    if UNFINISHED.match(name):
        raise UserError(
            f"{where}: this checkpoint is still being written, or its writing was interrupted; take another"
        )
    if where.startswith(BUCKET) or (Path(where).expanduser() / FILE).exists() or not Path(where).expanduser().is_dir():
        return
    steps = [m for child in Path(where).expanduser().iterdir() if (m := CHECKPOINT.fullmatch(child.name))]
    if steps:
        newest = max(steps, key=lambda step: int(step[1]))[0]
        raise UserError(
            f"{where}: this folder holds {len(steps)} checkpoint(s); name one, the newest is {where}/{newest}"
        )


def _target(raw: bytes, where: str) -> Any:
    """Returns the parameter tree in a msgpack file's bytes: `optimizer.target`, older ones' `target` or `params`."""
    from flax.serialization import msgpack_restore

    if raw.startswith(b"model_checkpoint_path"):
        raise UserError(f"{where}: this is a TensorFlow checkpoint; convert it with T5X's convert_tf_checkpoint first")
    try:
        content = msgpack_restore(raw)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{where}: not a T5X checkpoint, or truncated ({reason(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a T5X checkpoint (its msgpack holds a {type(content).__name__}, not a tree)")
    version = content.get("version", 3)
    if version not in (2, 3):
        raise UserError(f"{where}: T5X checkpoint version {version} is not supported, expected 2 or 3")
    body = content.get("optimizer", content)
    tree = body.get("target", body.get("params")) if isinstance(body, dict) else None
    if isinstance(tree, dict) and set(tree) == {"params"}:
        tree = tree["params"]
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{where}: there are no parameters under 'optimizer.target'; not a T5X checkpoint of a model")
    return tree


def _flatten(tree: dict[str, Any], prefix: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    for key, value in tree.items():
        path = (*prefix, str(key))
        if isinstance(value, dict) and not ("driver" in value and "kvstore" in value):
            yield from _flatten(value, path)
        else:
            yield path, value


def _regions(shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int) -> Iterator[Region]:
    """Yields the parts of an array: whole chunks, as many along the last axes as fit in a block."""
    steps = [min(chunk, size) for chunk, size in zip(chunks, shape)]
    for axis in reversed(range(len(shape))):
        fit = _BLOCK_BYTES // (math.prod(steps) * itemsize)
        steps[axis] = min(shape[axis], steps[axis] * max(1, fit))
        if steps[axis] < shape[axis]:
            break
    for starts in itertools.product(*(range(0, size, step) for size, step in zip(shape, steps))):
        yield tuple(slice(at, min(at + step, size)) for at, step, size in zip(starts, steps, shape))


def reason(error: BaseException) -> str:
    """Returns an error's text on one line, without the settings that tensorstore appends and the folders of files."""
    text = " ".join(str(error).split(" [")[0].split()).replace('Error opening "zarr" driver: ', "")
    return re.sub(r'"[^"]*/([^"/]+)"', r'"\1"', text)[:200] or type(error).__name__
