"""ADePT against numpy written from the paper, where it starts, and how many parameters it has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import ADePT, adept_offset
from deptjax.methods.adept import hidden_width_for_budget
from deptjax.methods.base import Texts, input_parameters
from deptjax.training.state import count_parameters

B, T, M, R, D = 2, 7, 5, 3, 11


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def params() -> dict[str, np.ndarray]:
    return {"prompt": draw(M, D), "w1": draw(D, R), "b1": draw(R), "w2": draw(R, D), "b2": draw(D)}


def offsets(embeds: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """Returns `relu(e W1 + b1) W2 + b2`, token by token."""
    e, (w1, b1, w2, b2) = np.float64(embeds), (np.float64(p[name]) for name in ("w1", "b1", "w2", "b2"))
    hidden = np.einsum("btd,dr->btr", e, w1) + b1
    return np.einsum("btr,rd->btd", np.where(hidden > 0, hidden, 0.0), w2) + b2


def test_offset_is_a_net_of_each_token() -> None:
    embeds, p = draw(B, T, D), params()
    wanted = offsets(embeds, p)
    got = adept_offset(*map(jnp.asarray, (embeds, p["w1"], p["b1"], p["w2"], p["b2"])))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_a_token_has_one_offset_wherever_it_stands() -> None:
    """Unlike DePT's: the prompt in front is plain, and the same token has the same offset at any place."""
    embeds, p = draw(B, T, D), params()
    mask = np.ones((B, T), bool)
    got, got_mask = ADePT(prompt_length=M, rank=R).apply({"params": p}, jnp.asarray(embeds), jnp.asarray(mask))
    wanted = np.concatenate([np.tile(p["prompt"], (B, 1, 1)), embeds + offsets(embeds, p)], axis=1)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    assert got_mask.all()
    turned, _ = ADePT(prompt_length=M, rank=R).apply({"params": p}, jnp.asarray(embeds[:, ::-1]), jnp.asarray(mask))
    np.testing.assert_allclose(turned[:, M:], got[:, M:][:, ::-1], atol=1e-6)


def test_starts_as_prompt_tuning() -> None:
    method, rank, width = ADePT(prompt_length=M, rank=53), 53, 101
    first = input_parameters(method, jax.random.key(3), width)
    assert {name: leaf.shape for name, leaf in first.items()} == {
        "prompt": (M, width),
        "w1": (width, rank),
        "b1": (rank,),
        "w2": (rank, width),
        "b2": (width,),
    }
    assert not any(np.any(first[name]) for name in ("b1", "w2", "b2"))
    w1, limit = np.asarray(first["w1"]), 1 / np.sqrt(rank)
    assert np.abs(w1).max() <= limit
    np.testing.assert_allclose(np.quantile(w1, [0.25, 0.5, 0.75]), [-limit / 2, 0, limit / 2], atol=0.05 * limit)
    embeds = jnp.asarray(draw(B, T, width))
    _, offset = method.apply({"params": first}, embeds, Texts.whole(embeds), method="streams")
    np.testing.assert_array_equal(offset, embeds)
    _, narrow = method.apply({"params": first}, embeds.astype(jnp.bfloat16), Texts.whole(embeds), method="streams")
    assert narrow.dtype == jnp.bfloat16


def size_of(method: ADePT, width: int) -> int:
    return count_parameters(jax.eval_shape(lambda: input_parameters(method, jax.random.key(0), width)))


def test_t5_base_has_76_051_parameters() -> None:
    method = ADePT().resolve(768)
    assert (method.prompt_length, method.rank) == (60, 19)
    assert size_of(method, 768) == 60 * 768 + 2 * 768 * 19 + 19 + 768 == 76_051


@pytest.mark.parametrize(("length", "width", "budget"), [(60, 768, None), (40, 512, None), (7, 24, 500), (1, 11, 60)])
def test_rank_is_the_largest_within_the_budget(length: int, width: int, budget: int | None) -> None:
    rank = hidden_width_for_budget(length, width, budget)
    size = size_of(ADePT(prompt_length=length, budget=budget).resolve(width), width)
    most = 100 * width if budget is None else budget
    assert size == length * width + 2 * width * rank + rank + width <= most < size + 2 * width + 1


def test_mistakes() -> None:
    with pytest.raises(UserError, match="prompt_length 99 and a rank of 1 exceed 76800 parameters; shorten it"):
        ADePT(prompt_length=99).resolve(768)
    with pytest.raises(UserError, match="adept: rank is 0; it must be at least 1"):
        ADePT(rank=0)


def test_groups_and_their_rates() -> None:
    tree = {"input": dict.fromkeys(("prompt", "w1", "b1", "w2", "b2"), 0)}
    assert ADePT().groups(tree)["input"] == {"prompt": "prompt"} | dict.fromkeys(("w1", "b1", "w2", "b2"), "low_rank")
    assert ADePT().learning_rates(0.3) == {"prompt": 0.3, "low_rank": 1e-4}
    assert ADePT().source_limit() is None
    assert ADePT().positions_in_front() == 60
