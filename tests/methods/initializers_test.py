"""The ways in which a soft prompt starts."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import MPT, LoRA, PromptTuning, Vocabulary
from deptjax.methods.initializers import DEFAULT_TEXT, VOCAB_ROWS, embedding_rms, initial_prompt
from deptjax.prompt import Prompt
from deptjax.testing import WORDS, tiny_tokenizer

D = 5
IDS = {word: 3 + WORDS.index(word) for word in ("film", "good", "bad", "a")}  # behind <pad>, </s> and <unk>
KEY = jax.random.key(7)
SHARED = {"prompt": (3, D), "u": (3,), "v": (D,)}


def table(rows: int = 3 + len(WORDS), dtype: object = jnp.float32) -> jax.Array:
    """Row i holds i + 0, 1, 2 .. hundredths: a row of the prompt tells where it is from."""
    return (jnp.arange(rows, dtype=jnp.float32)[:, None] + jnp.arange(D)[None] / 100).astype(dtype)


def vocabulary(labels: tuple[str, ...] = ()) -> Vocabulary:
    return Vocabulary(table(), tiny_tokenizer(), labels)


def rows_of(prompt: jax.Array) -> list[int]:
    return [int(row) for row in np.floor(np.asarray(prompt)[:, 0])]


def test_text_is_repeated_and_cut() -> None:
    prompt = initial_prompt("text", "good film a", KEY, 7, vocabulary())
    assert rows_of(prompt) == [IDS[w] for w in "good film a good film a good".split()]
    assert rows_of(initial_prompt("text", "good film a", KEY, 2, vocabulary())) == [IDS["good"], IDS["film"]]
    assert prompt.dtype == jnp.float32


def test_text_has_no_special_tokens_and_float32_of_a_bfloat16_table() -> None:
    small = Vocabulary(table(dtype=jnp.bfloat16), tiny_tokenizer())
    prompt = initial_prompt("text", DEFAULT_TEXT, KEY, 9, small)
    assert prompt.dtype == jnp.float32
    assert 1 not in rows_of(prompt)  # </s>


def test_vocab_takes_distinct_rows_among_the_first() -> None:
    many = Vocabulary(table(VOCAB_ROWS + 3000), tiny_tokenizer())
    rows = rows_of(initial_prompt("vocab", "", KEY, 900, many))
    assert len(set(rows)) == 900
    assert 3 <= min(rows) < max(rows) < VOCAB_ROWS
    assert max(rows) > VOCAB_ROWS // 2
    assert rows != rows_of(initial_prompt("vocab", "", jax.random.key(8), 900, many))
    assert rows == rows_of(initial_prompt("vocab", "", KEY, 900, many))


def test_vocab_smaller_than_the_prompt() -> None:
    few = Vocabulary(table(6), tiny_tokenizer())
    assert set(rows_of(initial_prompt("vocab", "", KEY, 50, few))) == {3, 4, 5}


def test_vocab_leaves_out_what_is_no_text() -> None:
    """Special tokens, single bytes, and those that BERT keeps free."""
    tokenizer = tiny_tokenizer(("[unused0]", "film", "<0x0A>", "good", "<|im_start|>"))
    rows = rows_of(initial_prompt("vocab", "", KEY, 2, Vocabulary(table(8), tokenizer)))
    assert sorted(rows) == [4, 6]
    nothing_else = Vocabulary(table(4), tiny_tokenizer(("[unused0]",)))
    assert set(rows_of(initial_prompt("vocab", "", KEY, 50, nothing_else))) == {0, 1, 2, 3}


def test_labels_come_first_then_sampled_rows() -> None:
    prompt = initial_prompt("labels", "", KEY, 6, vocabulary(("bad", "good film")))
    assert rows_of(prompt)[:3] == [IDS["bad"], IDS["good"], IDS["film"]]
    assert len(set(rows_of(prompt)[3:])) == 3
    assert rows_of(initial_prompt("labels", "", KEY, 2, vocabulary(("bad", "good film")))) == [IDS["bad"], IDS["good"]]


def test_random_has_the_scale_of_the_embeddings() -> None:
    embedding = 0.3 * jax.random.normal(jax.random.key(1), (41, 89))
    scale = float(np.sqrt(np.mean(np.asarray(embedding, np.float64) ** 2)))
    assert float(embedding_rms(embedding)) == pytest.approx(scale, rel=1e-6)
    prompt = np.asarray(initial_prompt("random", "", KEY, 61, Vocabulary(embedding, tiny_tokenizer())))
    assert prompt.shape == (61, 89)
    assert np.sqrt(np.mean(prompt**2)) == pytest.approx(scale, rel=0.02)
    assert np.abs(prompt).max() <= np.sqrt(3) * scale * (1 + 1e-6)
    assert prompt.mean() == pytest.approx(0, abs=0.03 * scale)


def soft_prompt(values: np.ndarray) -> Prompt:
    return Prompt(PromptTuning(len(values)), {"input": {"prompt": values}}, "tiny", {"width": values.shape[1]}, {})


def test_of_several_parts_it_is_what_they_make(tmp_path: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    parts = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHARED.items()}
    Prompt(MPT(3), {"input": parts}, "tiny", {"width": D}, {}).save(tmp_path)
    prompt = initial_prompt(str(tmp_path), "", KEY, 3, vocabulary())
    np.testing.assert_allclose(prompt, parts["prompt"] * np.outer(parts["u"], parts["v"]), rtol=1e-6)


@pytest.mark.parametrize(("saved", "length"), [(3, 7), (7, 3), (4, 4)])
def test_from_a_saved_prompt_repeated_or_cut(tmp_path: pathlib.Path, saved: int, length: int) -> None:
    values = np.random.default_rng(0).standard_normal((saved, D)).astype(np.float32)
    soft_prompt(values).save(tmp_path)
    prompt = initial_prompt(str(tmp_path), "", KEY, length, vocabulary())
    np.testing.assert_array_equal(prompt, values[np.arange(length) % saved])


def test_mistakes_say_what_to_do(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"prompt_init 'vocob' is neither .* Did you mean 'vocab'\?"):
        initial_prompt("vocob", "", KEY, 3, vocabulary())
    with pytest.raises(UserError, match="prompt_text has no tokens"):
        initial_prompt("text", "  ", KEY, 3, vocabulary())
    with pytest.raises(UserError, match="prompt_init 'labels' needs a task with labels"):
        initial_prompt("labels", "", KEY, 3, vocabulary())
    soft_prompt(np.zeros((3, D + 2), np.float32)).save(tmp_path)
    with pytest.raises(UserError, match=f"has width {D + 2}, the backbone {D}"):
        initial_prompt(str(tmp_path), "", KEY, 3, vocabulary())
    Prompt(LoRA(), {"backbone": {"x": np.zeros(3, np.float32)}}, "tiny", {"width": D}, {}).save(tmp_path / "lora")
    with pytest.raises(UserError, match=r"prompt_init: .* holds no soft prompt"):
        initial_prompt(str(tmp_path / "lora"), "", KEY, 3, vocabulary())
    with pytest.raises(UserError, match=r"is not a saved prompt: it has no prompt.json"):
        initial_prompt(str(tmp_path.parent), "", KEY, 3, vocabulary())
    (tmp_path / "prompt.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="is damaged"):
        initial_prompt(str(tmp_path), "", KEY, 3, vocabulary())
