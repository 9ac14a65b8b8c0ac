"""ADePT, adaptive decomposed prompt tuning: a short soft prompt in front, and of each token an offset of its own.

    P (M, D), W1 (D, R), b1 (R,), W2 (R, D), b2 (D,) are trained; E (T, D) are the frozen embeddings of a text.
    E'    = E + relu(E W1 + b1) W2 + b2      a small feed-forward net, the same at every position
    input = [P; E']

Tang et al., "ADePT: Adaptive Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2025, arXiv
2501.03291. Where DePT's offset belongs to a place in the text, here it belongs to the token, so texts may have any
length. W1 starts from U(-1/sqrt(R), 1/sqrt(R)) (the authors' `kaiming_uniform_(a=sqrt(5))`, whose fan-in is R), and W2,
b1 and b2 from 0: ADePT begins as prompt tuning with M vectors. As with DePT, only source tokens have an offset.
"""

from __future__ import annotations

import math

import flax.linen as nn

from deptjax.errors import UserError
from deptjax.methods import initializers
from deptjax.methods.base import Texts, register_method
from deptjax.methods.dense import dense
from deptjax.methods.dept import VANILLA_LENGTH
from deptjax.methods.input_method import InputMethod
from deptjax.typing import Array, Float


def adept_offset(
    embeds: Float[Array, "*B D"],
    w1: Float[Array, "D R"],
    b1: Float[Array, "R"],
    w2: Float[Array, "R D"],
    b2: Float[Array, "D"],
) -> Float[Array, "*B D"]:
    """Returns `relu(embeds @ w1 + b1) @ w2 + b2`: the offset of each embedded token."""
    return dense(nn.relu(dense(embeds, w1, b1)), w2, b2)


def hidden_width_for_budget(prompt_length: int, width: int, budget: int | None = None) -> int:
    """Returns the largest R with `M D + 2 D R + R + D <= budget` parameters.

    `budget` defaults to that of a vanilla soft prompt of 100 vectors, 100 * D.

    >>> hidden_width_for_budget(60, 768)  # T5-base: 76,051 parameters
    19
    """
    budget = VANILLA_LENGTH * width if budget is None else budget
    rank = (budget - (prompt_length + 1) * width) // (2 * width + 1)
    if rank >= 1:
        return rank
    raise UserError(
        f"prompt_length {prompt_length} and a rank of 1 exceed {budget} parameters; shorten it, or set budget"
    )


@register_method
class ADePT(InputMethod):
    """Adaptive decomposed prompt tuning, as a Linen module of its own: usable in front of any model.

    Attributes:
      prompt_length: M, vectors in front of the text.
      rank: R, the hidden width of the net; `None` takes the largest within `budget` parameters.
      budget: parameters when `rank` is `None`; `None` means 100 * D, those of a vanilla soft prompt.
      prompt_init: start from text, vocab (sampled), labels, random numbers (random), or a saved prompt's folder.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
    """

    kind = "adept"
    paper = "Tang et al., ADePT: Adaptive Decomposed Prompt Tuning, ICLR 2025, arXiv 2501.03291"
    formula = "M D + 2 D R + R + D"
    free_size = "rank"
    letters = {"M": "prompt_length", "R": "rank"}
    sizes = ("prompt_length", "rank")
    free = ("budget", "prompt_init", "prompt_text")

    prompt_length: int = 60
    rank: int | None = None
    budget: int | None = None
    prompt_init: str = "text"
    prompt_text: str = initializers.DEFAULT_TEXT

    def rank_at(self, width: int) -> int:
        """Returns R for embeddings of this width: `rank` if it was given, else what the budget allows."""
        return hidden_width_for_budget(self.prompt_length, width, self.budget) if self.rank is None else self.rank

    def resolve(self, width: int) -> ADePT:
        return self.clone(rank=self.rank_at(width))

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the prompt (M, D) and the source embeddings with their offsets, in the dtype of `embeds`."""
        width = embeds.shape[-1]
        rank = self.rank_at(width)
        zeros = nn.initializers.zeros
        prompt = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, width))
        w1 = self.param("w1", initializers.uniform_within(1.0 / math.sqrt(rank)), (width, rank))
        b1 = self.param("b1", zeros, (rank,))
        w2 = self.param("w2", zeros, (rank, width))
        b2 = self.param("b2", zeros, (width,))
        w1, b1, w2, b2 = (a.astype(embeds.dtype) for a in (w1, b1, w2, b2))
        return prompt.astype(embeds.dtype), embeds + adept_offset(embeds, w1, b1, w2, b2)

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr, "low_rank": 1e-4}  # the authors' for the net, whatever the prompt's
