"""From encoded examples to batches: a plan that is a pure function of the seed, and a resumable iterator over it.

The stream of examples is one seeded permutation an epoch, one behind the other. It is read in windows of W batches; a
window is sorted by source length, cut into batches, and the batches shuffled. So a batch holds texts of like length,
little is padded, and every example is seen once an epoch. Which examples are in batch i depends on the seed and i
alone: any batch can be made without those before it, and a run can go on from a step number. Whether batch i is one of
short or of long texts depends on i alone: runs with different seeds that train together have batches of like length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from deptjax.data.buckets import bucket_of, choose_buckets, power_of_two
from deptjax.data.preprocess import Example
from deptjax.errors import UserError

Batch = dict[str, np.ndarray]  # ARCHITECTURE.md, "Batches"

_ENDLESS = 2**48  # batches of the training stream; more than any run takes


class BatchPlan:
    """Which examples are in which batch.

    Args:
        lengths: source lengths (n,), at least one.
        batch_size: rows of a batch, over all hosts.
        seed: non-negative.
        window: W, the batches that are sorted together. More pads less and mixes less.

    With fewer examples than a batch has rows, an example is in a batch more than once.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, window: int = 32):
        self._lengths = np.asarray(lengths, np.int64)
        if self._lengths.ndim != 1 or self._lengths.size == 0:
            raise UserError("there are no training examples; give at least one row")
        if batch_size < 1 or window < 1:
            raise UserError(f"batch_size={batch_size} and window={window} must be at least 1")
        if seed < 0:
            raise UserError(f"seed={seed} must be 0 or more")
        self.batch_size, self.window, self.seed = batch_size, window, seed
        # Bounded caches: the threads of the pipeline ask for neighbouring batches, of one or two windows and epochs.
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=4)(self._make_window)

    def batch(self, index: int) -> np.ndarray:
        """Returns the example indices (B,) int64 of batch `index`, from 0."""
        window, within = divmod(index, self.window)
        return self._window(window)[within]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self._lengths))

    def _make_window(self, window: int) -> np.ndarray:
        size, total = self.window * self.batch_size, len(self._lengths)
        start, parts, taken = window * size, [], 0
        while taken < size:
            epoch, at = divmod(start + taken, total)
            part = self._epoch(epoch)[at : at + size - taken]
            parts.append(part)
            taken += len(part)
        rows = np.concatenate(parts)
        random = np.random.default_rng([self.seed, 1, window])
        by_length = np.lexsort((random.random(size), self._lengths[rows]))  # ties in random order
        batches = rows[by_length].reshape(self.window, self.batch_size)
        batches = batches[np.random.default_rng([1, window]).permutation(self.window)]  # for all seeds the same
        batches.flags.writeable = False  # it is shared by the cache
        return batches


def choose_target_buckets(examples: Sequence[Example]) -> tuple[int, ...]:
    """Returns the padded lengths of targets: one for labels, at most four for free text."""
    lengths = [max(1, len(example.target)) for example in examples]  # examples to predict have no target
    if all(example.label >= 0 for example in examples):
        return (max(lengths),)
    return choose_buckets(lengths, count=4)


def collate(
    examples: Sequence[Example],
    source_length: int,
    target_length: int,
    rows: int | None = None,
    encoder_length: int | None = None,
) -> Batch:
    """Returns a batch of `examples` padded on the right to the lengths given.

    Args:
        examples: at least one.
        source_length: T.
        target_length: U.
        rows: B; more than there are examples adds copies of the last one with weight 0 (real tokens, so that no row is
            masked whole, which would make a softmax over nothing). None for their number.
        encoder_length: E; None for the least power of two.

    Returns source (B, T) int32, source_mask (B, T) bool, targets (B, U) int32, target_mask (B, U) bool, label (B,)
    int32, weight (B,) float32; of examples with `encoder_source` also that, (B, E) int32, and encoder_mask (B, E) bool.
    Raises `ValueError` for a text longer than its padded length.
    """
    filled = [*examples, *[examples[-1]] * ((rows or len(examples)) - len(examples))]
    weight = np.zeros(len(filled), np.float32)
    weight[: len(examples)] = 1
    source, source_mask = pad([example.source for example in filled], source_length)
    targets, target_mask = pad([example.target for example in filled], target_length)
    return {
        "source": source,
        "source_mask": source_mask,
        "targets": targets,
        "target_mask": target_mask,
        "label": np.asarray([example.label for example in filled], np.int32),
        "weight": weight,
        **_read_by_encoder(filled, encoder_length),
    }


def _read_by_encoder(examples: Sequence[Example], length: int | None) -> Batch:
    """Returns the texts in an encoder's tokens, if they are there."""
    rows = _encoder_rows(examples)
    if not rows:
        return {}
    ids, mask = pad(rows, power_of_two(max(map(len, rows))) if length is None else length)
    return {"encoder_source": ids, "encoder_mask": mask}


def _encoder_rows(examples: Sequence[Example]) -> list[np.ndarray]:
    return [example.encoder_source for example in examples if example.encoder_source is not None]


def pad(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids (B, length) int32, padded on the right with 0, and their mask.

    Raises `ValueError` for a row that is longer.
    """
    lengths = np.asarray([len(row) for row in rows])
    if lengths.max() > length:
        raise ValueError(f"a text of {lengths.max()} tokens does not fit the padded length {length}")
    mask = np.arange(length) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def _host_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns the rows of a batch that a host makes: a block, in the order in which JAX joins the hosts' parts."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size={batch_size} must be a multiple of the {process_count} hosts, and at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not below process_count={process_count}")
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def train_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    target_buckets: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    window: int = 32,
    num_threads: int = 2,
    prefetch: int = 8,
) -> grain.IterDataset:
    """Returns an endless data set of training batches; `iter()` of it has `get_state` and `set_state`.

    The state is a batch number, so it is small JSON, and the same for every number of threads or hosts. Each batch is
    padded to the least of `buckets` that holds its longest source on any host, so all hosts have equal shapes, and
    there are at most `len(buckets) * len(target_buckets)` shapes.

    Args:
        examples: the training set.
        batch_size: B over all hosts.
        buckets: increasing source lengths (`choose_buckets`).
        seed: draws the order.
        target_buckets: increasing target lengths; None for `choose_target_buckets(examples)`.
        process_index, process_count: this host and their number; a host gets B / process_count rows.
        window, num_threads, prefetch: see `BatchPlan`; threads that make batches ahead; how many ahead.

    Raises `UserError` when there are no examples, the hosts do not divide `batch_size`, or an example is longer than
    the last bucket.
    """
    mine = _host_rows(batch_size, process_index, process_count)
    sources = np.asarray([len(example.source) for example in examples], np.int64)
    targets = np.asarray([len(example.target) for example in examples], np.int64)
    plan = BatchPlan(sources, batch_size, seed, window)
    target_buckets = tuple(target_buckets or choose_target_buckets(examples))
    _check_fit("source", sources, buckets)
    _check_fit("target", targets, target_buckets)

    def make(index: int) -> Batch:
        rows = plan.batch(index)
        read = _encoder_rows([examples[row] for row in rows])  # of all hosts, whose shapes are the same
        return collate(
            [examples[row] for row in rows[mine]],
            bucket_of(int(sources[rows].max()), buckets),
            bucket_of(int(targets[rows].max()), target_buckets),
            encoder_length=power_of_two(max(map(len, read))) if read else None,
        )

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    return grain.MapDataset.range(_ENDLESS).map(make).to_iter_dataset(options)


def eval_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    buckets: Sequence[int],
    target_buckets: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields `(indices, batch)` over all examples once, short ones first.

    `indices` (R,) int64 are the examples in the first R rows; the other B - R rows of the last batch are filler of
    weight 0. So results go to their places by `out[indices] = result[: len(indices)]`. With several hosts each gets its
    own block of every batch, and `indices` are those of its rows (perhaps none). Arguments and errors as in
    `train_batches`; no examples give no batches.
    """
    mine = _host_rows(batch_size, process_index, process_count)
    if not examples:
        return
    sources = np.asarray([len(example.source) for example in examples], np.int64)
    targets = np.asarray([len(example.target) for example in examples], np.int64)
    target_buckets = tuple(target_buckets or choose_target_buckets(examples))
    _check_fit("source", sources, buckets)
    _check_fit("target", targets, target_buckets)
    order = np.argsort(sources, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        full = collate(
            [examples[row] for row in rows],
            bucket_of(int(sources[rows].max()), buckets),
            bucket_of(int(targets[rows].max()), target_buckets),
            rows=batch_size,
        )
        yield rows[mine], {name: values[mine] for name, values in full.items()}


def _check_fit(what: str, lengths: np.ndarray, buckets: Sequence[int]) -> None:
    if lengths.max() > buckets[-1]:
        raise UserError(
            f"a {what} of {lengths.max()} tokens is longer than the last of the {what} buckets {tuple(buckets)}; "
            "choose the buckets over all splits, or cut to a smaller max_length"
        )
