"""ACCEPT against numpy written from the paper, where it starts, and how many parameters it has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import ACCEPT, PromptTuning, mixed_codewords
from deptjax.methods.accept import check_part
from deptjax.methods.base import Texts, input_parameters
from deptjax.training.state import count_parameters
from tests.cases import backbone_of, make_case

B, T, M, X, D = 2, 6, 5, 9, 12
PROMPT, OFFSET = (4, 3), (6, 2)  # t and R
METHOD = ACCEPT(M, *PROMPT, X, *OFFSET)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def params() -> dict[str, np.ndarray]:
    return {
        "prompt_weights": draw(M, 3, 3),
        "prompt_codebook": draw(3, 3, 4),
        "offset_weights": draw(X, 2, 2),
        "offset_codebook": draw(2, 2, 6),
    }


def vectors(weights: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Returns the vectors part by part and codeword by codeword."""
    count, codewords, part = codebook.shape
    made = np.zeros((len(weights), count * part))
    for i, row in enumerate(np.float64(weights)):
        for k in range(count):
            for r in range(codewords):
                made[i, k * part : (k + 1) * part] += row[k, r] * codebook[k, r]
    return made


def test_vectors_are_mixes_of_codewords() -> None:
    weights, codebook = draw(M, 3, 3), draw(3, 3, 4)
    wanted = vectors(weights, codebook)
    got = mixed_codewords(jnp.asarray(weights), jnp.asarray(codebook))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_prompt_stands_in_front_and_row_i_on_token_i(side: str) -> None:
    p, embeds = params(), draw(B, T, D)
    lengths = np.asarray([[6], [4]])
    mask = np.arange(T)[None] < lengths if side == "right" else np.arange(T)[None] >= T - lengths
    offsets = vectors(p["offset_weights"], p["offset_codebook"])
    wanted = np.concatenate([np.tile(vectors(p["prompt_weights"], p["prompt_codebook"]), (B, 1, 1)), embeds], axis=1)
    for row in range(B):
        for place, column in enumerate(np.flatnonzero(mask[row])):
            wanted[row, M + column] += offsets[place]
    got, got_mask = METHOD.apply({"params": p}, jnp.asarray(embeds), jnp.asarray(mask))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(got_mask[:, M:], mask)


def size_of(method: ACCEPT, width: int, part: str = "") -> int:
    shapes = jax.eval_shape(lambda: input_parameters(method, jax.random.key(0), width))
    return count_parameters({name: leaf for name, leaf in shapes.items() if name.startswith(part)})


def test_t5_base_has_74_880_parameters() -> None:
    assert size_of(ACCEPT(), 768, "prompt") == 60 * 24 * 20 + 24 * 20 * 32 == 44_160
    assert size_of(ACCEPT(), 768, "offset") == 256 * 3 * 20 + 3 * 20 * 256 == 30_720
    assert size_of(ACCEPT(), 768) == 74_880


def test_all_is_drawn_as_the_authors_do_and_the_offset_is_not_zero() -> None:
    first = input_parameters(ACCEPT(prompt_init="random"), jax.random.key(3), 768)
    limits = {
        "prompt_weights": 1 / np.sqrt(24 * 20),
        "prompt_codebook": 1 / np.sqrt(20 * 32),
        "offset_weights": 1 / np.sqrt(3 * 20),
        "offset_codebook": np.sqrt(6 / (20 * 256)),
    }
    for name, limit in limits.items():
        assert np.abs(first[name]).max() <= limit
        np.testing.assert_allclose(
            np.quantile(first[name], [0.25, 0.5, 0.75]), [-limit / 2, 0, limit / 2], atol=0.03 * limit
        )
    assert np.abs(mixed_codewords(first["offset_weights"], first["offset_codebook"])).max() > 1e-2
    vocabulary = backbone_of("llama").vocabulary()
    assert ACCEPT(prompt_init="random").initialize(jax.random.key(4), first, vocabulary) is first


def test_the_prompt_may_start_from_a_text() -> None:
    backbone, text = backbone_of("llama"), {"prompt_init": "text", "prompt_text": "the film is good"}
    wanted = make_case(backbone, PromptTuning(prompt_length=9, **text)).trainable["input"]["prompt"]
    first = make_case(backbone, ACCEPT(9, 6, 4, X, 8, 2, **text)).trainable["input"]
    got = mixed_codewords(first["prompt_weights"], first["prompt_codebook"])  # four tokens: rank 4 is all of them
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "part", "near", "others"),
    [
        (48, 23, 24, "1, 2, 3, 4, 6, 8, 12, 16, 48"),
        (24, 25, 24, "1, 2, 3, 4, 6, 8, 12"),
        (7, 3, 1, "7"),
        (768, 700, 768, "1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384"),
    ],
)
def test_a_part_that_does_not_divide_names_those_that_do(width: int, part: int, near: int, others: str) -> None:
    does_not = f"accept: offset_part {part} does not divide the backbone's width {width}"
    told = f"{does_not}; use {near}, or another divisor: {others}$"
    with pytest.raises(UserError, match=told):
        check_part(width, part, "offset_part")


@pytest.mark.parametrize(
    ("width", "prompt", "offset"), [(768, 32, 256), (576, 32, 288), (4096, 32, 256), (24, 24, 24), (97, 1, 97)]
)
def test_parts_that_nobody_gave_are_the_nearest_that_divide(width: int, prompt: int, offset: int) -> None:
    """And are no different in the module itself, which is not told of the width before it runs."""
    method = ACCEPT(5, None, 3, X, None, 2, prompt_init="random")
    settled = method.resolve(width)
    assert (settled.prompt_part, settled.offset_part) == (prompt, offset)
    assert settled.resolve(width) is settled
    assert size_of(method, width) == size_of(settled, width)


def test_mistakes_are_found_before_the_first_step() -> None:
    with pytest.raises(UserError, match="accept: prompt_part 32 does not divide the backbone's width 24; use 24"):
        ACCEPT(prompt_part=32).resolve(24)
    with pytest.raises(
        UserError, match="accept: offset_part 256 does not divide the backbone's width 576; use 288, or"
    ):
        ACCEPT(offset_part=256).resolve(576)
    with pytest.raises(UserError, match="accept: offset_codewords is 0; it must be at least 1"):
        ACCEPT(offset_codewords=0)
    with pytest.raises(UserError, match="accept: prompt_part is 0"):
        ACCEPT(prompt_part=0)


def test_groups_and_their_rates() -> None:
    groups = ACCEPT().groups({"input": dict.fromkeys(params(), 0)})["input"]
    assert groups == {k: "prompt" if k.startswith("prompt") else "low_rank" for k in params()}
    assert ACCEPT().learning_rates(0.3) == {"prompt": 0.3, "low_rank": 5e-3}
    assert ACCEPT().source_limit() == 256
    assert ACCEPT().positions_in_front() == 60


def test_a_text_without_tokens_has_the_prompt_alone() -> None:
    """So a prompt is computed ahead of all texts."""
    method, embeds = ACCEPT(prompt_length=3, prompt_part=4, offset_part=8), jnp.zeros((1, 0, 24))
    params = input_parameters(method, jax.random.key(0), 24)
    prompt, same = method.apply({"params": params}, embeds, Texts.whole(embeds), method="streams")
    assert (prompt.shape, same.shape) == ((3, 24), (1, 0, 24))
