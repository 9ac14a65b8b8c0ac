"""The losses against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from deptjax.training.losses import label_loss, target_loss

B, U, V = 3, 5, 11
RANDOM = np.random.default_rng(0)
LOGITS = (3 * RANDOM.standard_normal((B, U, V))).astype(np.float32)
TARGETS = RANDOM.integers(0, V, (B, U)).astype(np.int32)
MASK = np.arange(U)[None] < np.asarray([5, 2, 3])[:, None]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_target_loss_is_the_mean_over_real_tokens_of_rows_that_count() -> None:
    for weight in ([1, 1, 1], [1, 0, 1], [0, 0, 1]):
        terms = [
            -log_softmax(LOGITS)[b, u, TARGETS[b, u]] for b in range(B) for u in range(U) if MASK[b, u] * weight[b]
        ]
        got = target_loss(*map(jnp.asarray, (LOGITS, TARGETS, MASK)), jnp.asarray(weight, jnp.float32))
        np.testing.assert_allclose(got, np.mean(terms), rtol=0, atol=1e-6)


def test_label_loss_is_the_mean_over_rows_that_count() -> None:
    logits, label = LOGITS[:, 0, :4], np.asarray([3, 0, 1])
    for weight in ([1, 1, 1], [0, 1, 1]):
        terms = [-log_softmax(logits)[b, label[b]] for b in range(B) if weight[b]]
        got = label_loss(jnp.asarray(logits), jnp.asarray(label), jnp.asarray(weight, jnp.float32))
        np.testing.assert_allclose(got, np.mean(terms), rtol=0, atol=1e-6)


def test_no_row_that_counts_gives_zero_and_not_nan() -> None:
    nobody = jnp.zeros(B)
    assert target_loss(*map(jnp.asarray, (LOGITS, TARGETS, MASK)), nobody) == 0
    assert label_loss(jnp.asarray(LOGITS[:, 0]), jnp.full(B, -1), nobody) == 0
