"""Scores of labels against their likelihood under teacher forcing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.inference.scoring import sequence_scores, token_scores
from tests.cases import case_of, padded, rows_of

LENGTHS = (7, 3, 5)
CASES = [("llama", "dept"), ("t5", "dept"), ("llama", "lora")]
SEQUENCES = [[20, 31, 1], [20, 1], [40, 7, 9, 1], [33, 1]]  # two that begin alike, of several lengths


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def likelihoods(family: str, method: str, sequences: list[list[int]]) -> np.ndarray:
    """Returns log p(label | text) (B, C), each label run as a target of its own."""
    case = case_of(family, method)
    source, mask = padded(rows_of(LENGTHS), 7)
    result = np.zeros((len(LENGTHS), len(sequences)))
    longest = max(map(len, sequences))
    for c, tokens in enumerate(sequences):
        targets = jnp.asarray([tokens + [0] * (longest - len(tokens))] * len(LENGTHS), jnp.int32)
        batch = {"source": source, "source_mask": mask, "targets": targets}
        logits = log_softmax(case.logits(case.moved, case.frozen, batch))
        result[:, c] = sum(logits[:, u, token] for u, token in enumerate(tokens))
    return result


@pytest.mark.parametrize(("family", "method"), CASES)
def test_sequence_scores_are_the_likelihoods_of_the_labels(family: str, method: str) -> None:
    case = case_of(family, method)
    source, mask = padded(rows_of(LENGTHS), 7)
    ids, real = padded([np.asarray(s) for s in SEQUENCES], 4)
    got = sequence_scores(case.model, case.frozen, case.rows, source, mask, ids, real)
    np.testing.assert_allclose(got, likelihoods(family, method, SEQUENCES), rtol=1e-4, atol=1e-4)
    assert np.all(np.asarray(got) < 0)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_row_may_have_sequences_of_its_own(family: str) -> None:
    case = case_of(family, "dept")
    source, mask = padded(rows_of(LENGTHS), 7)
    ids, real = padded([np.asarray(s) for s in SEQUENCES], 4)
    order = np.asarray([[2, 0, 1, 3], [3, 2, 1, 0], [0, 1, 2, 3]])
    own = real[order] & (np.arange(4)[None, :, None] < np.asarray([4, 2, 3])[:, None, None])
    got = np.asarray(sequence_scores(case.model, case.frozen, case.rows, source, mask, ids[order], own))
    wanted = np.take_along_axis(likelihoods(family, "dept", SEQUENCES), order, axis=1)
    np.testing.assert_allclose(got[own[:, :, 0]], wanted[own[:, :, 0]], rtol=1e-4, atol=1e-4)
    assert np.all(np.isneginf(got[~np.asarray(own[:, :, 0])]))


@pytest.mark.parametrize(("family", "method"), CASES)
def test_token_scores_are_the_likelihoods_of_the_labels_tokens(family: str, method: str) -> None:
    case, labels = case_of(family, method), [20, 31, 33, 40, 41]
    source, mask = padded(rows_of(LENGTHS), 7)
    tokens, shown = jnp.asarray(labels), jnp.ones(len(labels), bool)
    got = token_scores(case.model, case.frozen, case.rows, source, mask, tokens, shown)
    wanted = log_softmax(likelihoods(family, method, [[label] for label in labels]))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    # A sequence of one token is that token.
    ids, real = padded([np.asarray([label]) for label in labels], 1)
    sequences = sequence_scores(case.model, case.frozen, case.rows, source, mask, ids, real)
    np.testing.assert_allclose(log_softmax(np.asarray(sequences)), got, rtol=1e-4, atol=1e-4)
    # A row with labels of its own, some of them masked out, shares out what is left.
    own = jnp.asarray([[20, 31, 33, 40, 41], [41, 40, 0, 0, 0], [33, 20, 31, 0, 0]])
    some = jnp.asarray([[True] * 5, [True] * 2 + [False] * 3, [True] * 3 + [False] * 2])
    mixed = np.asarray(token_scores(case.model, case.frozen, case.rows, source, mask, own, some))
    np.testing.assert_allclose(mixed[0], got[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed[1, :2], log_softmax(np.asarray(got)[1, [4, 3]]), rtol=1e-4, atol=1e-4)
    assert np.all(np.isneginf(mixed[1, 2:]))
