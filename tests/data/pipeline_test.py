"""Batches: every example once an epoch, few shapes, the same on every host, and resumable to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deptjax.data.buckets import bucket_of, choose_buckets
from deptjax.data.pipeline import BatchPlan, choose_target_buckets, collate, eval_batches, train_batches
from deptjax.data.preprocess import Example
from deptjax.errors import UserError


def make_examples(count, seed=0, labels=True, longest=29):
    random = np.random.default_rng(seed)
    return [
        Example(
            # The first token is the example's number, so that a row of a batch tells which example it is.
            np.concatenate([[index], random.integers(1, 99, random.integers(0, longest))]).astype(np.int32),
            random.integers(1, 99, 2 if labels else random.integers(1, 12)).astype(np.int32),
            int(random.integers(3)) if labels else -1,
        )
        for index in range(count)
    ]


def buckets_of(examples, count=3):
    return choose_buckets([len(example.source) for example in examples], count)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].dtype == right[name].dtype


def test_plan_sees_every_example_once_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 50, 77)
    plan = BatchPlan(lengths, batch_size=7, seed=3, window=11)  # a window is an epoch
    for epoch in range(3):
        seen = np.concatenate([plan.batch(i) for i in range(epoch * 11, epoch * 11 + 11)])
        assert sorted(seen) == list(range(77))
    plan = BatchPlan(lengths, batch_size=5, seed=3, window=4)  # epochs end inside windows
    counts = np.bincount(np.concatenate([plan.batch(i) for i in range(77 * 4)]), minlength=77)
    assert (counts == 20).all()


def test_plan_is_a_pure_function_of_seed_and_index():
    lengths = np.random.default_rng(0).integers(1, 9, 100)
    forward, backward = BatchPlan(lengths, 6, 1), BatchPlan(lengths, 6, 1)
    there = [forward.batch(i).tolist() for i in range(200)]
    back = [backward.batch(i).tolist() for i in reversed(range(200))][::-1]
    assert there == back
    assert there != [BatchPlan(lengths, 6, 2).batch(i).tolist() for i in range(200)]
    assert there[:32] != there[32:64]


def test_plan_sorts_by_length_inside_a_window_and_shuffles_batches():
    lengths = np.arange(1, 321)
    plan = BatchPlan(lengths, batch_size=10, seed=0, window=32)
    batches = [lengths[plan.batch(i)] for i in range(32)]
    assert all(batch.max() - batch.min() == 9 for batch in batches)
    firsts = [batch.min() for batch in batches]
    assert firsts != sorted(firsts)


def test_ties_are_in_random_order():
    plan = BatchPlan(np.full(64, 5), batch_size=8, seed=0, window=8)
    batches = [plan.batch(i).tolist() for i in range(16)]
    assert {tuple(sorted(batch)) for batch in batches[:8]} != {tuple(sorted(batch)) for batch in batches[8:]}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_fewer_examples_than_a_batch(count):
    examples = make_examples(count)
    batches = take(iter(train_batches(examples, batch_size=8, buckets=buckets_of(examples), seed=0, window=2)), 6)
    counts = np.bincount(np.concatenate([batch["source"][:, 0] for batch in batches]), minlength=count)
    assert (counts == 48 // count).all()


def test_format_of_batches():
    examples = make_examples(5)
    batch = collate(examples, 32, 3, rows=7)
    assert {name: (values.shape, str(values.dtype)) for name, values in batch.items()} == {
        "source": ((7, 32), "int32"),
        "source_mask": ((7, 32), "bool"),
        "targets": ((7, 3), "int32"),
        "target_mask": ((7, 3), "bool"),
        "label": ((7,), "int32"),
        "weight": ((7,), "float32"),
    }
    for index, example in enumerate(examples):
        length = len(example.source)
        assert batch["source"][index, :length].tolist() == example.source.tolist()
        assert batch["source_mask"][index].tolist() == [True] * length + [False] * (32 - length)
        assert not batch["source"][index, length:].any()
        assert batch["targets"][index].tolist() == [*example.target, 0]
        assert batch["label"][index] == example.label
    assert batch["weight"].tolist() == [1] * 5 + [0] * 2
    assert batch["source_mask"][5:].any(axis=1).all()
    with pytest.raises(ValueError, match="does not fit"):
        collate([Example(np.ones(9, np.int32), np.ones(1, np.int32), 0)], 8, 1)


def test_few_shapes_and_little_padding():
    examples = make_examples(500)
    buckets = buckets_of(examples)
    batches = take(iter(train_batches(examples, batch_size=10, buckets=buckets, seed=0)), 100)
    assert {batch["source"].shape for batch in batches} == {(10, bucket) for bucket in buckets}
    assert {batch["targets"].shape for batch in batches} == {(10, 2)}
    # Two epochs; sorted batches pad hardly more than each text in a bucket of its own would.
    padded = sum(batch["source"].size for batch in batches)
    alone = 2 * sum(bucket_of(len(example.source), buckets) for example in examples)
    assert alone <= padded < 1.05 * alone < 0.7 * 1000 * max(buckets)


def test_free_text_targets_have_a_few_lengths():
    examples = make_examples(200, labels=False)
    lengths = choose_target_buckets(examples)
    assert 1 < len(lengths) <= 4
    batches = take(iter(train_batches(examples, batch_size=3, buckets=buckets_of(examples), seed=0)), 60)
    assert {batch["targets"].shape[1] for batch in batches} <= set(lengths)
    assert (np.concatenate([batch["label"] for batch in batches]) == -1).all()


@pytest.mark.parametrize("labels", [True, False])
def test_hosts_together_make_the_single_host_batch(labels):
    examples = make_examples(90, labels=labels)
    options = {"batch_size": 12, "buckets": buckets_of(examples), "seed": 4}
    whole = take(iter(train_batches(examples, **options)), 20)
    parts = [take(iter(train_batches(examples, **options, process_index=i, process_count=3)), 20) for i in range(3)]
    for batch, *rest in zip(whole, *parts, strict=True):
        assert all(part["source"].shape == (4, batch["source"].shape[1]) for part in rest)
        same(batch, {name: np.concatenate([part[name] for part in rest]) for name in batch})


@pytest.mark.parametrize("threads", [0, 2])
def test_set_state_continues_identically(threads):
    examples = make_examples(64)
    options = {"batch_size": 6, "buckets": buckets_of(examples), "seed": 1, "window": 4}
    iterator = iter(train_batches(examples, **options, num_threads=threads))
    take(iterator, 13)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint stores it
    ahead = take(iterator, 9)
    again = iter(train_batches(examples, **options, num_threads=2 - threads))
    again.set_state(state)
    for left, right in zip(ahead, take(again, 9), strict=True):
        same(left, right)
    iterator.set_state(state)  # and backwards, in the same iterator
    same(next(iterator), ahead[0])


def test_eval_sees_every_example_once_with_its_index():
    examples = make_examples(23)
    buckets = buckets_of(examples)
    seen, widths = [], []
    for indices, batch in eval_batches(examples, batch_size=5, buckets=buckets):
        assert batch["source"].shape[0] == 5
        assert batch["source"].shape[1] in buckets
        assert batch["source"][: len(indices), 0].tolist() == indices.tolist()
        assert batch["weight"].tolist() == [1] * len(indices) + [0] * (5 - len(indices))
        seen += indices.tolist()
        widths.append(batch["source"].shape[1])
    assert sorted(seen) == list(range(23))
    assert widths == sorted(widths)
    assert list(eval_batches([], batch_size=5, buckets=buckets)) == []


def test_eval_on_hosts():
    examples = make_examples(21)
    options = {"batch_size": 6, "buckets": buckets_of(examples)}
    whole = list(eval_batches(examples, **options))
    parts = [list(eval_batches(examples, **options, process_index=i, process_count=3)) for i in range(3)]
    for (indices, batch), *rest in zip(whole, *parts, strict=True):
        assert np.concatenate([part[0] for part in rest]).tolist() == indices.tolist()
        same(batch, {name: np.concatenate([part[1][name] for part in rest]) for name in batch})


def test_examples_to_predict_have_no_target():
    examples = [Example(np.ones(3, np.int32), np.zeros(0, np.int32), -1)] * 2
    (_, batch) = next(eval_batches(examples, batch_size=2, buckets=(4,)))
    assert not batch["target_mask"].any()


def test_errors():
    examples = make_examples(5)
    with pytest.raises(UserError, match="no training examples"):
        train_batches([], batch_size=2, buckets=(4,), seed=0)
    with pytest.raises(UserError, match="batch_size=5 must be a multiple of the 2 hosts"):
        train_batches(examples, batch_size=5, buckets=(32,), seed=0, process_count=2)
    with pytest.raises(UserError, match=r"longer than the last of the source buckets \(4,\)"):
        train_batches(examples, batch_size=5, buckets=(4,), seed=0)
    with pytest.raises(UserError, match="seed=-1"):
        train_batches(examples, batch_size=5, buckets=(32,), seed=-1)
