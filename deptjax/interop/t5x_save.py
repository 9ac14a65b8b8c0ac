"""Writes a T5 as a T5X checkpoint, which T5X and `load_backbone` read (`t5x_store` has the format)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deptjax.errors import UserError
from deptjax.interop.convert import put
from deptjax.interop.names import Path as TreePath
from deptjax.interop.t5x_gin import ACTIVATIONS
from deptjax.interop.t5x_store import FILE, dotted, reason
from deptjax.models.backbone import Backbone
from deptjax.quantization import any_quantized
from deptjax.typing import Tree

VERSION = 3
_CHUNK_BYTES = 64 << 20  # T5X's own limit
_SPLIT_FIRST = ("embedding", "rel_embedding")  # leaves that T5X splits over devices by rows; so it does these kernels:
_SPLIT_FIRST_KERNELS = ("out", "wo")


def save_t5x(backbone: Backbone, folder: str | os.PathLike[str], step: int = 0, *, shards: int = 1) -> Path:
    """Writes `checkpoint_{step}` into a folder, and returns its path.

    The checkpoint is what `t5x.checkpoints` writes: all parameters as zarr arrays in the dtype they have, the step, no
    optimizer state (T5X starts a new one with `fallback_to_scratch=True`), and beside them a `model.gin` that binds
    T5X's `T5Config`. A tree whose layers are scanned is written for t5x/examples/scalable_t5, layers on axis 1, heads
    apart, and the bias that the layers share once for each; any other for t5x/examples/t5.

    Everything is written under another name, which is changed at the end. The peak of memory is one leaf.

    Args:
      backbone: a T5.
      folder: T5X's `model_dir`; made if need be.
      step: the step that the parameters are said to be from.
      shards: the number of chunks of each kernel, along the axis that T5X splits over devices.

    Raises `UserError` where the checkpoint exists already, for a model that is not a T5, and for one whose config T5X
    cannot state (another epsilon, distance or start token, or a gate of another activation).
    """
    if step < 0 or shards < 1:
        raise UserError(f"step is {step} and shards is {shards}; expected a step of at least 0 and a shard")
    gin = _gin_file(backbone)
    if str(folder).startswith("gs://"):
        raise UserError(f"{folder}: a T5X checkpoint is written to a local folder; copy it to the bucket from there")
    final = Path(folder).expanduser() / f"checkpoint_{step}"
    if final.exists():
        raise UserError(f"{final}: there is a checkpoint already; choose another step or folder")
    work = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{work}: the folder cannot be made ({error.strerror}); choose another folder") from None
    try:
        _write(_stored(backbone), work, step, shards)
        (work / "model.gin").write_text(gin, encoding="utf-8")
        work.rename(final)  # refuses a folder that came into being meanwhile, unless it is empty
    except OSError as error:
        raise UserError(f"{final}: the checkpoint cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _gin_file(backbone: Backbone) -> str:
    """Returns the `model.gin` of a config. Raises `UserError` for what T5X cannot state."""
    config = backbone.config
    if config.family != "t5":
        raise UserError(f"{backbone.name}: T5X checkpoints are of T5, but this is a {config.family} model; save a T5")
    fixed = {"norm_eps": 1e-6, "relative_max_distance": 128, "decoder_start_token": 0}
    if any_quantized(backbone.params):
        raise UserError(
            f"{backbone.name}: T5X has no quantised checkpoints; load the model without quantize and save that"
        )
    for field, value in fixed.items():
        if getattr(config, field) != value:
            raise UserError(f"{backbone.name}: {field} is {getattr(config, field)}, but T5X's T5 has {value} always")
    names = [name for name, ours in ACTIVATIONS.items() if ours == config.activation]
    if not names:
        raise UserError(f"{backbone.name}: activation '{config.activation}' has no name in T5X")
    fields = {
        "vocab_size": config.vocab_size,
        "emb_dim": config.width,
        "num_heads": config.num_heads,
        "num_encoder_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "head_dim": config.head_dim,
        "mlp_dim": config.mlp_dim,
        "mlp_activations": (names[0], "linear") if config.gated else (names[0],),
        "dropout_rate": config.dropout_rate,
        "logits_via_embedding": config.tied,
    }
    package = "scalable_t5" if config.scan_layers else "t5"
    if config.scan_layers:
        fields["scan_layers"] = True
    lines = ["from __gin__ import dynamic_registration", f"from t5x.examples.{package} import network", ""]
    return "\n".join([*lines, "network.T5Config:", *(f"  {name} = {value!r}" for name, value in fields.items())]) + "\n"


def _stored(backbone: Backbone) -> Iterator[tuple[TreePath, np.ndarray]]:
    """Yields the arrays of a checkpoint in the layout of T5X, one at a time."""
    config = backbone.config
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for path, leaf in _flatten(backbone.params):
        if not config.scan_layers:
            yield path, np.asarray(leaf)
        elif path[1] == "layers":
            values = np.asarray(leaf)
            heads = (config.num_heads, config.head_dim)
            if path[2] != "mlp" and path[-1] == "kernel":
                apart = (*heads, -1) if path[3] == "out" else (-1, *heads)
                values = values.reshape(len(values), *apart)
            yield (path[0], path[0], *path[2:]), np.moveaxis(values, 0, 1)
        elif path[1] == "relpos_bias":
            yield (path[0], *path), np.repeat(np.asarray(leaf)[:, None], layers[path[0]], axis=1)
        else:
            yield path, np.asarray(leaf)


def _write(arrays: Iterator[tuple[TreePath, np.ndarray]], folder: Path, step: int, shards: int) -> None:
    """Writes the arrays, and last the msgpack file that describes them: without it, a folder is no checkpoint."""
    import tensorstore as ts
    from flax.serialization import msgpack_serialize

    target: Tree = {}
    for path, values in arrays:
        name = f"target.{dotted(path)}"
        spec: dict[str, Any] = {
            "driver": "zarr",
            "dtype": values.dtype.name,
            "kvstore": {"driver": "file", "path": f"{name}/"},
            "metadata": {
                "chunks": _chunks(path, values, shards),
                "compressor": {"id": "gzip", "level": 1},
                "shape": list(values.shape),
            },
        }
        here = {**spec, "kvstore": {"driver": "file", "path": f"{folder.absolute() / name}/"}}
        try:
            ts.open(here, create=True).result().write(values).result()
        except ValueError as error:  # also a full disk
            raise UserError(f"{folder}: '{name}' cannot be written ({reason(error)})") from None
        put(target, path, spec)
    state = {"step": np.asarray(step, np.int32), "param_states": {}}
    content = {"version": VERSION, "optimizer": {"state": state, "target": target}}
    (folder / FILE).write_bytes(msgpack_serialize(content))


def _chunks(path: TreePath, values: np.ndarray, shards: int) -> list[int]:
    """Returns the shape of a chunk: a shard, halved along its longest axis until it is small enough."""
    chunks = list(values.shape)
    if values.ndim > 1 and path[-1] != "scale":
        first = path[-1] in _SPLIT_FIRST or path[-2] in _SPLIT_FIRST_KERNELS
        scanned = path[1] == path[0]
        # Heads kept apart are the unit that is split: (D, L, N, H), and (N, L, H, D) for `out`.
        axis = 0 if first else (2 if scanned else 1)
        chunks[axis] = -(-chunks[axis] // shards)
    while np.prod(chunks, dtype=np.int64) * values.dtype.itemsize > _CHUNK_BYTES:
        longest = int(np.argmax(chunks))
        chunks[longest] = -(-chunks[longest] // 2)
    return chunks


def _flatten(tree: Tree, prefix: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value
