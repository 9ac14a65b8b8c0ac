"""IDPG's generators against numpy, their counts, and their mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import IDPG
from deptjax.methods.base import Texts, input_parameters
from deptjax.methods.idpg import phm_weight
from deptjax.training.state import count_parameters

B, T, D, H, M, F, N = 3, 5, 12, 8, 2, 4, 4


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def generated(idpg: IDPG, h: np.ndarray) -> tuple[dict, np.ndarray]:
    shapes = jax.eval_shape(lambda: input_parameters(idpg, jax.random.key(0), D))
    params = jax.tree.map(lambda like: jnp.asarray(0.5 * draw(*like.shape)), shapes)
    embeds = jnp.asarray(draw(B, T, D))
    texts = Texts.whole(embeds, jnp.asarray(h))
    prompt, same = idpg.apply({"params": params}, embeds, texts, method="streams")
    np.testing.assert_array_equal(same, embeds)
    return jax.tree.map(np.asarray, params), np.asarray(prompt)


def test_a_sum_of_kronecker_products() -> None:
    a, b = draw(3, 3, 3), draw(3, 2, 5)
    wanted = sum(np.kron(x, y) for x, y in zip(a, b, strict=True))
    np.testing.assert_allclose(phm_weight(jnp.asarray(a), jnp.asarray(b)), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("generator", ["phm", "dense"])
def test_the_prompt_is_the_papers(generator: str) -> None:
    idpg, h = IDPG(prompt_length=M, hidden=F, generator=generator, factors=N, encoder_width=H), draw(B, H)
    params, prompt = generated(idpg, h)

    def weight(name: str) -> np.ndarray:
        own = params[name]
        return own["kernel"] if generator == "dense" else sum(map(np.kron, own["a"], own["b"]))

    hidden = np.tanh(h @ weight("down") + params["bias"])
    wanted = (hidden @ weight("up")).reshape(B, M, D) + params["prompt"]
    np.testing.assert_allclose(prompt, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        # LoPA's authors count 2.89M for theirs, on RoBERTa-large.
        ({"prompt_length": 10, "hidden": 256, "generator": "dense"}, 2_894_080),
        # The factors of the authors' two layers, the bottleneck's bias, and the task's table.
        ({"prompt_length": 5, "hidden": 16}, (4096 + 1024) + 16 + (4096 + 5120) + 5 * 1024),
    ],
)
def test_parameters_are_as_many_as_published(fields: dict, count: int) -> None:
    idpg = IDPG(encoder_width=1024, **fields)
    assert count_parameters(jax.eval_shape(lambda: input_parameters(idpg, jax.random.key(0), 1024))) == count


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"generator 'pmh' is not one of phm, dense. Did you mean 'phm'"):
        IDPG(generator="pmh")
    odd = IDPG(prompt_length=2, hidden=16, encoder_width=24)
    with pytest.raises(UserError, match="factors 16 does not divide the encoder's width of 'down', 24; take 2, 4, 8"):
        input_parameters(odd, jax.random.key(0), 32)
