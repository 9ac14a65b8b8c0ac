"""Stop strings: the automaton against a search in the decoded text, on real tokenizers and their kinds."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.inference.stop import ACCEPTING, START, advance, byte_automaton, cut_at_stop, stop_table
from deptjax.interop import packaged
from deptjax.interop.tokenizers import load_tokenizer, tokenizer_from_gguf
from deptjax.testing import tiny_tokenizer

LONG = "A stop.\n\nQ: naïve café – 東京 🙂🙃  two  spaces, 12345 <0x41> ▁ Ġ end"


def sentencepiece() -> Any:
    """Returns a LLaMA-like tokenizer: a few pieces, and every byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "c", "é", "▁a", "ab", "▁ab", "bc", "cé", "▁▁"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces + words,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.scores": [0.0] * (3 + 256) + [-float(i) for i in range(len(words))],
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )


@functools.cache
def tokenizer_of(name: str) -> Any:
    """Returns a tokenizer by name: two real ones, and others of other kinds."""
    if name == "smollm2":
        return load_tokenizer(packaged.model("smollm2-135m-instruct"))
    if name == "t5":
        return load_tokenizer(packaged.tokenizer_folder("t5"))
    if name == "byt5":
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer()
    return sentencepiece() if name == "sentencepiece" else tiny_tokenizer()


def decoded(tokenizer: Any, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stops_at(table: Any, tokens: np.ndarray) -> int:
    """Returns the number of tokens with which a stop string is complete, or 0."""
    state = jnp.asarray(START)
    for count, token in enumerate(tokens, 1):
        state = advance(table, state, jnp.asarray(token))
        if state == ACCEPTING:
            return count
    return 0


def searched(tokenizer: Any, stops: tuple[str, ...], tokens: np.ndarray) -> int:
    """Returns the same, by decoding and looking."""
    counts = range(1, len(tokens) + 1)
    return next((n for n in counts if any(stop in decoded(tokenizer, tokens[:n]) for stop in stops)), 0)


def pieces_of(random: np.random.Generator, text: str) -> list[str]:
    """Returns some short substrings that are whole characters."""
    starts = random.integers(0, max(1, len(text) - 1), 3)
    found = [text[start : start + size] for start, size in zip(starts, random.integers(2, 12, 3))]
    return [piece for piece in found if piece and "\ufffd" not in piece]


@pytest.mark.parametrize("name", ["smollm2", "t5", "words"])
def test_random_tokens(name: str) -> None:
    """Strings cut out of the text of other tokens, or of the same ones, so that many are found, and many are not."""
    tokenizer, found, missed = tokenizer_of(name), 0, 0
    vocab = len(tokenizer) + 5
    for seed in range(12):
        random = np.random.default_rng([seed, 1])
        rows = random.integers(0, len(tokenizer), (6, 14))
        own = [piece for row in rows[:3] for piece in pieces_of(random, decoded(tokenizer, row))]
        stops = tuple(dict.fromkeys(own[:: seed % 3 + 1]))
        table = np.asarray(stop_table(tokenizer, stops, vocab))
        for row in rows:
            count = stops_at(table, row)
            assert count == searched(tokenizer, stops, row), (stops, row)
            found, missed = found + (count > 0), missed + (count == 0)
    assert found > 10
    assert missed > 10


@pytest.mark.parametrize("name", ["smollm2", "t5", "sentencepiece", "byt5"])
def test_text_in_many_alphabets(name: str) -> None:
    """Strings that span tokens, begin inside of one, end inside of one, overlap, or are one of several characters."""
    tokenizer = tokenizer_of(name)
    tokens = np.array(tokenizer(LONG, add_special_tokens=False)["input_ids"])
    text = decoded(tokenizer, tokens)
    random = np.random.default_rng(0)
    cases = [("é",), ("東京",), ("🙃",), (" – ", "–"), ("caf", "afé", "f"), ("  ", "two  s"), ("0x4", "▁"), ("\n\nQ",)]
    cases += [tuple(pieces_of(random, text)) for _ in range(25)]
    hits = 0
    for stops in cases:
        if stops:
            count = stops_at(stop_table(tokenizer, stops, len(tokenizer)), tokens)
            assert count == searched(tokenizer, stops, tokens), stops
            hits += count > 0
    assert hits > 20


@pytest.mark.parametrize("name", ["smollm2", "t5", "sentencepiece", "words", "byt5"])
def test_the_beginning_of_a_text_and_special_tokens(name: str) -> None:
    """The space in front of a text is not in it, whatever special tokens are before; that of a later word is."""
    tokenizer = tokenizer_of(name)
    word = "ab" if name == "sentencepiece" else "the"
    ids = tokenizer(f"{word} {word}", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    for tokens in (ids, [end, *ids], [ids[0], end, *ids[1:]], [end, end, ids[-1], ids[-1]]):
        for stops in ((" " + word,), (word + " ",), (word,)):
            table = stop_table(tokenizer, stops, len(tokenizer))
            row = np.array(tokens)
            assert stops_at(table, row) == searched(tokenizer, stops, row), (tokens, stops)


def test_tables_have_few_shapes_and_are_kept() -> None:
    tokenizer = tokenizer_of("words")
    assert stop_table(tokenizer, (), 60).shape == (1, 1)
    table = stop_table(tokenizer, ("good film",), 60)
    assert table.shape == (16, 60)
    assert table is stop_table(tokenizer, ("good film",), 60)
    assert stop_table(tokenizer, ("a good film", "b"), 60).shape == (16, 60)
    assert (np.asarray(table)[ACCEPTING] == ACCEPTING).all()
    with_more = np.asarray(table)[:, len(tokenizer) :]  # logits of tokens that there are not
    np.testing.assert_array_equal(with_more, np.broadcast_to(with_more[:, :1], with_more.shape))
    assert with_more[START, 0] == START


def test_the_automaton_finds_what_a_search_finds() -> None:
    """On two letters, where beginnings and ends of the strings overlap in every way."""
    random = np.random.default_rng(0)
    for _ in range(300):
        stops = ["".join(random.choice(list("ab"), random.integers(1, 7))) for _ in range(random.integers(1, 5))]
        text = "".join(random.choice(list("ab"), 12))
        steps, state = byte_automaton(stops), START
        for at, byte in enumerate(text.encode(), 1):
            state = steps[state, byte]
            assert (state == ACCEPTING) == any(stop in text[:at] for stop in stops), (stops, text[:at])


def test_cut_at_stop_is_the_same_wherever_the_text_ends() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        stops = ["".join(random.choice(list("abc"), random.integers(1, 5))) for _ in range(3)]
        text = "".join(random.choice(list("abc"), 12))
        first = next((n for n in range(13) if any(stop in text[:n] for stop in stops)), None)
        if first is None:
            assert cut_at_stop(text, stops) == text
            continue
        cut = cut_at_stop(text[:first], stops)
        assert all(cut_at_stop(text[:n], stops) == cut for n in range(first, 13))
        assert not any(stop in cut for stop in stops)
