"""Batches of real texts from the library's pipeline: padded to a few lengths, or to 256 as the authors' code must."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import MAX_LENGTH, SIZES, Entrant
from deptjax.data.buckets import choose_buckets
from deptjax.data.pipeline import Batch, train_batches
from deptjax.data.preprocess import Example, Preprocessor
from deptjax.data.tasks import get_task
from deptjax.interop import packaged
from deptjax.interop.tokenizers import load_tokenizer
from deptjax.training.config import TrainConfig

WINDOW = 32  # batches sorted together by the pipeline; all of them are measured


def text_batches(entrant: Entrant) -> tuple[list[Batch], jax.Array | None]:
    """Returns the batches of one window in the order of training, and the labels' tokens where the loss is over these.

    The rows of a batch do not depend on its padding. Raises `UserError` when the data or the tokenizer cannot be had.
    """
    if entrant.text == "synthetic":
        examples, label_tokens = _synthetic(SIZES[entrant.model].vocab), None
    else:
        examples, label_tokens = _real(str(entrant.text))
    buckets: tuple[int, ...] = (MAX_LENGTH,)
    if entrant.padding == "buckets":
        lengths = [len(example.source) for example in examples]
        buckets = choose_buckets(lengths, TrainConfig().buckets, max_length=MAX_LENGTH)
    stream = train_batches(examples, batch_size=entrant.batch, buckets=buckets, seed=0, window=WINDOW, num_threads=0)
    return list(itertools.islice(stream, WINDOW)), label_tokens


def _real(name: str) -> tuple[list[Example], jax.Array | None]:
    data = get_task(name).load()
    tokenizer = load_tokenizer(packaged.tokenizer_folder("t5"))
    preprocessor = Preprocessor(tokenizer, data.task, form="encoder_decoder", max_length=MAX_LENGTH)
    tokens = jnp.asarray(preprocessor.label_tokens()) if preprocessor.labels_are_tokens() else None
    return preprocessor.encode_all(data.train), tokens


def _synthetic(vocab: int) -> list[Example]:
    """Returns examples of three lengths, most of them short."""
    random = np.random.default_rng(2)
    lengths = random.choice([8, 24, 120], size=256, p=[0.5, 0.4, 0.1])
    return [
        Example(random.integers(3, vocab, length).astype(np.int32), np.asarray([5, 1], np.int32), -1)
        for length in lengths
    ]
