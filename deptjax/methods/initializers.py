"""How a soft prompt starts: from a text, sampled vocabulary, the class labels, another prompt, or at random.

Lester et al. 2021 (arXiv 2104.08691, section 3.2) compare random, sampled-vocabulary and class-label starts; the
authors of DePT start from the embeddings of a sentence, repeated and cut to the prompt's length.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from deptjax.errors import UserError, nearest
from deptjax.methods.base import Vocabulary
from deptjax.tokens import token_ids
from deptjax.typing import Array, Float, Key

KINDS = ("text", "vocab", "labels", "random", "normal")
# The authors' sentence reads "Classify this text is postive or not:"; this is what it means.
DEFAULT_TEXT = "Classify this text as positive or not:"
PROMPT = ("input", "prompt")  # where a saved prompt has its soft prompt
# Tokens of no text, whose embeddings training may never have touched: BERT's first 999 among them, and single bytes.
_NO_TEXT = re.compile(r"\[unused\d+\]|<0x[0-9A-F]{2}>|<extra_id_\d+>|madeupword\d+|<\|.*\|>|<unk>|<s>|</s>|<pad>")
VOCAB_ROWS = 5000  # sampled from the most common pieces, which come first in SentencePiece and BPE vocabularies


def initial_prompt(start: str, text: str, key: Key, length: int, vocabulary: Vocabulary) -> Array:
    """Returns the first value of a soft prompt, (M, D) float32.

    Args:
      start: `"text"` (embeddings of `text`, tiled), `"vocab"` (distinct rows, of pieces of text among the first 5,000
        ids), `"labels"` (embeddings of the task's labels, then sampled vocabulary), `"random"` (uniform, with the
        root mean square of the embedding table), `"normal"` (standard normal numbers), or the path of a saved prompt
        folder to start from.
      text: the sentence for `"text"`.
      key: decides what is random; the same key gives the same prompt.
      length: M.
      vocabulary: the frozen embedding table (V, D), the tokenizer and the labels.

    Raises:
      UserError: for an unknown `start`, a text without tokens, no labels, or a damaged prompt or one of another width.
    """
    if start == "text":
        return _tiled(_ids(vocabulary, [text]), length, vocabulary)
    if start == "vocab":
        return _sampled(key, length, vocabulary)
    if start == "labels":
        if not vocabulary.labels:
            raise UserError("prompt_init 'labels' needs a task with labels; use 'text' or 'vocab' for free text")
        ids = _ids(vocabulary, vocabulary.labels)[:length]
        rest = _sampled(key, length, vocabulary)[len(ids) :]
        return jnp.concatenate([_tiled(ids, len(ids), vocabulary), rest])
    if start == "random":
        limit = jnp.sqrt(3.0) * embedding_rms(vocabulary.embedding)
        return jax.random.uniform(key, (length, vocabulary.embedding.shape[1]), jnp.float32, -limit, limit)
    if start == "normal":
        return jax.random.normal(key, (length, vocabulary.embedding.shape[1]), jnp.float32)
    return _from_saved(start, length, vocabulary)


def embedding_rms(embedding: Array) -> Array:
    """Returns the root mean square of a (V, D) table as a float32 scalar: the scale on which soft prompts live."""
    return jnp.sqrt(jnp.mean(jnp.square(embedding.astype(jnp.float32))))


def uniform_within(limit: float) -> Callable[..., Array]:
    """Returns a Linen initialiser of U(-limit, limit).

    With `limit = 1 / sqrt(fan_in)` it is torch's for a linear layer and its bias, `kaiming_uniform_(a=sqrt(5))`.
    """

    def start(key: Key, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return start


def fitted_factors(target: Float[Array, "*K M N"], drawn: Float[Array, "*K R N"]) -> tuple[Array, Array]:
    """Returns factors (*K, M, R) and (*K, R, N), both float32, whose product is as near to `target` as rank R can be.

    They are the balanced ones of a truncated singular value decomposition (Eckart and Young, 1936). Where the target
    has a smaller rank than R, such as a short text that is repeated, the left factor is 0 and the right one keeps the
    rows of `drawn`, so that training can use them.
    """
    left, values, right = jnp.linalg.svd(target.astype(jnp.float32), full_matrices=False)
    rank, kept = drawn.shape[-2], min(drawn.shape[-2], values.shape[-1])
    values = values[..., :kept]
    real = values > 1e-5 * values[..., :1]
    root = jnp.where(real, jnp.sqrt(values), 0.0)
    left = left[..., :kept] * root[..., None, :]
    fitted = jnp.where(real[..., None], root[..., None] * right[..., :kept, :], drawn[..., :kept, :])
    gap = [(0, 0)] * (left.ndim - 1) + [(0, rank - kept)]
    return jnp.pad(left, gap), jnp.concatenate([fitted, drawn[..., kept:, :]], axis=-2)


def _ids(vocabulary: Vocabulary, texts: tuple[str, ...] | list[str]) -> np.ndarray:
    ids = list(itertools.chain(*token_ids(vocabulary.tokenizer, texts, add_special_tokens=False)))
    if not ids:
        raise UserError("prompt_text has no tokens; give a sentence, or set prompt_init to 'vocab'")
    return np.asarray(ids)


def _tiled(ids: np.ndarray, length: int, vocabulary: Vocabulary) -> Array:
    return vocabulary.embedding[np.resize(ids, length)].astype(jnp.float32)


def _sampled(key: Key, length: int, vocabulary: Vocabulary) -> Array:
    ids = _pieces(vocabulary)
    chosen = jax.random.choice(key, ids, (length,), replace=length > len(ids))
    return vocabulary.embedding[chosen].astype(jnp.float32)


def _pieces(vocabulary: Vocabulary) -> np.ndarray:
    """Returns the first ids that stand for pieces of text; if there are none, the first ids."""
    tokenizer, ids = vocabulary.tokenizer, np.arange(min(VOCAB_ROWS, vocabulary.embedding.shape[0]))
    if tokenizer is None:
        return ids
    no_text = set(tokenizer.all_special_ids)
    no_text |= {i for token, i in tokenizer.get_vocab().items() if _NO_TEXT.fullmatch(token)}
    kept = np.asarray([i for i in ids if i not in no_text])
    return kept if len(kept) else ids


def _from_saved(start: str, length: int, vocabulary: Vocabulary) -> Array:
    if not pathlib.Path(start).is_dir():
        raise UserError(
            f"prompt_init '{start}' is neither one of {', '.join(KINDS)} nor a saved prompt folder."
            f"{nearest(start, KINDS)}"
        )
    try:
        saved = saved_prompt(start, vocabulary)
    except UserError as error:
        raise UserError(f"prompt_init: {error}") from None
    return jnp.resize(saved, (length, saved.shape[1])) if len(saved) < length else saved[:length]


def saved_prompt(folder: str, vocabulary: Vocabulary, alone: bool = False) -> Array:
    """Returns the soft prompt (M, D) float32 in the folder of a saved prompt; `alone`: of one that is nothing else.

    Of a method that makes it of parts (MPT, DPT, ACCEPT) it is the one that these make.

    Raises `UserError` for a folder without one, a damaged file, and a prompt of another backbone.
    """
    from deptjax.prompt import Prompt  # which knows methods

    prompt = Prompt.load(folder)
    more = sorted("/".join(path) for path in traverse_util.flatten_dict(prompt.trainable) if path != PROMPT)
    if alone and more:
        raise UserError(f"{folder} holds '{more[0]}' beside the soft prompt; choose a prompt of prompt_tuning")
    own, width = prompt.fingerprint.get("width"), vocabulary.embedding.shape[1]
    if own != width:
        raise UserError(f"{folder} has width {own}, the backbone {width}; choose a prompt of this backbone")
    if vocabulary.check_prompt is not None:
        vocabulary.check_prompt(prompt, folder)
    return jnp.asarray(prompt.soft_prompt(folder), jnp.float32)
