"""Requests in batches: which texts run together, and the arrays that they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from deptjax.data.buckets import bucket_of
from deptjax.data.pipeline import collate
from deptjax.data.preprocess import Example
from deptjax.inference.answers import Reader
from deptjax.inference.mixed import Part, can_mix, mixed_rows
from deptjax.inference.rows import Rows
from deptjax.inference.served import Served
from deptjax.inference.text_encoder import TextEncoder
from deptjax.methods.zero_shot import ZeroShot
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.typing import Tree

# The sizes that texts, labels and batches are padded to: few, so that a handful of programs serves all requests.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
LABELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
SEQUENCES = (4, 16, 64, 256, 1024, 4096)  # tasks with at most so many label sequences are batched together
WASTE = 1.25  # batches of several methods are put together unless that pads them to more than so many times as much


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A text on its way: its place among the texts, its task, how it is read, and its tokens."""

    place: int
    served: Served
    reader: Reader
    source_text: str
    example: Example


class Batches:
    """How the requests of a `Predictor` share batches of at most `batch_size` rows."""

    def __init__(self, backbone: Backbone, batch_size: int) -> None:
        self._backbone, self._batch_size = backbone, batch_size
        self._bare = PromptedModel.build(backbone, ZeroShot())

    def of(self, requests: Sequence[Request], kind_of: Callable[[Request], object]) -> list[list[Request]]:
        """Returns the requests in batches, of texts of like length.

        Requests of one bank and `kind_of` make full batches; what is left of them is put together with what others of
        that kind have left, where it can be.
        """
        groups: dict[tuple[int, object], list[Request]] = {}
        for request in requests:
            groups.setdefault((id(request.served.bank), kind_of(request)), []).append(request)
        batches: list[list[Request]] = []
        rest: dict[object, list[list[Request]]] = {}
        for (_, kind), group in groups.items():
            group.sort(key=lambda request: len(request.example.source))
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                mixes = len(batch) < self._batch_size and can_mix(batch[0].served.method)
                (rest.setdefault(kind, []) if mixes else batches).append(batch)
        return batches + [batch for left in rest.values() for batch in self._put_together(left)]

    def _put_together(self, batches: Sequence[list[Request]]) -> list[list[Request]]:
        """Returns the batches, each of one bank, with those joined for which that pads no more than `WASTE` allows."""
        left, joined = sorted(batches, key=self._positions), list[list[Request]]()
        while left:
            count = next(n for n in range(len(left), 0, -1) if n == 1 or self._are_one(left[:n]))
            joined.append([request for batch in left[:count] for request in batch])
            left = left[count:]
        return joined

    def _are_one(self, batches: Sequence[list[Request]]) -> bool:
        """Returns whether batches are better run as one."""
        together = [request for batch in batches for request in batch]
        if len(together) > self._batch_size:
            return False
        return self._positions(together) <= WASTE * sum(map(self._positions, batches))

    def _positions(self, batch: Sequence[Request]) -> int:
        """Returns how many positions the backbone runs for a batch, the padding included.

        A causal backbone has read prompts before, and for themselves; others read them with each text.
        """
        vectors = max(request.served.method.positions_in_front() for request in batch)
        return self.size(len(batch)) * (self._length(batch) + (0 if self._backbone.config.is_causal else vectors))

    def arrays(self, batch: Sequence[Request]) -> tuple[Any, Tree, Rows, Any, Any]:
        """Returns what a compiled function needs: model, frozen, rows, source and its mask, padded to their buckets."""
        of_bank: dict[int, list[int]] = {}
        for row, request in enumerate(batch):
            of_bank.setdefault(id(request.served.bank), []).append(row)
        if len(of_bank) == 1:
            return self._alike(batch)
        parts = [Part(*self._alike([batch[row] for row in rows]), rows) for rows in of_bank.values()]
        length, size = max(part.source.shape[1] for part in parts), self.size(len(batch))
        arrays = collate([request.example for request in batch], length, 1, rows=size)
        source, mask = jnp.asarray(arrays["source"]), jnp.asarray(arrays["source_mask"])
        return self._bare, self._backbone.params, mixed_rows(parts, size), source, mask

    def _alike(self, batch: Sequence[Request]) -> tuple[Any, Tree, Rows, Any, Any]:
        """Returns `arrays` of requests of one bank."""
        bank, size = batch[0].served.bank, self.size(len(batch))
        keys = [request.served.key for request in batch]
        model, rows = bank.take(keys + keys[-1:] * (size - len(keys)))
        length, limit = self._length(batch), model.method.source_limit()
        length = length if limit is None else min(length, limit)
        arrays = collate([request.example for request in batch], length, 1, rows=size)
        rows = dataclasses.replace(rows, encoding=_encodings(batch, size))
        return model, bank.frozen, rows, jnp.asarray(arrays["source"]), jnp.asarray(arrays["source_mask"])

    @staticmethod
    def _length(batch: Sequence[Request]) -> int:
        """Returns the length that the texts of a batch are padded to."""
        return padded(max(len(request.example.source) for request in batch), LENGTHS)

    def size(self, count: int) -> int:
        """Returns the number of rows that a batch of `count` is padded to: a power of two, or the largest batch."""
        return min(1 << (count - 1).bit_length(), self._batch_size)


def _encodings(batch: Sequence[Request], size: int) -> Any:
    """Returns what its task's encoder makes of each text of a batch, (size, H), or `None` without encoders."""
    read: dict[TextEncoder, list[int]] = {}
    for row, request in enumerate(batch):
        if request.served.encoder is not None:
            read.setdefault(request.served.encoder, []).append(row)
    if not read:
        return None
    found = np.zeros((size, next(iter(read)).width), np.float32)
    for encoder, rows in read.items():
        texts = [batch[row].example.encoder_source for row in rows]
        found[rows] = encoder.vectors([tokens for tokens in texts if tokens is not None])
    return jnp.asarray(found)


def padded(size: int, sizes: Sequence[int]) -> int:
    """Returns the least of the sizes that holds `size`, or a power of two above them all."""
    return bucket_of(size, sizes) if size <= sizes[-1] else 1 << (size - 1).bit_length()
