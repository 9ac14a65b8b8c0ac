"""The dynamic programme against every possible choice of buckets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deptjax.data.buckets import bucket_of, choose_buckets


def padded(lengths, buckets):
    return sum(bucket_of(length, buckets) for length in lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 99])
def test_no_choice_pads_less(count):
    random = np.random.default_rng(count)
    for _ in range(20):
        lengths = random.integers(1, 33, size=13).tolist()
        buckets = choose_buckets(lengths, count)
        assert len(buckets) <= count
        assert all(bucket % 4 == 0 for bucket in buckets)
        every = [
            choice
            for size in range(1, min(count, 8) + 1)
            for choice in itertools.combinations(range(4, 33, 4), size)
            if choice[-1] >= max(lengths)
        ]
        assert padded(lengths, buckets) == min(padded(lengths, choice) for choice in every)


def test_no_more_buckets_than_help():
    assert choose_buckets([5, 6, 7, 8], count=5) == (8,)
    assert choose_buckets([1, 9], count=2, multiple=1) == (1, 9)


def test_max_length_bounds_the_last_bucket():
    assert choose_buckets([3, 54], count=2, multiple=16, max_length=56) == (16, 56)
    with pytest.raises(ValueError, match="above max_length=56"):
        choose_buckets([57], count=1, max_length=56)


@pytest.mark.parametrize(("lengths", "options"), [([], {}), ([0], {}), ([1], {"count": 0}), ([1], {"multiple": 0})])
def test_bad_arguments(lengths, options):
    with pytest.raises(ValueError, match="at least 1"):
        choose_buckets(lengths, **{"count": 1, **options})


def test_bucket_of():
    assert [bucket_of(length, (4, 8)) for length in (1, 4, 5, 8)] == [4, 4, 8, 8]
    with pytest.raises(ValueError, match=r"no bucket of \(4, 8\) holds 9"):
        bucket_of(9, (4, 8))
