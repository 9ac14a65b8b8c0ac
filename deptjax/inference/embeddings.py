"""The input embeddings that a tuned prompt makes of a text, for a server that takes embeddings instead of tokens.

A method that acts on the input site alone is nothing but these embeddings: `[P; E + offset]`, a prompt (M, D) in front
of the changed embeddings (T, D) of the text. So any server that runs the frozen model can answer with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.errors import UserError
from deptjax.inference.inputs import Text, preprocessor_of, source_text, text_list, text_origin
from deptjax.inference.prompt_bank import Source, usable_prompt
from deptjax.inference.text_encoder import SavedEncoders
from deptjax.methods.base import Texts
from deptjax.models.backbone import Backbone

logger = logging.getLogger(__name__)


def input_embeddings(
    backbone: Backbone, prompt: Source, texts: Iterable[Text], encoder: Backbone | None = None
) -> list[np.ndarray]:
    """Returns for each text what the blocks of the backbone are fed: (M + T, D) in the dtype of the computation.

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
    module = backbone.module()
    trainable = jax.tree.map(jnp.asarray, usable.trainable["input"])

    def embed(text: Text, origin: str) -> tuple[str, np.ndarray]:
        filled, cut = source_text(preprocessor.task, text, origin), preprocessor.cut_count
        (tokens,) = preprocessor.encode_texts([filled], [origin])
        if cut == 0 and preprocessor.cut_count:
            logger.warning("texts of more than %d tokens, the prompt's max_length, are cut", preprocessor.max_length)
        embeds = module.apply({"params": backbone.params}, jnp.asarray(tokens)[None], method="embed")
        encoding = None
        if reader is not None:
            encoding = jnp.asarray(reader.vectors(reader.tokens(preprocessor.unmasked([filled]))))
        texts = Texts.whole(embeds, encoding)
        vectors, embeds = sites.input.apply({"params": trainable}, embeds, texts, method="streams")
        if vectors is None:
            return filled, np.asarray(embeds[0])
        return filled, np.concatenate([np.asarray(vectors).reshape(-1, backbone.width), np.asarray(embeds[0])])

    return lambda texts: (embed(text, text_origin(text, number)) for number, text in enumerate(texts, 1))
