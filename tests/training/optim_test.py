"""Two learning rates, clipping, accumulation, and schedules, against values computed by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deptjax.errors import UserError
from deptjax.training.optim import default_warmup, make_optimizer, make_schedule
from deptjax.typing import Tree

TREE = {"prompt": jnp.asarray([1.0, -2.0, 3.0]), "a": jnp.asarray([[0.5], [0.25]])}
GROUPS = {"prompt": "prompt", "a": "low_rank"}
GRADS = {"prompt": jnp.asarray([3.0, -4.0, 0.5]), "a": jnp.asarray([[12.0], [-0.7]])}


def constant(rate: float) -> optax.Schedule:
    return lambda step: rate


def update(tx: optax.GradientTransformation, *grads: Tree, params: Tree = TREE) -> Tree:
    """Returns the change of the parameters after these gradients."""
    with jax.enable_x64(True):  # Adam's 1 - 0.999^t is good to 1e-4 alone in float32; here the formula is looked at
        params, *grads = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), t) for t in (params, *grads))
        state, now = tx.init(params), params
        for gradient in grads:
            updates, state = tx.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return jax.tree.map(lambda a, b: np.asarray(a - b), now, params)


def close(got: Tree, wanted: Tree, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, wanted)


def test_each_group_moves_by_its_own_rate() -> None:
    """The first step of AdamW is the rate times the sign of the gradient, whatever its size."""
    tx = make_optimizer({"prompt": constant(0.3), "low_rank": constant(0.005)}, GROUPS)
    # The gradient is g after clipping, the step g / (|g| + eps): 1 to within eps / |g|.
    norm = math.sqrt(3**2 + 4**2 + 0.5**2 + 12**2 + 0.7**2)
    wanted = {
        name: -rate * np.asarray(GRADS[name]) / norm / (np.abs(GRADS[name]) / norm + 1e-6)
        for name, rate in (("prompt", 0.3), ("a", 0.005))
    }
    change = update(tx, GRADS)
    close(change, wanted, 1e-6)
    np.testing.assert_allclose(np.abs(change["prompt"]), 0.3, rtol=1e-4)
    np.testing.assert_allclose(np.abs(change["a"]), 0.005, rtol=1e-4)
    np.testing.assert_array_equal(np.sign(change["prompt"]), -np.sign(GRADS["prompt"]))


def adamw_by_hand(grads: list[Tree], rates: dict[str, float], clip: float, decay: float, eps: float) -> Tree:
    """Returns the change of the parameters by Loshchilov and Hutter's algorithm 2, after clipping the global norm."""
    now = {k: np.asarray(v, np.float64) for k, v in TREE.items()}
    first, second = ({k: np.zeros_like(v) for k, v in now.items()} for _ in range(2))
    for t, raw in enumerate(grads, 1):
        norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in raw.values()))
        for name in now:
            g = np.asarray(raw[name], np.float64) * min(1.0, clip / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            step = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.999**t)) + eps)
            now[name] = now[name] - rates[GROUPS[name]] * (step + decay * now[name])
    return {k: now[k] - np.asarray(TREE[k], np.float64) for k in now}


@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["clipped", "not_clipped"])
def test_adamw_with_clipping_of_the_norm_of_all_groups_together(scale: float) -> None:
    random = np.random.default_rng(0)
    grads = [
        {k: jnp.asarray(scale * random.standard_normal(v.shape), jnp.float32) for k, v in TREE.items()}
        for _ in range(4)
    ]
    rates = {"prompt": 0.3, "low_rank": 0.005}
    tx = make_optimizer({k: constant(v) for k, v in rates.items()}, GROUPS, clip_norm=1.0, weight_decay=0.1, eps=1e-6)
    close(update(tx, *grads), adamw_by_hand(grads, rates, 1.0, 0.1, 1e-6))


def test_clip_norm_changes_what_adam_sees() -> None:
    """One gradient above the norm, one below: only their ratio tells whether the first was clipped."""
    small = jax.tree.map(lambda g: g / 1000, GRADS)
    rates = {"prompt": 0.3, "low_rank": 0.005}
    results = {}
    for clip in (1.0, 1e9):
        tx = make_optimizer({k: constant(v) for k, v in rates.items()}, GROUPS, clip_norm=clip)
        results[clip] = update(tx, GRADS, small)
        close(results[clip], adamw_by_hand([GRADS, small], rates, clip, 0.0, 1e-6))
    assert np.abs(results[1.0]["prompt"] - results[1e9]["prompt"]).max() > 1e-3


def test_accumulated_gradients_are_averaged_then_clipped_once() -> None:
    rates = {"prompt": constant(0.3), "low_rank": constant(0.005)}
    other = jax.tree.map(lambda g: -0.3 * g + 1, GRADS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, GRADS, other)
    twice = make_optimizer(rates, GROUPS, accumulate=2)
    close(update(twice, GRADS, other), update(make_optimizer(rates, GROUPS), mean))
    jax.tree.map(lambda change: np.testing.assert_array_equal(change, 0), update(twice, GRADS))


def test_accumulation_counts_updates_and_not_batches_in_the_schedule() -> None:
    schedule = make_schedule("linear", 1.0, 4, 0)  # 1, 3/4, 1/2, 1/4
    tx = make_optimizer({"prompt": schedule, "low_rank": schedule}, GROUPS, accumulate=2)
    plain = make_optimizer({"prompt": schedule, "low_rank": schedule}, GROUPS)
    close(update(tx, *[GRADS] * 6), update(plain, *[GRADS] * 3))


@pytest.mark.parametrize(
    ("kind", "warmup", "wanted"),
    [
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2, 0]),
        ("linear", 2, [0.5, 1, 1, 2 / 3, 1 / 3, 0]),
        ("constant", 3, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("constant", 0, [1] * 6),
        ("cosine", 1, [1, *((1 + math.cos(math.pi * t / 4)) / 2 for t in range(5))]),
        ("linear", 1, [1, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", 5, [0.2, 0.4, 0.6, 0.8, 1, 1]),
    ],
)
def test_schedules(kind: str, warmup: int, wanted: list[float]) -> None:
    schedule = make_schedule(kind, 0.3, 5, warmup)
    got = [float(schedule(step)) for step in range(6)]
    np.testing.assert_allclose(got, 0.3 * np.asarray(wanted), rtol=0, atol=1e-6)
    assert float(schedule(jnp.asarray(3))) == pytest.approx(0.3 * wanted[3], abs=1e-6)


def test_the_authors_schedule() -> None:
    """500 steps up, then down to zero at the last of 30,000."""
    schedule = make_schedule("linear", 0.3, 30_000, default_warmup(30_000))
    got = {step: float(schedule(step)) for step in (0, 249, 499, 500, 15_250, 29_999, 30_000)}
    wanted = {0: 0.3 / 500, 249: 0.15, 499: 0.3, 500: 0.3, 15_250: 0.15, 29_999: 0.3 / 29_500, 30_000: 0.0}
    assert got == pytest.approx(wanted, abs=1e-6)


def test_warmup_of_short_runs() -> None:
    assert [default_warmup(steps) for steps in (1, 8, 150, 8333, 100_000)] == [0, 0, 9, 500, 500]


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"schedule 'linaer' is not known; .* Did you mean 'linear'\?"):
        make_schedule("linaer", 0.3, 5, 0)
    with pytest.raises(ValueError, match=r"no learning rate for the parameter group\(s\) \['low_rank'\]"):
        make_optimizer({"prompt": constant(0.3)}, GROUPS)
