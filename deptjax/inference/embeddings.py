"""The input embeddings that a tuned prompt makes of a text, for a server that takes embeddings instead of tokens.

A method that acts on the input site alone is nothing but these embeddings: `[P; E + offset]`, a prompt (M, D) in front
of the changed embeddings (T, D) of the text. So any server that runs the frozen model can answer with it.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.data.buckets import power_of_two
from deptjax.data.pipeline import pad
from deptjax.errors import UserError
from deptjax.inference.inputs import Text, preprocessor_of, source_text, text_list, text_origin
from deptjax.inference.prompt_bank import Source, usable_prompt
from deptjax.inference.text_encoder import SavedEncoders
from deptjax.methods.base import Texts
from deptjax.models.backbone import Backbone
from deptjax.typing import Array, Tree

logger = logging.getLogger(__name__)

ROWS = 8  # texts a batch, so that one program serves a length


def input_embeddings(
    backbone: Backbone, prompt: Source, texts: Iterable[Text], encoder: Backbone | None = None
) -> list[np.ndarray]:
    """Returns for each text its `inputs_embeds`, (M + T, D) in the dtype of the computation, the prompt in front.

    Args:
      backbone: the one the prompt was tuned on; on an encoder-decoder these are the encoder's inputs.
      prompt: a `Prompt`, or the path of one in any format that `load_prompt` knows.
      texts: bare texts, where the task's template has one column, or objects with its columns. They are filled into
        the template, tokenised and cut as in training.
      encoder: a loaded encoder for a prompt of a method that has one, in place of the one that it names.

    Raises:
      UserError: for a prompt of another backbone, a method that acts elsewhere than on the input, or an empty text.
    """
    embed = embedder(backbone, prompt, encoder)
    return [embeds for _, embeds in embed(text_list(texts))]


def embedder(
    backbone: Backbone, prompt: Source, encoder: Backbone | None = None
) -> Callable[[Iterable[Text]], Iterator[tuple[str, np.ndarray]]]:
    """Returns a function that yields of each text the filled template and its input embeddings (M + T, D).

    Raises `UserError` as `input_embeddings` does.
    """
    where, usable = usable_prompt(backbone, prompt, "prompt")
    sites, method = usable.method.sites(), usable.method
    if sites.input is None or sites.inner or method.tunes_backbone:
        raise UserError(
            f"method '{method.kind}' acts inside the backbone, not on its input alone, so no embeddings can stand for "
            "it; use a prompt of a method that acts at the input (dept, prompt_tuning, lopa; `deptjax methods` tells)"
        )
    try:
        preprocessor, reader = preprocessor_of(backbone, usable), SavedEncoders(backbone, encoder).of(usable)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    frozen, trainable = backbone.params, jax.tree.map(jnp.asarray, usable.trainable["input"])
    programs = backbone.module(), sites.input

    def embed(some: Sequence[tuple[int, Text]]) -> Iterator[tuple[str, np.ndarray]]:
        origins, cut = [text_origin(text, number) for number, text in some], preprocessor.cut_count
        filled = [source_text(preprocessor.task, text, at) for (_, text), at in zip(some, origins, strict=True)]
        tokens = preprocessor.encode_texts(filled, origins)
        if cut == 0 and preprocessor.cut_count:
            logger.warning("texts of more than %d tokens, the prompt's max_length, are cut", preprocessor.max_length)
        rows = [*tokens, *tokens[-1:] * (ROWS - len(tokens))]
        encoding = None
        if reader is not None:
            read = reader.vectors(reader.tokens(preprocessor.unmasked(filled)))
            encoding = np.concatenate([read, np.repeat(read[-1:], ROWS - len(read), axis=0)])
        ids, mask = pad(rows, power_of_two(max(map(len, tokens))))
        prompts, embeds = jax.device_get(_streams(programs, frozen, trainable, ids, mask, encoding))
        for place, (text, own) in enumerate(zip(filled, tokens, strict=True)):
            changed = embeds[place, : len(own)]
            prompt = [] if prompts is None else [prompts if prompts.ndim == 2 else prompts[place]]
            yield text, np.concatenate([*prompt, changed])

    def embed_all(texts: Iterable[Text]) -> Iterator[tuple[str, np.ndarray]]:
        numbered = enumerate(texts, 1)
        while some := list(itertools.islice(numbered, ROWS)):
            yield from embed(some)

    return embed_all


@functools.partial(jax.jit, static_argnums=0)
def _streams(
    programs: tuple[Any, Any], frozen: Tree, trainable: Tree, ids: Array, mask: Array, encoding: Array | None
) -> tuple[Array | None, Array]:
    """Returns the prompt of a batch, (M, D) or (B, M, D), and its changed embeddings (B, T, D)."""
    module, fill = programs
    embeds = module.apply({"params": frozen}, ids, method="embed")
    positions = jnp.where(mask, jnp.arange(ids.shape[1])[None], -1)
    return fill.apply({"params": trainable}, embeds, Texts(mask, positions, encoding), method="streams")  # type: ignore[no-any-return]
