"""DePT against numpy written from the paper, its parameter counts, and its use in front of anybody's embeddings."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import DePT, dept_offset, rank_for_budget
from deptjax.methods.base import Texts, input_parameters
from deptjax.training.state import count_parameters

B, T, M, X, R, D = 2, 7, 5, 13, 3, 11
LENGTHS = (7, 4)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    return {"prompt": draw(M, D), "lora_a": draw(X, R), "lora_b": draw(R, D)}


def masks(side: str) -> np.ndarray:
    column = np.arange(T)[None]
    lengths = np.asarray(LENGTHS)[:, None]
    return column < lengths if side == "right" else column >= T - lengths


def test_offset_is_the_scaled_product() -> None:
    a, b = draw(X, R), draw(R, D)
    wanted = 0.7 * np.einsum("xr,rd->xd", a.astype(np.float64), b.astype(np.float64))
    got = dept_offset(jnp.asarray(a), jnp.asarray(b), 0.7)
    assert got.shape == (X, D)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("scaling", "factor"), [("alpha/sqrt(rank)", 8 / np.sqrt(R)), ("none", 1.0), (0.25, 0.25)])
def test_call_puts_the_prompt_in_front_and_row_i_on_token_i(
    params: dict[str, np.ndarray], side: str, scaling: str | float, factor: float
) -> None:
    embeds, mask = draw(B, T, D), masks(side)
    wanted = np.zeros((B, M + T, D))
    for row in range(B):
        wanted[row, :M] = params["prompt"]
        place = 0
        for column in range(T):
            wanted[row, M + column] = embeds[row, column]
            if mask[row, column]:  # the paper counts tokens of the text, and padding is none
                wanted[row, M + column] += factor * (params["lora_a"][place].astype(float) @ params["lora_b"])
                place += 1
        assert place == LENGTHS[row]
    method = DePT(prompt_length=M, rank=R, max_length=X, scaling=scaling)
    got, got_mask = method.apply({"params": params}, jnp.asarray(embeds), jnp.asarray(mask))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(got_mask, np.concatenate([np.ones((B, M), bool), mask], axis=1))


def test_alpha_scales_the_offset(params: dict[str, np.ndarray]) -> None:
    embeds, mask = jnp.zeros((B, T, D)), jnp.ones((B, T), bool)
    of = {
        a: DePT(prompt_length=M, rank=R, max_length=X, alpha=a).apply({"params": params}, embeds, mask)[0]
        for a in (8.0, 2.0)
    }
    np.testing.assert_allclose(of[8.0][:, M:], 4 * of[2.0][:, M:], rtol=1e-6)
    wanted = 2 / np.sqrt(R) * (params["lora_a"] @ params["lora_b"])[None, :T].repeat(B, axis=0)
    np.testing.assert_allclose(of[2.0][:, M:], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_streams_without_positions_counts_columns(params: dict[str, np.ndarray]) -> None:
    method, embeds = DePT(prompt_length=M, rank=R, max_length=X), jnp.asarray(draw(B, T, D))
    columns = jnp.tile(jnp.arange(T)[None], (B, 1))
    prompt, by_column = method.apply({"params": params}, embeds, Texts.whole(embeds), method="streams")
    texts = Texts.whole(embeds)._replace(positions=columns)
    same_prompt, by_position = method.apply({"params": params}, embeds, texts, method="streams")
    np.testing.assert_array_equal(prompt, params["prompt"])
    np.testing.assert_array_equal(same_prompt, params["prompt"])
    np.testing.assert_allclose(by_column, by_position, rtol=0, atol=1e-6)


def test_no_offset_behind_max_length(params: dict[str, np.ndarray]) -> None:
    embeds, mask = jnp.asarray(draw(1, X + 4, D)), jnp.ones((1, X + 4), bool)
    got, _ = DePT(prompt_length=M, rank=R, max_length=X).apply({"params": params}, embeds, mask)
    np.testing.assert_array_equal(got[:, M + X :], embeds[:, X:])
    assert np.abs(got[:, M : M + X] - embeds[:, :X]).max(axis=-1).min() > 1e-3


def test_streams_refuses_more_columns_than_max_length(params: dict[str, np.ndarray]) -> None:
    method, embeds = DePT(prompt_length=M, rank=R, max_length=X), jnp.zeros((1, X + 1, D))
    with pytest.raises(UserError, match=f"{X + 1} tokens are more than max_length {X}; raise max_length"):
        method.apply({"params": params}, embeds, Texts.whole(embeds), method="streams")


def test_result_has_the_dtype_of_the_embeddings(params: dict[str, np.ndarray]) -> None:
    embeds = jnp.asarray(draw(B, T, D), jnp.bfloat16)
    got, _ = DePT(prompt_length=M, rank=R, max_length=X).apply({"params": params}, embeds, jnp.asarray(masks("right")))
    assert got.dtype == jnp.bfloat16


def test_gradient_of_padding_is_zero(params: dict[str, np.ndarray]) -> None:
    """Rows of A that no token of the batch stands on learn nothing."""

    def total(p: dict[str, np.ndarray]) -> jax.Array:
        method = DePT(prompt_length=M, rank=R, max_length=X)
        return method.apply({"params": p}, jnp.zeros((B, T, D)), jnp.asarray(masks("left")))[0].sum()

    grads = jax.grad(total)(jax.tree.map(jnp.asarray, params))
    used = np.abs(grads["lora_a"]).max(axis=1) > 0
    np.testing.assert_array_equal(used, np.arange(X) < max(LENGTHS))
    # Row 6 stands on one token, row 0 on two.
    np.testing.assert_allclose(grads["lora_a"][0], 2 * grads["lora_a"][6], rtol=1e-6)


def test_starts_as_prompt_tuning() -> None:
    method, rank = DePT(prompt_length=M, rank=53, max_length=101), 53
    params = input_parameters(method, jax.random.key(3), D)
    a, b = np.asarray(params["lora_a"]), params["lora_b"]
    assert b.shape == (rank, D)
    assert not np.any(b)
    limit = 1 / np.sqrt(rank)
    assert a.shape == (101, rank)
    assert np.abs(a).max() <= limit
    # U(-limit, limit): standard deviation limit / sqrt(3), and the quartiles at half the limit.
    assert a.std() == pytest.approx(limit / np.sqrt(3), rel=0.03)
    assert a.mean() == pytest.approx(0, abs=0.03 * limit)
    np.testing.assert_allclose(np.quantile(a, [0.25, 0.75]), [-limit / 2, limit / 2], atol=0.05 * limit)
    embeds = jnp.asarray(draw(B, T, D))
    _, offset = method.apply({"params": params}, embeds, Texts.whole(embeds), method="streams")
    np.testing.assert_array_equal(offset, embeds)
    other = input_parameters(method, jax.random.key(4), D)["lora_a"]
    assert not np.array_equal(a, other)


def size_of(method: DePT, width: int) -> int:
    return count_parameters(jax.eval_shape(lambda: input_parameters(method, jax.random.key(0), width)))


@pytest.mark.parametrize(
    ("width", "max_length", "ranks", "exact"),
    [
        (768, 256, {20: 60, 40: 45, 60: 30, 80: 15}, True),  # T5-base, GPT-2
        (768, 512, {20: 48, 40: 36, 60: 24, 80: 12}, True),
        (512, 256, {20: 53, 40: 40, 60: 26, 80: 13}, False),  # T5-small
        (1024, 256, {20: 64, 40: 48, 60: 32, 80: 16}, True),  # T5-large, T5-3B
        (4096, 64, {40: 59}, False),  # LLaMA-2-7B
    ],
)
def test_rank_for_the_budget_of_100_vectors(width: int, max_length: int, ranks: dict[int, int], exact: bool) -> None:
    for length, rank in ranks.items():
        assert rank_for_budget(length, max_length, width) == rank
        method = DePT(prompt_length=length, max_length=max_length)
        assert method.resolve(width).rank == rank
        size = size_of(method, width)
        assert size == length * width + (max_length + width) * rank
        assert size <= 100 * width
        assert size + max_length + width > 100 * width  # a rank more would not fit
        assert size == 100 * width or not exact


def test_t5_base_has_76_800_parameters() -> None:
    assert size_of(DePT(prompt_length=40, max_length=256), 768) == 76_800
    assert size_of(DePT(prompt_length=40, rank=30, max_length=256), 768) == 40 * 768 + (256 + 768) * 30


def test_budget_of_ones_own() -> None:
    assert DePT(prompt_length=3, max_length=17, budget=3 * 11 + 28 * 2 + 27).resolve(11).rank == 2
    assert rank_for_budget(3, 17, 11, budget=3 * 11 + 28 * 3) == 3


def test_no_room_for_a_rank() -> None:
    with pytest.raises(UserError, match="prompt_length 100 and a rank of 1 exceed 76800 parameters"):
        DePT(prompt_length=100).resolve(768)
    with pytest.raises(
        UserError, match="prompt_length 3 and a rank of 1 exceed 60 parameters; shorten it, or set budget"
    ):
        DePT(prompt_length=3, max_length=17, budget=3 * 11 + 27).resolve(11)


@pytest.mark.parametrize("field", ["prompt_length", "rank", "max_length"])
def test_sizes_must_be_positive(field: str) -> None:
    with pytest.raises(UserError, match=f"dept: {field} is 0; it must be at least 1"):
        DePT(**{field: 0})


def test_unknown_scaling_is_found_before_the_first_step() -> None:
    with pytest.raises(UserError, match="scaling 'alpha/rank' is not known"):
        DePT(rank=3, scaling="alpha/rank").resolve(768)


def test_two_groups_with_rates_of_their_own() -> None:
    method = DePT()
    tree = {"input": {"prompt": 0, "lora_a": 0, "lora_b": 0}}
    assert method.groups(tree) == {"input": {"prompt": "prompt", "lora_a": "low_rank", "lora_b": "low_rank"}}
    assert method.learning_rates(0.3) == {"prompt": 0.3, "low_rank": 5e-3}
    assert method.source_limit() == 256


def test_inside_somebody_elses_module() -> None:
    """A bag-of-embeddings classifier that knows nothing of deptjax, with DePT in front, learns with the rest frozen."""

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embeds = nn.Embed(17, D, name="table")(tokens)
            embeds, mask = DePT(prompt_length=M, rank=R, max_length=X, name="tuned")(embeds, tokens != 0)
            hidden = nn.tanh(embeds) * mask[..., None]
            return nn.Dense(2, name="head")(hidden.sum(axis=1))

    tokens = jnp.asarray([[3, 4, 5, 0], [5, 4, 3, 9], [9, 2, 0, 0]])
    labels = jnp.asarray([0, 1, 1])
    everything = Classifier().init(jax.random.key(0), tokens)["params"]
    assert {k: v.shape for k, v in everything["tuned"].items()} == {
        "prompt": (M, D),
        "lora_a": (X, R),
        "lora_b": (R, D),
    }

    @jax.jit
    def loss(tuned: dict[str, jax.Array]) -> jax.Array:
        logits = Classifier().apply({"params": {**everything, "tuned": tuned}}, tokens)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    tuned = first = everything["tuned"]
    for _ in range(100):
        tuned = jax.tree.map(lambda p, g: p - 0.1 * g, tuned, jax.grad(loss)(tuned))
    assert loss(tuned) < 0.2 * loss(first)
