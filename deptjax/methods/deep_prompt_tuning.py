"""Deep prompt tuning: trained vectors at the prompt's positions of every layer, not of the input alone.

    add        x_i = [prompt part of what block i-1 gives + P_i; text part of it]      P_i (M, D) trained, one a layer
    replace    x_i = [P_i; text part of it]

Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119 (VPT-deep), replace: what a block makes of its prompt is
given up for the next layer's own. M-IDPG (Wu et al., NAACL 2022, arXiv 2204.04497) adds. P-tuning v2, whose released
code gives each layer keys and values, is in `prefix_tuning`. P_i starts from 0, behind a trained prompt in front, when
it adds, and from U(-sqrt(3 / D), sqrt(3 / D)), of RMS 1 / sqrt(D), when it replaces. Layers are those of a causal or
masked model, or of an encoder-decoder's encoder.

Adding is the default. The tokens of a causal language model attend to the first positions whatever these hold, and to
give up their states takes more steps to mend than a short run has; the page of the method has both measured.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.methods import initializers
from deptjax.methods.base import Filled, Method, Sites, StreamSite, Texts, Vocabulary, register_method
from deptjax.methods.prompt_tuning import PromptTuning
from deptjax.typing import Array, Float, Key, Tree

MODES = ("add", "replace")


class PromptPlaces(nn.Module):
    """Puts M zeros in front of a text, which the first layer replaces. It has no parameters."""

    length: int

    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the zeros (M, D) and the embeddings as they came."""
        return jnp.zeros((self.length, embeds.shape[-1]), embeds.dtype), embeds


class LayerPrompt(nn.Module):
    """The prompt of one layer, in the place of the stream's or added to it.

    Attributes:
      length: M.
      add: whether it is added.
    """

    length: int
    add: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*B M D"], text: Any = None) -> Float[Array, "*B M D"]:
        """Returns the prompt's part of the stream; what the text is does not count."""
        limit = math.sqrt(3.0 / x.shape[-1])
        start = nn.initializers.zeros if self.add else initializers.uniform_within(limit)
        prompt = self.param("prompt", start, (self.length, x.shape[-1]))
        prompt = jnp.broadcast_to(prompt.astype(x.dtype), (*x.shape[:-2], *prompt.shape))
        return x + prompt if self.add else prompt


@register_method
@dataclasses.dataclass(frozen=True)
class DeepPromptTuning(Method):
    """Prompts at every layer.

    Attributes:
      prompt_length: M, vectors in front of the text.
      mode: `add` adds each layer's own vectors to what is in the prompt's places, `replace` puts them there.
      prompt_init: of the prompt in front, with `mode="add"`: start from text, vocab (sampled), labels, random numbers
        (random), or a saved prompt's folder.
      prompt_text: the text that it starts from, with `prompt_init="text"`.
    """

    kind = "deep_prompt_tuning"
    paper = "Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv 2203.12119 (VPT-deep)"
    formula = "M D, and M D for each layer"
    free_size = "prompt_length"
    letters = {"M": "prompt_length"}
    starts_plain = False
    sizes = ("prompt_length",)
    free = ("prompt_init", "prompt_text")

    prompt_length: int = 20
    mode: str = "add"
    prompt_init: str = "text"
    prompt_text: str = initializers.DEFAULT_TEXT

    def __post_init__(self) -> None:
        self.check_sizes()
        if self.mode not in MODES:
            known = " or ".join(MODES)
            raise UserError(f"{self.kind}: mode '{self.mode}' is not {known}.{nearest(self.mode, MODES)}")
        if self.mode == "replace" and (self.prompt_init, self.prompt_text) != ("text", initializers.DEFAULT_TEXT):
            raise UserError(
                f"{self.kind}: with mode 'replace' all vectors start at random, so prompt_init and prompt_text have no "
                "use; leave them out, or take mode 'add'"
            )

    def sites(self) -> Sites:
        return Sites(input=self._front if self.mode == "add" else PromptPlaces(self.prompt_length), stream=Filled(self))

    @property
    def _front(self) -> PromptTuning:
        """What stands in front of the text at the input, where layers add to it."""
        return PromptTuning(self.prompt_length, self.prompt_init, self.prompt_text)

    def fill(self, site: StreamSite, name: str) -> nn.Module:
        """Returns the prompt of a layer."""
        return LayerPrompt(self.prompt_length, self.mode == "add", name=name)

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        return self._front.initialize(key, params, vocabulary)

    def group(self, path: tuple[str, ...]) -> str:
        return "prompt"

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        # Where layers normalise what they are given, only the direction of what replaces it counts: as of a prefix.
        return {"prompt": prompt_lr if self.mode == "add" else 1e-2}

    def positions_in_front(self) -> int:
        return self.prompt_length
