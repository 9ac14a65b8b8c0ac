"""The rotary embedding against its formulas."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.models import rope
from deptjax.models.rope import RopeScaling
from tests.models.llama_test import CONFIG


@pytest.mark.parametrize("factors", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (3.0, 2.0, 5.0, 100)])
def test_llama3_scaling_is_its_rule(factors: tuple[float, float, float, int]) -> None:
    factor, low, high, original = factors
    config = dataclasses.replace(CONFIG, head_dim=128, rope_theta=500000.0)
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    expected = []
    for frequency in plain:  # Llama 3.1's rule, case by case
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", *factors))
    np.testing.assert_allclose(rope.rope_frequencies(scaled), expected, rtol=2e-6)
    linear = dataclasses.replace(config, rope_scaling=RopeScaling("linear", factor))
    np.testing.assert_allclose(rope.rope_frequencies(linear), plain / factor, rtol=2e-6)
    np.testing.assert_allclose(rope.rope_frequencies(config), plain, rtol=2e-6)
    assert len({round(e / p, 6) for e, p in zip(expected, plain, strict=True)}) > 2  # all three cases were met


def test_rotation_turns_pairs_by_their_position() -> None:
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 7, 3, 10)), np.array([[0, 1, 2, 3, 4, 5, 6], [3, 5, 7, 11, 13, 17, 19]])
    frequencies = rng.uniform(0.01, 1, 5)
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    angles = rope.rope_angles(jnp.asarray(positions), jnp.asarray(frequencies, jnp.float32))
    ours = rope.rotate(jnp.asarray(x, jnp.float32), angles)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)
    again = rope.rotate(jnp.asarray(x[1], jnp.float32), tuple(a[1] for a in angles))
    np.testing.assert_array_equal(again, ours[1])
