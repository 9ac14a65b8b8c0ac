"""A backbone: the frozen model that a method is tuned on - its config, its parameters and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from deptjax.methods.base import Sites, Vocabulary
from deptjax.models.config import BackboneConfig
from deptjax.models.pooling import SentencePooling
from deptjax.quantization import quantize_tree, tree_bytes
from deptjax.sharding import Placement, to_host
from deptjax.typing import Array, Tree

# Fields of a config that change how the function is computed or trained, not which function it is.
_NOT_FUNCTION = {
    "dropout_rate",
    "attention_dropout_rate",
    *(field.name for field in dataclasses.fields(BackboneConfig)),
}
_ROWS = 4096  # rows of the embedding table looked at together


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model.

    `name` is what it was loaded from, `config` a `T5Config`, `LlamaConfig`, `GPT2Config` or `BertConfig`, `params` its
    parameter tree (ARCHITECTURE.md has the paths and shapes), `tokenizer` a transformers tokenizer, `placement` the
    devices that the parameters lie on; without one they are where the default device is. `sentence` is how the
    checkpoint's files say that a text becomes one vector, where they do.
    """

    name: str
    config: Any
    params: Tree
    tokenizer: Any
    placement: Placement | None = None
    sentence: SentencePooling | None = None

    def module(self, sites: Sites | None = None) -> Any:
        """Returns the Linen module of the backbone, with `sites` filled (none of them by default)."""
        return self.config.make(Sites() if sites is None else sites)

    @property
    def width(self) -> int:
        """The width D of the embeddings and of the residual stream."""
        return int(self.config.width)

    @property
    def embedding(self) -> Array:
        """The embedding table, (V, D)."""
        return self.params["token_embedder"]["embedding"]

    def vocabulary(self, labels: tuple[str, ...] = ()) -> Vocabulary:
        """Returns what an initialiser may look at: the table, the tokenizer and the task's labels."""
        return Vocabulary(
            self.embedding, self.tokenizer, labels, lambda prompt, where: prompt.check_backbone(self, where)
        )

    @property
    def nbytes(self) -> int:
        """The bytes that the parameters take on a device, all shards together."""
        return tree_bytes(self.params)

    def quantized(self, scheme: str) -> Backbone:
        """Returns the backbone with its kernels quantised: `int8`, `int4` or `nf4` (`deptjax.quantization`).

        `load_backbone(..., quantize=scheme)` gives the same of a float32 load and never has the whole float tree in
        memory. Raises `UserError` for an unknown scheme, and for a backbone that is quantised already.
        """
        config = dataclasses.replace(self.config, quantize=scheme)
        return dataclasses.replace(self, config=config, params=quantize_tree(self.params, scheme))

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells one backbone from another: a flat dict of plain values, ready for JSON.

        Holds the config's fields that define the function (not its dtype, quantisation, the layout of its layers, what
        they keep for a gradient, or dropout), and under `"embedding"` the first 16 hex digits of the SHA-256 of the
        embedding table rounded to bfloat16: so a float32 and a bfloat16 load of the same weights have the same
        fingerprint.
        """
        fields = {"family": self.config.family, **_flatten(dataclasses.asdict(self.config))}
        return {**fields, "embedding": digest_of(map(rounded_bytes, self._embedding_rows()))}

    @functools.cached_property
    def embedding_rms(self) -> float:
        """The root mean square of all entries of the embedding table: the scale on which soft prompts live."""
        total = sum(float(np.sum(np.square(rows.astype(np.float64)))) for rows in self._embedding_rows())
        return math.sqrt(total / math.prod(self.embedding.shape))

    @property
    def prompt_lr(self) -> float:
        """A good peak learning rate for a soft prompt, by the scale of the embeddings it stands among.

        The family's `prompt_lr_ratio` times `embedding_rms`, which counts as 1 where it is more: so T5 1.0, whose
        embeddings are large, has the 0.3 of DePT's authors (arXiv 2309.05173), and a model with small embeddings a
        rate that does not carry its prompt away from them in a few steps.
        """
        return float(self.config.prompt_lr_ratio * min(self.embedding_rms, 1.0))

    def _embedding_rows(self) -> Iterator[np.ndarray]:
        """Yields the table a few thousand rows at a time: it is the largest array, and is not to be copied whole."""
        for start in range(0, self.embedding.shape[0], _ROWS):
            yield to_host(self.embedding[start : start + _ROWS])


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """Returns the first 16 hex digits of the SHA-256 of these bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def rounded_bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of an array rounded to bfloat16, so those of a float32 and of a bfloat16 load are the same."""
    return np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)).view(np.uint8).data


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if not prefix and name in _NOT_FUNCTION:
            continue
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
