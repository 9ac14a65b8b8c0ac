"""LoPA's formula against numpy, its counts, where it starts, and its mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import LoPA
from deptjax.methods.base import Texts, input_parameters
from deptjax.training.state import count_parameters

B, T, D, H, M, R, F = 3, 5, 12, 7, 4, 2, 6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def method(**fields: object) -> LoPA:
    return LoPA(prompt_length=M, rank=R, hidden=F, encoder_width=H, **fields)  # type: ignore[arg-type]


@pytest.fixture
def params() -> dict:
    shapes = jax.eval_shape(lambda: input_parameters(method(), jax.random.key(0), D))
    return jax.tree.map(lambda like: jnp.asarray(0.5 * draw(*like.shape)), shapes)


def by_numpy(params: dict, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns Z_S and U V^T as the paper has them, text by text."""
    instance = []
    for row in h:
        made = {}
        for name, size in (("rows", M), ("columns", D)):
            p = jax.tree.map(np.asarray, params[name])
            hidden = np.tanh(row @ p["down"]["kernel"] + p["down"]["bias"])
            made[name] = (hidden @ p["up"]["kernel"] + p["up"]["bias"]).reshape(size, R)
        instance.append(made["rows"] @ made["columns"].T)
    return np.asarray(params["prompt"]), np.stack(instance)


@pytest.mark.parametrize("variant", ["gate", "concat", "add", "max"])
def test_the_prompt_is_the_papers(params: dict, variant: str) -> None:
    embeds, h = jnp.asarray(draw(B, T, D)), draw(B, H)
    prompt, same = method(variant=variant).apply(
        {"params": params}, embeds, Texts.whole(embeds, jnp.asarray(h)), method="streams"
    )
    shared, instance = by_numpy(params, h)
    wanted = {
        "gate": shared / (1 + np.exp(-instance)),
        "concat": np.concatenate([np.broadcast_to(shared, instance.shape), instance], axis=1),
        "add": shared + instance,
        "max": np.maximum(shared, instance),
    }[variant]
    np.testing.assert_allclose(prompt, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(same, embeds)
    assert method(variant=variant).positions_in_front() == prompt.shape[1]


@pytest.mark.parametrize(
    ("width", "encoder_width", "hidden", "rank", "count"),
    [
        (1024, 1024, 256, 4, 1_597_992),  # RoBERTa-large, the authors' 1.60M
        (2560, 1024, None, 1, 4_759_050),  # phi-2 with CodeSage-small, 4.76M
    ],
)
def test_parameters_are_as_many_as_published(
    width: int, encoder_width: int, hidden: int | None, rank: int, count: int
) -> None:
    lopa = LoPA(prompt_length=10, rank=rank, hidden=hidden, encoder_width=encoder_width)
    assert count_parameters(jax.eval_shape(lambda: input_parameters(lopa, jax.random.key(0), width))) == count


def test_it_starts_at_half_the_shared_prompt() -> None:
    lopa = LoPA(encoder_width=64)
    params = input_parameters(lopa, jax.random.key(0), 48)
    for name, size in (("rows", 10 * 4), ("columns", 48 * 4)):
        for layer, shape in (("down", (64, 256)), ("up", (256, size))):
            kernel, bias = params[name][layer]["kernel"], params[name][layer]["bias"]
            assert kernel.shape == shape
            assert np.std(kernel) == pytest.approx(0.02, rel=0.1)
            limit = 1 / np.sqrt(shape[0]) if layer == "down" else 0.0  # torch's, and zero
            assert np.abs(bias).max() <= limit
            assert np.std(bias) == pytest.approx(limit / np.sqrt(3), rel=0.1)
    embeds = jnp.zeros((2, 3, 48))
    texts = Texts.whole(embeds, jnp.asarray(draw(2, 64)))
    prompt, _ = lopa.apply({"params": params}, embeds, texts, method="streams")
    np.testing.assert_allclose(prompt, np.broadcast_to(params["prompt"] / 2, prompt.shape), atol=0.02)


def test_dropout_is_of_the_encodings_and_in_training_alone(params: dict) -> None:
    embeds = jnp.zeros((1, 1, D))
    texts = Texts.whole(embeds, jnp.ones((1, H)))

    def prompt(rate: float, key: int | None) -> jax.Array:
        rngs = {} if key is None else {"dropout": jax.random.key(key)}
        return method(encoding_dropout=rate).apply({"params": params}, embeds, texts, method="streams", rngs=rngs)[0]

    np.testing.assert_array_equal(prompt(0.5, None), prompt(0.0, None))
    np.testing.assert_array_equal(prompt(0.0, 1), prompt(0.0, None))
    assert np.abs(prompt(0.5, 1) - prompt(0.5, 2)).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"variant": "gat"}, "variant 'gat' is not one of gate, concat, add, max. Did you mean 'gate'?"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"encoding_dropout": 1.0}, "encoding_dropout is 1.0; it must be from 0 to below 1"),
        ({"encoder_pooling": "avg"}, "encoder_pooling 'avg' is not one of first, mean, last, pooled"),
        ({"encoder_length": 0}, "encoder_length is 0; it must be at least 1"),
    ],
)
def test_mistakes(fields: dict, told: str) -> None:
    with pytest.raises(UserError) as caught:
        LoPA(**fields)
    assert told in str(caught.value)


def test_texts_that_no_encoder_has_read_are_refused(params: dict) -> None:
    embeds = jnp.zeros((1, 1, D))
    with pytest.raises(UserError, match=r"encodings .* are missing; run its encoder first"):
        method().apply({"params": params}, embeds, Texts.whole(embeds), method="streams")
