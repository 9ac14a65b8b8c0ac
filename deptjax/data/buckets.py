"""A few padded lengths for many text lengths, so that jit compiles few shapes and little is padded."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np


def choose_buckets(
    lengths: Iterable[int], count: int, multiple: int = 4, max_length: int | None = None
) -> tuple[int, ...]:
    """Returns at most `count` lengths that minimise the tokens when each text is padded to the least that holds it.

    Exact, by dynamic programming over the candidate lengths c_1 < ... < c_n (the text lengths, rounded up):
    cost(k, j) = min over i < j of cost(k-1, i) + (number of texts in (c_i, c_j]) * c_j. Of equal costs the fewest
    buckets win, for a bucket is a compilation.

    Args:
        lengths: token counts of the texts, at least one, each at least 1.
        count: the most buckets, at least 1.
        multiple: every bucket is a multiple of it, except one that would exceed `max_length`, which is `max_length`.
        max_length: no text may be longer; None for no bound.

    Returns the buckets in increasing order; the last holds the longest text. Raises `ValueError` when there are no
    lengths, a length below 1 or above `max_length`, or `count` or `multiple` below 1.

    >>> choose_buckets([3, 3, 4, 9, 30], count=2)
    (4, 32)
    """
    sizes = np.asarray(list(lengths), np.int64)
    if sizes.size == 0 or sizes.min() < 1 or count < 1 or multiple < 1:
        raise ValueError(f"choose_buckets needs lengths, count and multiple of at least 1; got {sizes.size} lengths")
    if max_length is not None and sizes.max() > max_length:
        raise ValueError(f"a length of {sizes.max()} is above max_length={max_length}")
    rounded = -(-sizes // multiple) * multiple
    if max_length is not None:
        rounded = np.minimum(rounded, max_length)
    candidates, texts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(texts)])  # below[j]: texts that the first j candidates hold
    n = len(candidates)
    cost = np.full(n + 1, np.iinfo(np.int64).max // 2)
    cost[0] = 0
    choices: list[np.ndarray] = []
    best_cost, best_k = None, 0
    for k in range(1, min(count, n) + 1):
        new, choice = np.full_like(cost, np.iinfo(np.int64).max // 2), np.zeros(n + 1, np.int64)
        for j in range(k, n + 1):
            options = cost[:j] + (below[j] - below[:j]) * candidates[j - 1]
            choice[j] = np.argmin(options)
            new[j] = options[choice[j]]
        cost = new
        choices.append(choice)
        if best_cost is None or cost[n] < best_cost:
            best_cost, best_k = cost[n], k
    buckets, j = [], n
    for k in range(best_k, 0, -1):
        buckets.append(int(candidates[j - 1]))
        j = int(choices[k - 1][j])
    return tuple(reversed(buckets))


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """Returns the least of the increasing `buckets` that holds `length`; raises `ValueError` when none does.

    >>> bucket_of(5, (4, 8, 16))
    8
    """
    at = bisect.bisect_left(buckets, length)
    if at == len(buckets):
        raise ValueError(f"no bucket of {tuple(buckets)} holds {length} tokens")
    return buckets[at]


def power_of_two(length: int, least: int = 16) -> int:
    """Returns the least power of two that holds a text of so many tokens, and is not below `least`.

    >>> power_of_two(3), power_of_two(33)
    (16, 64)
    """
    return max(least, 1 << (length - 1).bit_length())
