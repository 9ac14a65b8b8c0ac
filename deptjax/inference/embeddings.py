"""The input embeddings that a tuned prompt makes of a text, for a server that takes embeddings instead of tokens.

A method that acts on the input site alone is nothing but these embeddings: `[P; E + offset]`, a prompt (M, D) in front
of the changed embeddings (T, D) of the text. So any server that runs the frozen model can answer with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.data.preprocess import Preprocessor
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt

logger = logging.getLogger(__name__)

Text = str | Mapping[str, object] | Row


def input_embeddings(
    backbone: Backbone, prompt: Prompt | str | os.PathLike[str], texts: Sequence[Text]
) -> list[np.ndarray]:
    """Returns for each text what the blocks of the backbone are fed: (M + T, D) in the dtype of the computation.

    Args:
      backbone: the one the prompt was tuned on; on an encoder-decoder these are the encoder's inputs.
      prompt: a `Prompt`, or its folder.
      texts: bare texts, where the task's template has one column, or objects with its columns. They are filled into
        the template, tokenised and cut as in training.

    Raises:
      UserError: for a prompt of another backbone, a method that acts elsewhere than on the input, or an empty text.
    """
    if isinstance(texts, str):
        raise UserError("input_embeddings takes a list of texts, not one text: write [text]")
    embed = embedder(backbone, prompt if isinstance(prompt, Prompt) else Prompt.load(prompt))
    embedded = []
    for number, text in enumerate(texts, 1):
        try:
            embedded.append(embed(text)[1])
        except UserError as error:
            raise UserError(str(error) if isinstance(text, Row) else f"text {number}: {error}") from None
    return embedded


def embedder(backbone: Backbone, prompt: Prompt) -> Callable[[Text], tuple[str, np.ndarray]]:
    """Returns a function from a text to the filled template and its input embeddings (M + T, D).

    Raises `UserError` as `input_embeddings` does.
    """
    prompt.check_backbone(backbone)
    sites, method = prompt.method.sites(), prompt.method
    if sites.input is None or sites.linear or sites.attention or sites.residual or method.tunes_backbone:
        raise UserError(
            f"method '{method.kind}' acts inside the backbone, not on its input alone, so no embeddings can stand for "
            "it; use a prompt of dept or prompt_tuning"
        )
    task = Task.from_config({**prompt.task, "source": None})
    causal = not backbone.config.is_encoder_decoder
    preprocessor = Preprocessor(backbone.tokenizer, task, causal=causal, max_length=prompt.settings["max_length"])
    module = backbone.module()
    trainable = jax.tree.map(jnp.asarray, prompt.trainable["input"])

    def embed(text: Text) -> tuple[str, np.ndarray]:
        filled, cut = task.source_text(text), preprocessor.cut_count
        tokens = preprocessor.encode_text(filled)
        if cut == 0 and preprocessor.cut_count:
            logger.warning("texts of more than %d tokens, the prompt's max_length, are cut", preprocessor.max_length)
        embeds = module.apply({"params": backbone.params}, jnp.asarray(tokens)[None], method="embed")
        vectors, embeds = sites.input.apply({"params": trainable}, embeds, method="streams")
        if vectors is None:
            return filled, np.asarray(embeds[0])
        return filled, np.concatenate([np.asarray(vectors).reshape(-1, backbone.width), np.asarray(embeds[0])])

    return embed
