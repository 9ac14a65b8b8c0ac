"""Tiny models in folders, under the names that the documentation uses, knowing the words of the texts at hand."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable

from deptjax.models.backbone import Backbone
from deptjax.testing import WORDS, save_hf_folder, tiny_tokenizer


def save_tiny(make: Callable[..., Backbone], folder: pathlib.Path, texts: str) -> pathlib.Path:
    """Writes `make()` with a vocabulary of the words in `texts` beside its own, and returns the folder."""
    words = dict.fromkeys([*WORDS, *re.findall(r"\w+|[^\w\s]+", texts)])
    tokenizer = tiny_tokenizer(tuple(words))
    backbone = make(vocab_size=len(tokenizer))
    return save_hf_folder(dataclasses.replace(backbone, tokenizer=tokenizer), folder)
