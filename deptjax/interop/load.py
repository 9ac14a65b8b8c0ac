"""Loads a backbone by name: a folder, a model on the hub, a GGUF file, or a model that ships in a package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from deptjax.errors import UserError, nearest
from deptjax.interop import packaged
from deptjax.interop.convert import DTYPES, Place, fill_tree
from deptjax.interop.gguf import GGUFFile, config_from_gguf
from deptjax.interop.huggingface import download, read_config
from deptjax.interop.safetensors import SafetensorsFolder, TensorSource
from deptjax.interop.tokenizers import load_tokenizer, tokenizer_from_gguf
from deptjax.models.backbone import Backbone


def load_backbone(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    scan_layers: bool = False,
    revision: str | None = None,
    dropout_rate: float | None = None,
    place: Place | None = None,
) -> Backbone:
    """Returns the backbone at `name_or_path`: config, parameters (ARCHITECTURE.md has the tree) and tokenizer.

    Args:
      name_or_path: a folder with config.json and safetensors, a `.gguf` file, `packaged:smollm2-135m-instruct`, or the
        name of a model on the Hugging Face hub.
      dtype: of the parameters and of the computation, `float32` or `bfloat16`.
      scan_layers: stack the layers on a leading axis, for models that compile slowly layer by layer.
      revision: a branch, tag or commit of a model on the hub.
      dropout_rate: replaces the dropout rate in T5's config; the LLaMA family has no dropout.
      place: `place(path, array)` turns each finished host array into the tree's leaf, for instance a sharded one; by
        default a jax array on the default device.

    The peak of host memory is the tree itself and a few megabytes. Raises `UserError`, in one line that names the file
    and the field or tensor, for whatever cannot be loaded faithfully.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    path = _locate(name_or_path, revision)
    source: TensorSource
    if path.is_dir():
        config: Any = read_config(path)
        config = _computed(config, dtype, scan_layers, dropout_rate)
        tokenizer = load_tokenizer(path)
        source = SafetensorsFolder(path)
    else:
        file = source = GGUFFile(path)
        config = _computed(config_from_gguf(file), dtype, scan_layers, dropout_rate)
        tokenizer = tokenizer_from_gguf(file.metadata, str(path))
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size} embeddings;"
            " take the tokenizer that belongs to the model"
        )
    params = fill_tree(config, source, scan_layers=scan_layers, dtype=dtype, place=place)
    return Backbone(str(name_or_path), config, params, tokenizer)


def _locate(name_or_path: str | Path, revision: str | None) -> Path:
    """Returns the folder or file to read, downloaded where it is not local."""
    name = str(name_or_path)
    if name.startswith(packaged.PREFIX):
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
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{path}: expected a folder or a .gguf file; give the folder that holds config.json")
    return path


def _computed(config: Any, dtype: str, scan_layers: bool, dropout_rate: float | None) -> Any:
    """Returns the config with what the caller chose about how it is computed."""
    changes: dict[str, Any] = {"dtype": dtype, "scan_layers": scan_layers}
    if dropout_rate is not None:
        if not 0 <= dropout_rate < 1:
            raise UserError(f"dropout_rate is {dropout_rate}, expected a number from 0 up to, not including, 1")
        if any(field.name == "dropout_rate" for field in dataclasses.fields(config)):
            changes["dropout_rate"] = float(dropout_rate)
        elif dropout_rate:
            raise UserError(
                f"dropout_rate is {dropout_rate}, but the {config.family} family has no dropout; leave it out"
            )
    return dataclasses.replace(config, **changes)
