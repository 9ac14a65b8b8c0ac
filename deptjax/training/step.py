"""One training step, compiled once for each shape of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deptjax.training.losses import label_loss, target_loss
from deptjax.training.state import TrainState
from deptjax.typing import Array, Key, Tree

Batch = dict[str, Array]
LossFn = Callable[[Tree, Tree, Batch, Key | None], Array]


def make_loss(model: Any, label_tokens: Array | None = None, dropout: bool = False) -> LossFn:
    """Returns `loss(trainable, frozen, batch, key)`, a float32 scalar in nats.

    Args:
      model: a `PromptedModel`.
      label_tokens: (C,) token ids; given, the loss is over these alone (classification), at the one position where
        the label stands; otherwise it is over the whole vocabulary at every target token.
      dropout: whether the backbone's dropout is on.
    """

    def loss(trainable: Tree, frozen: Tree, batch: Batch, key: Key | None) -> Array:
        key = key if dropout else None
        if label_tokens is None:
            logits = model.target_logits(trainable, frozen, batch, dropout_key=key)
            return target_loss(logits, batch["targets"], batch["target_mask"], batch["weight"])
        first = {**batch, "targets": batch["targets"][:, :1]}
        logits = model.target_logits(trainable, frozen, first, vocab_ids=label_tokens, dropout_key=key)
        return label_loss(logits[:, 0], batch["label"], batch["weight"])

    return loss


def make_train_step(
    loss: LossFn, tx: optax.GradientTransformation
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns `step(state, frozen, batch) -> (state, metrics)`, jitted; the old state's memory is reused.

    The gradient is taken of `state.trainable` alone. `metrics` has `loss`, `grad_norm` (before clipping) and `finite`;
    when the loss or the gradient is not finite, the step changes no parameter.
    """

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        value, grads = jax.value_and_grad(loss)(state.trainable, frozen, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        new = (optax.apply_updates(state.trainable, updates), opt_state)
        trainable, opt_state = jax.tree.map(
            lambda a, b: jnp.where(jnp.broadcast_to(finite, a.shape), a, b), new, (state.trainable, state.opt_state)
        )
        metrics = {"loss": value, "grad_norm": norm, "finite": finite}
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)
