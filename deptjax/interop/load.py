"""Loads a backbone by name: a folder, a model on the hub, a GGUF file, or a model that ships in a package."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deptjax.errors import UserError, nearest
from deptjax.interop import packaged
from deptjax.interop.convert import DTYPES, Sharded, fill_tree
from deptjax.interop.gguf import GGUFFile, config_from_gguf
from deptjax.interop.huggingface import download, read_config
from deptjax.interop.names import entries, with_parts
from deptjax.interop.safetensors import SafetensorsFolder
from deptjax.interop.sentence_transformers import sentence_pooling
from deptjax.interop.t5x import fill_t5x, t5x_config
from deptjax.interop.t5x_store import BUCKET, T5XStore, is_t5x
from deptjax.interop.tokenizers import TOKENIZER_FILES, chosen_tokenizer, load_tokenizer, tokenizer_from_gguf
from deptjax.models.backbone import Backbone
from deptjax.models.fused_attention import check_name, check_runs_here
from deptjax.models.pooling import SentencePooling
from deptjax.models.sizes import weight_bytes
from deptjax.quantization import check_scheme
from deptjax.sharding import Placement
from deptjax.typing import Tree

# Parameters from which layers are scanned. Measured on a CPU with a training step of DePT on SmolLM2-135M's 30 layers:
# unrolled, it compiles in 16 s and takes 1.65 s; scanned, 9 s and 2.01 s. So 20 steps make up for the compiling of a
# small model. Models of billions run on accelerators, where a step loses little by the scan, and every bucket's program
# has all layers; and they are those that need rematerialisation, which a scan holds the compiler to.
SCANNED_FROM = 1_000_000_000
_SENTENCE_TRANSFORMER = "0_Transformer"  # where the first sentence-transformers put the model in a folder


def load_backbone(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    scan_layers: bool | None = None,
    attention: str = "auto",
    revision: str | None = None,
    dropout_rate: float | None = None,
    tokenizer: Any = None,
    mesh: str | Mapping[str, int] | Placement | None = "auto",
    sharding_rules: str | Mapping[str, str | Sequence[str] | None] | None = None,
) -> Backbone:
    """Returns the backbone at `name_or_path`: config, parameters (ARCHITECTURE.md has the tree) and tokenizer.

    Args:
      name_or_path: a folder with config.json and safetensors, a `.gguf` file, a T5X checkpoint (`.../checkpoint_N`,
        local or `gs://bucket/...`), `packaged:smollm2-135m-instruct` or `packaged:all-minilm-l6-v2`, or the name of a
        model on the Hugging Face hub.
      dtype: of the parameters and of the computation, `float32` or `bfloat16`.
      quantize: `int8`, `int4` or `nf4` keeps the kernels of projections in so many bits; the computation stays in
        `dtype`. They are quantised one by one, from float32, as they are read (`deptjax.quantization`).
      scan_layers: stack the layers on a leading axis and compile one of them instead of all; by default from a billion
        parameters on. A prompt that was tuned in one layout is used in the other.
      attention: how it is computed: `xla`, by a kernel (`cudnn` on NVIDIA GPUs, `flash` on TPUs), or `auto`, which
        takes the platform's kernel where that pays (docs/performance.md).
      revision: a branch, tag or commit of a model on the hub.
      dropout_rate: replaces the dropout rates in T5's, GPT-2's or BERT's config; the LLaMA family has no dropout.
      tokenizer: replaces the tokenizer beside the weights: a folder, `spiece.model`, `tokenizer.json`, `packaged:t5`,
        `packaged:mt5`, a name on the hub, or a loaded transformers tokenizer. T5X checkpoints have none of their own.
      mesh: over which devices the model and the batches are split (see `deptjax.sharding`): sizes, such as
        `data:2,fsdp:4` or a mapping; a preset, `data`, `fsdp`, `tensor` or `fsdp+tensor`; `auto`: every device has
        the whole model, unless it is too large for one; or a `Placement` that is there already.
      sharding_rules: for a logical axis (`embed`, `heads`, `kv_heads`, `mlp`, `vocab`, `layers`) the mesh axes that it
        is split over instead of its own, or `None`; as a text, `vocab:none,embed:model`.

    Where a mesh splits the model, weights are read straight into their shards, and no host holds more than its own
    devices' parts. The peak of host memory is the tree itself and a few megabytes (of a T5X checkpoint, a few of its
    chunks). Raises `UserError`, in one line that names the file and the field or tensor, for whatever cannot be loaded
    faithfully.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    check_scheme(quantize)
    opened = _open(_locate(name_or_path, revision))
    scan_layers = _is_large(opened.config) if scan_layers is None else scan_layers
    config = _computed(
        opened.config,
        dropout_rate,
        dtype=dtype,
        quantize=quantize,
        scan_layers=scan_layers,
        attention=attention,
    )
    chosen = opened.tokenizer() if tokenizer is None else chosen_tokenizer(tokenizer)
    if len(chosen) > config.vocab_size:
        raise UserError(
            f"{opened.where}: the tokenizer has {len(chosen)} tokens but the model only {config.vocab_size} embeddings;"
            " take the tokenizer that belongs to the model"
        )
    if config.is_masked:
        config = dataclasses.replace(config, mask_token=chosen.mask_token_id)
    placement = _placement(config, mesh, sharding_rules)
    place = None if placement.mesh.size == 1 else Sharded(placement)
    params = opened.fill(config, scan_layers=scan_layers, dtype=dtype, quantize=quantize, place=place)
    return Backbone(str(name_or_path), config, params, chosen, placement, opened.sentence)


def _is_large(config: Any) -> bool:
    """Returns whether a model has so many parameters that its layers are scanned if nobody says anything."""
    return sum(math.prod(entry.leaf_shape) for entry in entries(config)) >= SCANNED_FROM


def _placement(config: Any, mesh: Any, rules: Any) -> Placement:
    """Returns where the model lies; its size is only counted where there is a choice."""
    if isinstance(mesh, Placement):
        if rules is not None:
            raise UserError("mesh is a Placement, which has rules of its own; leave out sharding_rules")
        return mesh
    weights = weight_bytes(config) if jax.device_count() > 1 and mesh == "auto" else None
    return Placement.over(mesh=mesh, rules=rules, config=config, weight_bytes=weights)


class _Opened(NamedTuple):
    """A checkpoint of some format: its config, what reads its tokenizer and its parameters, how it pools, if so."""

    where: str
    config: Any
    tokenizer: Callable[[], Any]
    fill: Callable[..., Tree]
    sentence: SentencePooling | None = None


def _open(place: str | Path) -> _Opened:
    if is_t5x(place):
        store = T5XStore(place)
        return _Opened(store.where, t5x_config(store), partial(_tokenizer_beside, store.where), _with(fill_t5x, store))
    path = Path(place)
    if path.is_dir():
        sentence = sentence_pooling(path)
        inner = path / _SENTENCE_TRANSFORMER
        path = inner if (inner / "config.json").is_file() and not (path / "config.json").exists() else path
        config, source = read_config(path), SafetensorsFolder(path)
        config = with_parts(config, source.names())
        return _Opened(str(path), config, partial(load_tokenizer, path), _with(fill_tree, source), sentence)
    file = GGUFFile(path)
    tokenizer = partial(tokenizer_from_gguf, file.metadata, str(path))
    return _Opened(str(path), config_from_gguf(file), tokenizer, _with(fill_tree, file))


def _with(fill: Callable[..., Tree], source: Any) -> Callable[..., Tree]:
    return lambda config, **options: fill(config, source, **options)


def _tokenizer_beside(where: str) -> Any:
    """Returns the tokenizer that somebody put into a T5X checkpoint's folder."""
    folder = Path(where).expanduser()
    if where.startswith(BUCKET) or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{where}: a T5X checkpoint has no tokenizer; give one with tokenizer= or --tokenizer, for T5's vocabulary"
            " packaged:t5, for mT5's packaged:mt5"
        )
    return load_tokenizer(folder)


def _locate(name_or_path: str | Path, revision: str | None) -> str | Path:
    """Returns the folder or file to read, downloaded where it is not local; a place in a bucket as it stands."""
    name = str(name_or_path)
    path: str | Path
    if name.startswith(BUCKET):
        path = name
    elif name.startswith(packaged.PREFIX):
        path = packaged.model(name)
    else:
        path = Path(name).expanduser()
        if not name or not path.exists():
            looks_local = isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
            if looks_local or not name or name.endswith((".gguf", ".safetensors")):
                raise UserError(f"'{name}': there is no such file or folder; check the path")
            return download(name, revision)
    if revision is not None:
        raise UserError(f"revision '{revision}' was given, but '{name}' is not a model on the hub; leave it out")
    if isinstance(path, Path) and path.is_file() and path.suffix != ".gguf" and not is_t5x(path):
        raise UserError(f"{path}: expected a folder or a .gguf file; give the folder that holds config.json")
    return path


def _computed(config: Any, dropout_rate: float | None, **changes: Any) -> Any:
    """Returns the config with what the caller chose about how it is computed."""
    check_name(config.family, changes["attention"])
    check_runs_here(changes["attention"], changes["dtype"], config.head_dim)
    if dropout_rate is not None:
        if not 0 <= dropout_rate < 1:
            raise UserError(f"dropout_rate is {dropout_rate}, expected a number from 0 up to, not including, 1")
        rates = {"dropout_rate": float(dropout_rate), "attention_dropout_rate": None}  # the latter is then the former
        known = {field.name for field in dataclasses.fields(config)}
        if "dropout_rate" in known:
            changes |= {name: rate for name, rate in rates.items() if name in known}
        elif dropout_rate:
            raise UserError(
                f"dropout_rate is {dropout_rate}, but the {config.family} family has no dropout; leave it out"
            )
    return dataclasses.replace(config, **changes)
