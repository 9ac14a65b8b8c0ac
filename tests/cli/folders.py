"""The folder of a tiny backbone."""

from __future__ import annotations

import pathlib

from deptjax.testing import save_hf_folder, tiny_llama


def save_llama(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """Writes config, weights and tokenizer of `tiny_llama(seed)`, and returns the folder."""
    return save_hf_folder(tiny_llama(seed), folder)
