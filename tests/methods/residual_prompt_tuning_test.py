"""Residual prompt tuning against numpy written from the paper, where it starts, and its parameter counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import ResidualPromptTuning
from deptjax.methods.base import Texts, input_parameters
from deptjax.methods.initializers import embedding_rms
from deptjax.training.state import count_parameters
from tests.cases import backbone_of, make_case

M, H, D = 5, 3, 11
SHAPES = {"w1": (D, H), "b1": (H,), "w2": (H, D), "b2": (D,), "norm_scale": (D,), "norm_bias": (D,)}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def row_by_row(p: dict[str, np.ndarray], norm: bool) -> np.ndarray:
    """Returns P + LayerNorm(relu(P W1 + b1) W2 + b2), a vector at a time; a leading axis M is a network each."""
    rows = []
    for i, vector in enumerate(np.float64(p["prompt"])):
        own = {k: np.float64(v[i] if v.ndim > len(SHAPES[k]) else v) for k, v in p.items() if k != "prompt"}
        made = np.maximum(vector @ own["w1"] + own["b1"], 0) @ own["w2"] + own["b2"]
        if norm:
            made = (made - made.mean()) / np.sqrt(made.var() + 1e-5) * own["norm_scale"] + own["norm_bias"]
        rows.append(vector + made)
    return np.stack(rows)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_the_prompt_is_itself_and_its_network(separate: bool, norm: bool) -> None:
    shapes = SHAPES if norm else {k: v for k, v in SHAPES.items() if "norm" not in k}
    params = {k: draw(*((M,) if separate else ()), *shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    params["prompt"] = draw(M, D)
    method = ResidualPromptTuning(prompt_length=M, bottleneck=H, separate=separate, norm=norm)
    embeds = jnp.asarray(draw(2, 4, D))
    prompt, same = method.apply({"params": params}, embeds, Texts.whole(embeds), method="streams")
    wanted = row_by_row(params, norm)
    np.testing.assert_allclose(prompt, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(same, embeds)


def size_of(method: ResidualPromptTuning, width: int) -> int:
    return count_parameters(jax.eval_shape(lambda: input_parameters(method, jax.random.key(0), width)))


def test_parameter_counts() -> None:
    """925K on T5-large with 100 vectors, as Xiao et al. 2023 (DPT) count it."""
    assert size_of(ResidualPromptTuning(prompt_length=100), 1024) == 925_072
    shared, separate = (
        ResidualPromptTuning(prompt_length=M, bottleneck=H, separate=s, norm=False) for s in (False, True)
    )
    assert size_of(shared, D) == M * D + 2 * D * H + H + D
    assert size_of(separate, D) == M * (D + 2 * D * H + H + D)


def test_linear_layers_start_as_torchs_and_the_norm_at_the_embeddings_size() -> None:
    method = ResidualPromptTuning(prompt_length=M, bottleneck=97)
    first = input_parameters(method, jax.random.key(0), 101)
    for name, fan_in in {"w1": 101, "b1": 101, "w2": 97, "b2": 97}.items():
        limit = 1 / np.sqrt(fan_in)
        assert np.abs(first[name]).max() <= limit
        assert np.std(first[name]) == pytest.approx(limit / np.sqrt(3), rel=0.12)
    for family in ("llama", "t5"):
        backbone = backbone_of(family)
        started = make_case(backbone, method).trainable["input"]
        size = min(float(embedding_rms(backbone.vocabulary().embedding)), 1.0)
        np.testing.assert_allclose(started["norm_scale"], size, rtol=1e-6)
        assert not np.any(started["norm_bias"])


def test_mistakes_and_groups() -> None:
    with pytest.raises(UserError, match="residual_prompt_tuning: bottleneck is 0; it must be at least 1"):
        ResidualPromptTuning(bottleneck=0)
    groups = ResidualPromptTuning().groups({"input": {"prompt": 0, "w1": 0, "norm_scale": 0}})
    assert groups == {"input": {"prompt": "prompt", "w1": "low_rank", "norm_scale": "low_rank"}}
    assert ResidualPromptTuning().learning_rates(0.3) == {"prompt": 0.3, "low_rank": 1e-3}
    assert ResidualPromptTuning().positions_in_front() == 10
