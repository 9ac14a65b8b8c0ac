"""The input embeddings of texts as `deptjax export --format embeds` writes them: JSON lines, or a file of arrays."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import numpy as np

from deptjax.cli.lines import Lines
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError
from deptjax.inference.embeddings import embedder
from deptjax.inference.inputs import Text
from deptjax.interop.array_files import array_bytes
from deptjax.interop.prompts import check_free, write_file
from deptjax.interop.torch_files import torch_bytes
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt

_ARRAYS = (".safetensors", ".npz", ".npy")


def texts_of(options: dict[str, Any], prompt: Prompt) -> Iterable[Text]:
    """Returns the texts that `--text` gives, or the rows of the input file or of standard input."""
    if options.get("text") and options.get("input"):
        raise UserError(f"--text and {options['input']} both give texts; keep one")
    if options.get("text"):
        return [Row(_columns(prompt, text), f"--text '{text}'") for text in options["text"]]
    columns = Task.from_config({**prompt.task, "source": None}).input_template.columns
    return Lines(options.get("input") or "-", None, options.get("encoding", "utf-8"), columns).rows()


def _columns(prompt: Prompt, text: str) -> dict[str, object]:
    columns = Task.from_config({**prompt.task, "source": None}).input_template.columns
    if len(columns) > 1:
        raise UserError(f"--text: the prompt needs the columns {', '.join(columns)}; give JSON lines with these")
    if not text.strip():
        raise UserError("--text is empty; give a text")
    return {columns[0]: text}


def write_embeddings(
    backbone: Backbone,
    prompt: Prompt,
    rows: Iterable[Text],
    output: str | None,
    overwrite: bool,
    encoder: Backbone | None = None,
) -> None:
    """Writes the input embeddings of rows to a file, or as JSON lines to standard output where `output` is `None`.

    A file gets its name when it is whole. Raises `UserError` for one that exists, and for more than one text where the
    file holds one array.
    """
    path = None if output is None else pathlib.Path(output).expanduser()
    if path is not None:
        check_free(path, overwrite)
        if not path.absolute().parent.is_dir():
            raise UserError(f"--output {output}: there is no folder {path.parent}; make it first")
    embed = embedder(backbone, prompt, encoder)
    embedded = embed(rows)
    if path is None or path.suffix not in _ARRAYS:
        with _lines(path) as file:
            count = 0
            for text, array in embedded:
                file.write(_line(text, array) + "\n")
                count += 1
            _check_some(count)
        return
    arrays = {f"text_{i}": array for i, (_, array) in enumerate(embedded, 1)}
    _check_some(len(arrays))
    if path.suffix == ".npy" and len(arrays) > 1:
        raise UserError(f"--output {output}: an .npy file holds one array, and there are {len(arrays)} texts; use .npz")
    if path.suffix != ".safetensors":  # numpy's own files know no bfloat16
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    write_file(path, array_bytes(arrays, path.suffix))


def _check_some(count: int) -> None:
    if not count:
        raise UserError("the input is empty; it must hold at least one text")


def _line(text: str, array: np.ndarray) -> str:
    coded = base64.b64encode(torch_bytes(array)).decode()
    return json.dumps(
        {"text": text, "prompt_embeds": coded, "shape": list(array.shape), "dtype": array.dtype.name},
        ensure_ascii=False,
    )


@contextlib.contextmanager
def _lines(path: pathlib.Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            yield file
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
