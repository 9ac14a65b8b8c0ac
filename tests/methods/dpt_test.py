"""DPT against numpy, where its factors start, and how many numbers they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import DPT, PromptTuning, dpt_prompt
from deptjax.methods.base import input_parameters
from deptjax.methods.initializers import fitted_factors
from deptjax.training.state import count_parameters
from tests.cases import backbone_of, make_case

M, R, D = 7, 3, 11


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def test_the_prompt_is_the_product_and_the_text_stays() -> None:
    u, v, embeds = draw(M, R), draw(R, D), draw(2, 5, D)
    wanted = np.einsum("mr,rd->md", np.float64(u), np.float64(v))
    np.testing.assert_allclose(dpt_prompt(jnp.asarray(u), jnp.asarray(v)), wanted, atol=1e-6 * np.abs(wanted).max())
    params = {"prompt_u": u, "prompt_v": v}
    method = DPT(prompt_length=M, rank=R)
    got, mask = method.apply({"params": params}, jnp.asarray(embeds), jnp.ones((2, 5), bool))
    np.testing.assert_allclose(got[:, :M], np.tile(wanted, (2, 1, 1)), atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(got[:, M:], embeds)
    assert mask.shape == (2, M + 5)


def test_t5_large_has_11_240_parameters() -> None:
    """The paper's 11.2K, where prompt tuning has 102K."""
    shapes = jax.eval_shape(lambda: input_parameters(DPT(), jax.random.key(0), 1024))
    assert {name: leaf.shape for name, leaf in shapes.items()} == {"prompt_u": (100, 10), "prompt_v": (10, 1024)}
    assert count_parameters(shapes) == 11_240


def test_factors_are_drawn_as_the_authors_do() -> None:
    vocabulary = backbone_of("llama").vocabulary()
    params = input_parameters(DPT(), jax.random.key(3), vocabulary.embedding.shape[1])
    first = DPT().initialize(jax.random.key(4), params, vocabulary)
    for leaf in first.values():
        assert np.abs(leaf).max() <= 0.5
        np.testing.assert_allclose(np.quantile(leaf, [0.25, 0.5, 0.75]), [-0.25, 0, 0.25], atol=0.08)


def test_factors_may_start_from_a_text() -> None:
    """A prompt of few tokens, repeated, has few directions; the factors are it, and the others wait."""
    backbone = backbone_of("llama")
    text = {"prompt_init": "text", "prompt_text": "the film is good"}
    prompt = make_case(backbone, PromptTuning(prompt_length=9, **text)).trainable["input"]["prompt"]
    first = make_case(backbone, DPT(prompt_length=9, rank=6, **text)).trainable["input"]
    np.testing.assert_allclose(dpt_prompt(first["prompt_u"], first["prompt_v"]), prompt, atol=1e-5)
    used = np.abs(first["prompt_u"]).max(axis=0) > 1e-4
    assert used.tolist() == [True] * 4 + [False] * 2
    assert np.abs(first["prompt_v"]).max(axis=1).min() > 0.01  # so that training can use the others


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_fitted_factors_are_the_best_of_their_rank(rank: int) -> None:
    """No product of this rank is nearer than the sum of the largest singular directions."""
    target, drawn = draw(2, 7, 5), draw(2, rank, 5, seed=1)
    left, right = fitted_factors(jnp.asarray(target), jnp.asarray(drawn))
    assert left.shape == (2, 7, rank)
    assert right.shape == (2, rank, 5)
    values = np.linalg.svd(target, compute_uv=False)
    missed = np.linalg.norm(target - np.asarray(left @ right), axis=(1, 2))
    np.testing.assert_allclose(missed, np.sqrt(np.sum(values[:, rank:] ** 2, axis=1)), atol=1e-5)
    np.testing.assert_array_equal(right[:, 5:], drawn[:, 5:])


def test_mistakes_and_groups() -> None:
    with pytest.raises(UserError, match="dpt: rank is 0; it must be at least 1"):
        DPT(rank=0)
    tree = {"input": {"prompt_u": 0, "prompt_v": 0}}
    assert DPT().groups(tree) == {"input": {"prompt_u": "prompt", "prompt_v": "prompt"}}
    assert DPT().learning_rates(0.3) == {"prompt": 0.3}
    assert DPT().positions_in_front() == 100
