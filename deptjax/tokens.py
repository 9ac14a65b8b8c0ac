"""`token_ids`: the one place where a tokenizer is called."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

# A tokenizer of transformers keeps from one call to the next whether it cuts: of two calls at once, one may cut what
# the other is not to cut, or not cut at all. One lock for all, for a model and its encoder may have the same tokenizer.
_TOKENIZING = threading.Lock()


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Returns the token ids of texts, with the options of a transformers tokenizer; from several threads, in turn."""
    if not texts:  # of which some tokenizers make an error
        return []
    with _TOKENIZING:
        return [list(ids) for ids in tokenizer(list(texts), verbose=False, **options)["input_ids"]]
