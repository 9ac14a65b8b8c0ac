"""DPT: a soft prompt that is the product of two small factors.

    P = U V        U (M, R), V (R, D) trained
    input = [P; E]

Xiao et al., "Decomposed Prompt Tuning via Low-Rank Reparameterization", EMNLP Findings 2023, arXiv 2310.10094:
(M + D) R numbers instead of M D. Not to be taken for DePT. The authors draw both factors from U(-0.5, 0.5); with
another start than `random` they are those whose product is nearest to that prompt. The factors are what is saved: the
prompt that they make is larger.
"""

from __future__ import annotations

import flax.linen as nn

from deptjax.methods import initializers
from deptjax.methods.base import Texts, Vocabulary, register_method
from deptjax.methods.input_method import InputMethod
from deptjax.typing import Array, Float, Key, Tree

START = 0.5  # both factors start from U(-START, START), as in the authors' code


def dpt_prompt(u: Float[Array, "M R"], v: Float[Array, "R D"]) -> Float[Array, "M D"]:
    """Returns `u @ v`, the soft prompt."""
    return u @ v


@register_method
class DPT(InputMethod):
    """Decomposed prompt tuning of Xiao et al.

    Attributes:
      prompt_length: M, vectors in front of the text.
      rank: R.
      prompt_init: `random` keeps the factors as they are drawn; text, vocab (sampled), labels, or a saved prompt's
        folder starts from the factors whose product is nearest to that prompt.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
    """

    kind = "dpt"
    paper = (
        "Xiao et al., Decomposed Prompt Tuning via Low-Rank Reparameterization, EMNLP Findings 2023, arXiv 2310.10094"
    )
    formula = "(M + D) R"
    free_size = "rank"
    letters = {"M": "prompt_length", "R": "rank"}
    sizes = ("prompt_length", "rank")
    free = ("prompt_init", "prompt_text")
    in_front = {"prompt_u": -2}

    prompt_length: int = 100
    rank: int = 10
    prompt_init: str = "random"
    prompt_text: str = initializers.DEFAULT_TEXT

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the prompt (M, D) and the embeddings as they came."""
        start = initializers.uniform_within(START)
        u = self.param("prompt_u", start, (self.prompt_length, self.rank))
        v = self.param("prompt_v", start, (self.rank, embeds.shape[-1]))
        return dpt_prompt(u, v).astype(embeds.dtype), embeds

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        if self.prompt_init == "random":
            return params
        start = initializers.initial_prompt(self.prompt_init, self.prompt_text, key, self.prompt_length, vocabulary)
        u, v = initializers.fitted_factors(start, params["prompt_v"])
        return {**params, "prompt_u": u, "prompt_v": v}

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr}
