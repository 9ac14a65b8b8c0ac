"""One training step, compiled once for each shape of a batch: of one run, or of all members of a population."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deptjax.mesh import Axes
from deptjax.models.fused_attention import MAPPED
from deptjax.sharding import Placement
from deptjax.training.losses import label_loss, target_loss
from deptjax.training.state import TrainState
from deptjax.typing import Array, Bool, Float, Int, Key, Tree

Batch = dict[str, Array]
LossFn = Callable[[Tree, Tree, Batch, Key | None], Array]
StepFn = Callable[..., tuple[TrainState, dict[str, Array]]]  # of a state, frozen, a batch, and perhaps `go`


def make_loss(
    model: Any, label_tokens: Array | None = None, dropout: bool = False, real: Array | None = None
) -> LossFn:
    """Returns `loss(trainable, frozen, batch, key)`, a float32 scalar in nats.

    Args:
      model: a `PromptedModel`.
      label_tokens: (C,) token ids; given, the loss is over these alone (classification), at the one position where
        the label stands; otherwise it is over the whole vocabulary at every target token.
      dropout: whether dropout is on: the backbone's, and that of a method's own parts.
      real: (C,) which of the label tokens count; `None` for all.
    """

    def loss(trainable: Tree, frozen: Tree, batch: Batch, key: Key | None) -> Array:
        key = key if dropout else None
        if label_tokens is None:
            logits = model.target_logits(trainable, frozen, batch, dropout_key=key)
            return target_loss(logits, batch["targets"], batch["target_mask"], batch["weight"])
        first = {**batch, "targets": batch["targets"][:, :1]}
        logits = model.target_logits(trainable, frozen, first, vocab_ids=label_tokens, dropout_key=key)[:, 0]
        if real is not None:
            logits = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
        return label_loss(logits, batch["label"], batch["weight"])

    return loss


def make_update(
    loss: LossFn,
    tx: optax.GradientTransformation,
    placement: Placement | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> StepFn:
    """Returns `step(state, frozen, batch, go=True) -> (state, metrics)`, not compiled.

    The gradient is taken of `state.trainable` alone. `metrics` has `loss`, `grad_norm` (before clipping) and `finite`;
    when the loss or the gradient is not finite, the step changes no parameter. Neither does it where `go` is false, and
    then `finite` is so too: given the `finite` of the step before, a step behind a bad one changes nothing, though
    nobody has read yet that it was bad.

    With a `placement`, activations are split by rows, and the new state is laid out as the old one is: by `axes`, those
    of the method.
    """

    def step(
        state: TrainState, frozen: Tree, batch: Batch, go: Array | bool = True
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        with contextlib.nullcontext() if placement is None else placement.activations():
            value, grads = jax.value_and_grad(loss)(state.trainable, frozen, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & go
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        new = (optax.apply_updates(state.trainable, updates), opt_state)
        trainable, opt_state = _where(finite, new, (state.trainable, state.opt_state))
        metrics = {"loss": value, "grad_norm": norm, "finite": finite}
        new_state = TrainState(state.step + 1, trainable, opt_state, state.key)
        if placement is not None:
            new_state = jax.lax.with_sharding_constraint(new_state, placement.of_trainable(new_state, axes or {}))
            metrics = jax.lax.with_sharding_constraint(metrics, placement.replicated)
        return new_state, metrics

    return step


def make_train_step(
    loss: LossFn,
    tx: optax.GradientTransformation,
    placement: Placement | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> StepFn:
    """Returns `make_update` of these, jitted; the old state's memory is reused."""
    return jax.jit(make_update(loss, tx, placement, axes), donate_argnums=0)


class Traits(NamedTuple):
    """What tells the K members of a population apart, beside their states: arrays with a leading axis of members.

    `peaks` has the peak learning rate of each group, (K,) float32; `label_tokens` (K, C) and `real` (K, C), as
    `make_loss` takes them, are `None` where the loss is over the vocabulary; `alive` (K,) is false for a member that
    is not to change any more.
    """

    peaks: dict[str, Float[Array, "K"]]
    label_tokens: Int[Array, "K C"] | None
    real: Bool[Array, "K C"] | None
    alive: Bool[Array, "K"]


# The step count is that of all members; all else of a state has a leading axis of members.
MEMBERS: Any = TrainState(step=None, trainable=0, opt_state=0, key=0)  # type: ignore[arg-type]


def make_population_step(
    model: Any,
    make_tx: Callable[[dict[str, Array]], optax.GradientTransformation],
    dropout: bool = False,
    placement: Placement | None = None,
) -> Callable[[TrainState, Tree, Batch, Traits], tuple[TrainState, dict[str, Array]]]:
    """Returns `step(states, frozen, batches, traits) -> (states, metrics)`, jitted: one step of K members at once.

    One member's step is mapped over all of them. `frozen` is not mapped, so the products with its weights are those of
    one batch of K*B rows: each weight is read once, however many members there are. The metrics are those of
    `make_update`, (K,); `finite` is false for a member that is not alive, so it is `alive` for the next step.

    Args:
      model: a `PromptedModel`, of all members.
      make_tx: returns a member's optimiser, given its peak learning rates.
      dropout: as in `make_loss`.
      placement: as in `make_update`.
    """

    def member(state: TrainState, frozen: Tree, batch: Batch, traits: Traits) -> tuple[TrainState, dict[str, Array]]:
        loss = make_loss(model, traits.label_tokens, dropout, traits.real)
        new, metrics = make_update(loss, make_tx(traits.peaks))(state, frozen, batch, traits.alive)
        return new, metrics

    mapped = jax.vmap(member, in_axes=(MEMBERS, None, 0, 0), out_axes=(MEMBERS, 0), axis_name=MAPPED)

    def step(states: TrainState, frozen: Tree, batches: Batch, traits: Traits) -> tuple[TrainState, dict[str, Array]]:
        with contextlib.nullcontext() if placement is None else placement.activations():
            result: tuple[TrainState, dict[str, Array]] = mapped(states, frozen, batches, traits)
        if placement is not None:
            shardings = placement.of_trainable(result[0], model.method.axes, members=True)
            result = jax.lax.with_sharding_constraint(result, (shardings, placement.replicated))
        return result

    return jax.jit(step, donate_argnums=0)


def _where(condition: Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(condition, a.shape), a, b), new, old)
