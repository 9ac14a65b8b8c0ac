"""The optimiser: AdamW with a learning rate of its own for each group of parameters.

DePT's authors train the prompt with a learning rate hundreds of times that of the low-rank pair, clip the global norm
of both together at 1.0, and use AdamW with eps 1e-6 and no weight decay; the rate rises linearly for 500 steps and
then falls linearly to zero (Shi and Lipani 2024; what their code does, not what its flags say).
"""

from __future__ import annotations

import jax
import optax

from deptjax.errors import UserError, nearest
from deptjax.methods.base import FIXED
from deptjax.typing import Tree

SCHEDULES = ("linear", "cosine", "constant")


def make_schedule(kind: str, peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """Returns a learning rate as a function of the step: a linear rise to `peak`, then `kind`.

    `linear` and `cosine` reach zero at `steps`; `constant` stays at `peak`.
    """
    if kind not in SCHEDULES:
        raise UserError(f"schedule '{kind}' is not known; there are {', '.join(SCHEDULES)}.{nearest(kind, SCHEDULES)}")
    rest = max(steps - warmup_steps, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if warmup_steps == 0:
        return after
    # The first step has a rate above zero, and the last step of the warm-up is at the peak.
    rise = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([rise, after], [warmup_steps])


def default_warmup(steps: int) -> int:
    """Returns the authors' 500 warm-up steps, or 6 % of a shorter run.

    >>> default_warmup(30_000), default_warmup(150)
    (500, 9)
    """
    return min(500, round(0.06 * steps))


def make_optimizer(
    schedules: dict[str, optax.Schedule],
    groups: Tree,
    *,
    clip_norm: float = 1.0,
    weight_decay: float = 0.0,
    eps: float = 1e-6,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """Returns the optimiser of a trainable tree.

    Args:
      schedules: the learning rate of each group.
      groups: a tree like `trainable` whose leaves name a group (`Method.groups`).
      clip_norm: the norm of all gradients together is clipped to this.
      weight_decay: decoupled, as in AdamW.
      eps: AdamW's.
      accumulate: gradients of this many batches are averaged before one update.

    Raises:
      ValueError: if a group of the tree has no schedule: no parameter is left without a learning rate.
    """
    missing = set(jax.tree.leaves(groups)) - {*schedules, FIXED}
    if missing:
        raise ValueError(f"no learning rate for the parameter group(s) {sorted(missing)}")
    adam = {name: optax.adamw(rate, eps=eps, weight_decay=weight_decay) for name, rate in schedules.items()}
    adam[FIXED] = optax.set_to_zero()
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), optax.multi_transform(adam, groups))
    if accumulate == 1:
        return tx
    return optax.MultiSteps(tx, every_k_schedule=accumulate).gradient_transformation()
