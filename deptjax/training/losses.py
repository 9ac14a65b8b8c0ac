"""Losses: cross-entropy of the target tokens, over the whole vocabulary or over the tokens of the labels alone."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from deptjax.typing import Array, Bool, Float, Int


def target_loss(
    logits: Float[Array, "B U V"],
    targets: Int[Array, "B U"],
    target_mask: Bool[Array, "B U"],
    weight: Float[Array, "B"],
) -> Float[Array, ""]:
    """Returns the mean cross-entropy in nats of the real target tokens of the rows that count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    counts = target_mask * weight[:, None]
    return jnp.sum(losses * counts) / jnp.maximum(jnp.sum(counts), 1.0)


def label_loss(logits: Float[Array, "B C"], label: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, ""]:
    """Returns the mean cross-entropy in nats of the right label among the C labels, of the rows that count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
    return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1.0)
