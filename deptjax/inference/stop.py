"""Stop strings, exact, inside a compiled loop.

All stop strings of a request become one automaton over bytes (Aho and Corasick 1975): after each byte its state is the
longest end of the text that some stop string begins with. Followed along the bytes of every token from every state, it
becomes a table (states, vocabulary): a decoding step looks up `state = table[state, token]`, whatever the strings are,
however many tokens they span and wherever in a token they begin. UTF-8 is self-synchronising, so a string is found
among the bytes exactly where it stands in the text.

A text is looked at as it grows: a row ends with the first token after which its text holds a stop string.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from deptjax.interop.token_bytes import token_bytes
from deptjax.typing import Array, Int

START, ACCEPTING = 0, 1  # states of every table: nothing is written yet; a stop string is in the text, for good
NO_STOPS: Any = np.zeros((1, 1), np.int32)  # the table where there are no stop strings
_ROOT = 2  # something is written, and no stop string has begun


@functools.lru_cache(maxsize=8)
def stop_table(tokenizer: Any, stops: tuple[str, ...], vocab_size: int) -> Int[Array, "S V"]:
    """Returns the table of the automaton: (S, V) int32, S a power of two; (1, 1) where there are no stop strings.

    Args:
      tokenizer: a transformers tokenizer; one whose tokens are not known as bytes raises `UserError`.
      stops: texts of at least one character.
      vocab_size: V, of the model's logits; tokens that the tokenizer does not have add nothing to a text.
    """
    if not stops:
        return jnp.asarray(NO_STOPS)
    steps = byte_automaton(stops)
    first, later = token_bytes(tokenizer)
    states = 1 << (len(steps) - 1).bit_length()  # few shapes, so few programs
    table = np.zeros((states, vocab_size), np.int32)
    table[: len(steps)] = _along_tokens(steps, np.arange(len(steps)), later, vocab_size)
    table[START] = _along_tokens(steps, np.array([_ROOT]), first, vocab_size)[0]
    # Special tokens are not part of the text: what comes behind them is still its beginning.
    unseen = [i for i in range(vocab_size) if i >= len(first) or first[i] is None]
    table[START, unseen] = START
    return jnp.asarray(table)


def advance(table: Int[Array, "S V"], states: Int[Array, "..."], tokens: Int[Array, "..."]) -> Int[Array, "..."]:
    """Returns the states after one more token each; the shapes of states and tokens are the same.

    >>> advance(jnp.zeros((1, 1), jnp.int32), jnp.array([0]), jnp.array([7]))
    Array([0], dtype=int32)
    """
    return states if table.shape == (1, 1) else table[states, tokens]


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    r"""Returns the text before the stop string that is complete first; the longest, where several end together.

    So the result is the same whether the text ends with that string or goes on behind it.

    >>> cut_at_stop("Paris.\n\nQ: next", ("\n\n", "Q:"))
    'Paris.'
    >>> cut_at_stop("abcde", ("cde", "bc"))
    'a'
    >>> cut_at_stop("no stop here", ("\n",))
    'no stop here'
    """
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def byte_automaton(stops: Sequence[str]) -> np.ndarray:
    """Returns the next state for each state and byte: (S, 256) int32, of the UTF-8 of non-empty strings.

    States 0 and 1 are `START` and `ACCEPTING`, which is kept forever; the others are the beginnings of the strings.

    >>> steps = byte_automaton(["ab"])
    >>> int(steps[steps[START, ord("a")], ord("b")])
    1
    """
    children: list[dict[int, int]] = [{}, {}, {}]
    for stop in stops:
        node, data = _ROOT, stop.encode()
        for byte in data[:-1]:
            node = children[node].setdefault(byte, len(children))
            if node == ACCEPTING:  # a shorter string ends here
                break
            if node == len(children):
                children.append({})
        else:
            children[node][data[-1]] = ACCEPTING
    steps = np.full((len(children), 256), _ROOT, np.int32)
    steps[ACCEPTING] = ACCEPTING
    # In order of length: the state behind a beginning is that behind its longest end which is a beginning too.
    fallback, queue = {_ROOT: _ROOT}, deque([_ROOT])
    while queue:
        node = queue.popleft()
        shorter = steps[fallback[node]].copy()
        if node != _ROOT:
            steps[node] = shorter
        for byte, child in children[node].items():
            if steps[node, byte] == ACCEPTING:  # an end of this beginning is a string
                continue
            steps[node, byte] = child
            if child != ACCEPTING:
                fallback[child] = _ROOT if node == _ROOT else int(shorter[byte])
                queue.append(child)
    steps[START] = steps[_ROOT]
    return steps


def _along_tokens(steps: np.ndarray, states: np.ndarray, tokens: Sequence[bytes | None], vocab_size: int) -> np.ndarray:
    """Returns the state behind each token from each of the states: (len(states), vocab_size)."""
    known = [token or b"" for token in tokens[:vocab_size]]
    lengths = np.zeros(vocab_size, np.int64)
    lengths[: len(known)] = [len(token) for token in known]
    order = np.argsort(-lengths, kind="stable")  # long tokens first, so that those with a byte to go are a slice
    data = np.zeros((vocab_size, lengths.max()), np.uint8)
    flat = np.frombuffer(b"".join(known), np.uint8)
    data[np.arange(lengths.max())[None] < lengths[:, None]] = flat
    data = data[order]
    behind = np.repeat(states[:, None], vocab_size, axis=1)
    for at in range(lengths.max()):
        going = int(np.count_nonzero(lengths > at))
        behind[:, :going] = steps[behind[:, :going], data[:going, at]]
    result = np.empty_like(behind)
    result[:, order] = behind
    return result
