"""What methods have in common that train a soft prompt by way of a network, which is of no use afterwards."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deptjax.methods import initializers
from deptjax.methods.base import Method, Texts
from deptjax.methods.input_method import InputMethod
from deptjax.methods.prompt_tuning import PromptTuning
from deptjax.typing import Array, Float, Tree


class ReparametrisedPrompt(InputMethod):
    """A soft prompt that a network makes of trained vectors, whatever the text. Subclasses define `made_prompt`.

    Since the text does not change it, the prompt is made once after training, and is then one of prompt tuning.

    Attributes:
      prompt_length: M, vectors in front of the text.
      prompt_init: where the trained vectors start.
      prompt_text: the text that they start from, with `prompt_init="text"`.
    """

    more_sizes: ClassVar[tuple[str, ...]] = ("prompt_length",)
    free = ("prompt_init", "prompt_text")

    prompt_length: int = 20
    prompt_init: str = "text"
    prompt_text: str = initializers.DEFAULT_TEXT

    def made_prompt(self, width: int) -> Float[Array, "M D"]:
        """Returns the prompt that the network makes, float32."""
        raise NotImplementedError

    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the prompt (M, D) and the embeddings as they came."""
        return self.made_prompt(embeds.shape[-1]).astype(embeds.dtype), embeds

    @nn.nowrap  # outside of any model: the method that it makes is no part of this one
    def fold(self, trainable: Tree) -> tuple[Method, Tree]:
        params = jax.tree.map(jnp.asarray, trainable["input"])
        prompt = self.apply({"params": params}, params["prompt"].shape[-1], method="made_prompt")
        plain = PromptTuning(self.prompt_length, self.prompt_init, self.prompt_text)
        return plain, {"input": {"prompt": np.asarray(prompt)}}
