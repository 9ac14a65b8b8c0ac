"""Prompt tuning: M trained vectors in front of the frozen input embeddings.

    input = [P; E]        P (M, D) trained, E (T, D) frozen

Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691.
"""

from __future__ import annotations

import flax.linen as nn

from deptjax.methods import initializers
from deptjax.methods.base import Texts, register_method
from deptjax.methods.input_method import InputMethod
from deptjax.typing import Array, Float


@register_method
class PromptTuning(InputMethod):
    """Vanilla soft prompt.

    Attributes:
      prompt_length: M, vectors in front of the text.
      prompt_init: start from text, vocab (sampled), labels, random numbers (random), or a saved prompt's folder.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
    """

    kind = "prompt_tuning"
    paper = "Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021, arXiv 2104.08691"
    formula = "M D"
    free_size = "prompt_length"
    letters = {"M": "prompt_length"}
    sizes = ("prompt_length",)
    free = ("prompt_init", "prompt_text")

    prompt_length: int = 100
    prompt_init: str = "text"
    prompt_text: str = initializers.DEFAULT_TEXT

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the prompt (M, D) and the embeddings as they came."""
        prompt = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, embeds.shape[-1]))
        return prompt.astype(embeds.dtype), embeds

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr}
