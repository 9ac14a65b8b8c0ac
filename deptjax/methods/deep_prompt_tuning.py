"""Deep prompt tuning: trained vectors at the prompt's positions of every layer, not of the input alone.

    add        x_1 = [P_1; text]      x_i = [prompt part of what block i-1 gives + P_i; text part of it]
    replace    x_i = [P_i; text part of it]                                     P_i (M, D) trained, one a layer

Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119 (VPT-deep), replace: what a block makes of its prompt is
given up for the next layer's own. M-IDPG (Wu et al., NAACL 2022, arXiv 2204.04497) adds. P-tuning v2, whose released
code gives each layer keys and values, is in `prefix_tuning`. Where they add, P_1 is a soft prompt, which starts as one,
and the others start from 0; where they replace, all start from U(-sqrt(3 / D), sqrt(3 / D)), of RMS 1 / sqrt(D). Layers
are those of a causal or masked model, or of an encoder-decoder's encoder.

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
from deptjax.methods.in_common import first_adds_nothing, of_first_layer, with_first_layer
from deptjax.typing import Array, Float, Key, Tree

MODES = ("add", "replace")


class PromptPlaces(nn.Module):
    """Puts the first layer's prompt in front of a text, or M zeros that it replaces; has no parameters."""

    length: int

    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the prompt (M, D) and the embeddings as they came."""
        if self.has_variable("params", "prompt"):  # `at_input` puts it here
            return self.get_variable("params", "prompt").astype(embeds.dtype), embeds
        return jnp.zeros((self.length, embeds.shape[-1]), embeds.dtype), embeds


class LayerPrompt(nn.Module):
    """The prompt of one layer, in the place of the stream's or added to it.

    What the first layer would add is in front of the text already, since the input, and its `adds` is 0.

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
        if self.add:
            prompt = self.param("adds", nn.initializers.ones, ()) * prompt
        prompt = jnp.broadcast_to(prompt.astype(x.dtype), (*x.shape[:-2], *prompt.shape))
        return x + prompt if self.add else prompt


@register_method
@dataclasses.dataclass(frozen=True)
class DeepPromptTuning(Method):
    """Prompts at every layer.

    Attributes:
      prompt_length: M, vectors in front of the text.
      mode: `add` adds each layer's own vectors to what is in the prompt's places, `replace` puts them there.
      prompt_init: of the first layer's, with `mode="add"`: start from text, vocab (sampled), labels, random numbers
        (random), or a saved prompt's folder.
      prompt_text: the text that it starts from, with `prompt_init="text"`.
    """

    kind = "deep_prompt_tuning"
    paper = "Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv 2203.12119 (VPT-deep)"
    formula = "M D for each layer"
    free_size = "prompt_length"
    letters = {"M": "prompt_length"}
    starts_plain = False
    sizes = ("prompt_length",)
    free = ("prompt_init", "prompt_text")
    derived = ("adds",)

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
        return Sites(input=PromptPlaces(self.prompt_length), stream=Filled(self))

    def fill(self, site: StreamSite, name: str) -> nn.Module:
        """Returns the prompt of a layer."""
        return LayerPrompt(self.prompt_length, self.mode == "add", name=name)

    def start(self, key: Key, trainable: Tree, vocabulary: Vocabulary) -> Tree:
        if self.mode == "replace":
            return trainable
        first = initializers.initial_prompt(self.prompt_init, self.prompt_text, key, self.prompt_length, vocabulary)
        return {**trainable, "backbone": with_first_layer(trainable["backbone"], "prompt", first)}

    def inner(self, trainable: Tree) -> Tree:
        layers = super().inner(trainable)
        return layers if self.mode == "replace" else first_adds_nothing(layers, "prompt")

    def at_input(self, trainable: Tree) -> Tree:
        return {} if self.mode == "replace" else {"prompt": of_first_layer(trainable["backbone"], "prompt")}

    def soft_prompt(self, trainable: Tree, width: int) -> Array | None:
        return self.at_input(trainable).get("prompt")

    def group(self, path: tuple[str, ...]) -> str:
        return "prompt"

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        # Where layers normalise what they are given, only the direction of what replaces it counts: as of a prefix.
        return {"prompt": prompt_lr if self.mode == "add" else 1e-2}

    def positions_in_front(self) -> int:
        return self.prompt_length
