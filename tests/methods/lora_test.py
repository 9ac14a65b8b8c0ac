"""LoRA's update against numpy written from the paper, and which projections it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import LinearSite, LoRA
from deptjax.methods.lora import LoRALinear, lora_update

B, T, I, R, O = 2, 3, 7, 5, 11  # noqa: E741 - the letters of the formula


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_update_is_the_papers() -> None:
    x, a, b = draw(B, T, I), draw(I, R), draw(R, O)
    wanted = 1.7 * np.einsum("bti,ir,ro->bto", *(v.astype(np.float64) for v in (x, a, b)))
    got = lora_update(jnp.asarray(x), jnp.asarray(a), jnp.asarray(b), 1.7)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_module_adds_the_update_scaled_by_alpha_over_rank() -> None:
    x, y, a, b = draw(B, T, I), draw(B, T, O), draw(I, R), draw(R, O)
    module = LoRA(rank=R, alpha=3.0).fill(LinearSite("attention/query", I, O), "site")
    got = module.apply({"params": {"lora_a": a, "lora_b": b}}, jnp.asarray(x), jnp.asarray(y))
    wanted = y + 3.0 / R * (x.astype(np.float64) @ a @ b)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_starts_at_zero_with_a_uniform() -> None:
    fan_in, rank = 97, 53
    module = LoRALinear(rank, 1.0, O)
    variables = module.init(jax.random.key(0), jnp.zeros((1, fan_in)), jnp.zeros((1, O)))
    a, limit = np.asarray(variables["params"]["lora_a"]), 1 / np.sqrt(fan_in)
    assert a.shape == (fan_in, rank)
    assert variables["params"]["lora_b"].shape == (rank, O)
    assert not np.any(variables["params"]["lora_b"])
    assert np.abs(a).max() <= limit
    assert a.std() == pytest.approx(limit / np.sqrt(3), rel=0.03)
    y = jnp.asarray(draw(B, O))
    np.testing.assert_array_equal(module.apply(variables, jnp.asarray(draw(B, fan_in)), y), y)


@pytest.mark.parametrize(
    ("targets", "taken", "left"),
    [
        (
            r"(query|value)$",
            ["attention/query", "encoder/attention/value"],
            ["attention/key", "mlp/up", "attention/out"],
        ),
        (r"^mlp/", ["mlp/gate", "mlp/down"], ["attention/query", "encoder/mlp/wi"]),
        (r"", ["attention/out", "mlp/up"], []),
        (r"decoder/.*/out", ["decoder/self_attention/out"], ["encoder/attention/out", "decoder/mlp/wo"]),
    ],
)
def test_targets_choose_projections(targets: str, taken: list[str], left: list[str]) -> None:
    method = LoRA(rank=2, targets=targets)
    assert all(method.fill(LinearSite(path, I, O), "site") is not None for path in taken)
    assert all(method.fill(LinearSite(path, I, O), "site") is None for path in left)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="lora: rank is 0; it must be at least 1"):
        LoRA(rank=0)
    with pytest.raises(UserError, match=r"lora: targets '\(query' is not a regular expression"):
        LoRA(targets="(query")


def test_one_group_whatever_the_backbone() -> None:
    assert LoRA().groups({"backbone": {"site": {"lora_a": 0}}}) == {"backbone": {"site": {"lora_a": "low_rank"}}}
    assert set(LoRA().learning_rates(0.3)) == {"low_rank"}
    assert LoRA().source_limit() is None
