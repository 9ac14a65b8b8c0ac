"""DePT, decomposed prompt tuning: a short soft prompt in front, a low-rank offset on the frozen input embeddings.

    P (M, D), A (X, R), B (R, D) are trained; E (T, D) are the frozen embeddings of a text of T tokens.
    E'    = E + c * (A @ B)[:T]          row i of A @ B belongs to token i of the text itself
    input = [P; E']                      M + T rows instead of 100 + T for a vanilla soft prompt

Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2024, arXiv 2309.05173.
The paper's formula has c = 1; the authors' code uses c = alpha / sqrt(R) with alpha = 8, the default here. B = 0 at the
start: DePT begins as prompt tuning with M vectors. P and the pair (A, B) have learning rates of their own. Where the
authors' code pads every text to X tokens and shifts offsets with the padding, here row i is always token i of the real
text, and only source tokens have an offset.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp

from deptjax.errors import UserError
from deptjax.methods import initializers
from deptjax.methods.base import Texts, register_method
from deptjax.methods.input_method import InputMethod
from deptjax.typing import Array, Float, Int

VANILLA_LENGTH = 100  # l, the length of the soft prompt whose parameter budget DePT shares


def dept_offset(a: Float[Array, "*B T R"], b: Float[Array, "R D"], scaling: float) -> Float[Array, "*B T D"]:
    """Returns `scaling * (a @ b)`: an offset for each row of A that is asked for.

    >>> dept_offset(jnp.ones((3, 2)), jnp.ones((2, 5)), 0.5).shape
    (3, 5)
    """
    return scaling * (a @ b)


def rank_for_budget(prompt_length: int, max_length: int, width: int, budget: int | None = None) -> int:
    """Returns the largest rank R with `M * D + (X + D) * R <= budget` parameters.

    `budget` defaults to that of a vanilla soft prompt of 100 vectors, 100 * D: then R = floor((100 - M) D / (X + D)).

    >>> rank_for_budget(40, 256, 768)  # T5-base: 40 * 768 + (256 + 768) * 45 = 76,800
    45
    """
    budget = VANILLA_LENGTH * width if budget is None else budget
    rank = (budget - prompt_length * width) // (max_length + width)
    if rank >= 1:
        return rank
    raise UserError(
        f"prompt_length {prompt_length} and a rank of 1 exceed {budget} parameters; shorten it, or set budget"
    )


def scaling_factor(scaling: str | float, alpha: float, rank: int) -> float:
    """Returns c: `alpha / sqrt(rank)` (the authors' code) or 1 for `"none"` (the paper), or a number as given."""
    named = {"alpha/sqrt(rank)": alpha / math.sqrt(rank), "none": 1.0}
    if isinstance(scaling, str) and scaling not in named:
        raise UserError(f"scaling '{scaling}' is not known; use 'alpha/sqrt(rank)', 'none' or a number")
    return named[scaling] if isinstance(scaling, str) else float(scaling)


def rows_by_place(
    table: Float[Array, "X *R"], positions: Int[Array, "B T"] | None, length: int
) -> Float[Array, "T *R"] | Float[Array, "B T *R"]:
    """Returns for each token the row of its place in its own text: row i belongs to token i.

    Args:
      table: a row for each place.
      positions: of the tokens, -1 for padding; `None` says that column i holds token i.
      length: T.

    Padding and what lies behind the table get zeros. Raises `UserError` where columns are more than the table's rows.
    """
    if positions is not None:
        return jnp.asarray(table).at[positions].get(mode="fill", fill_value=0.0, wrap_negative_indices=False)
    if length > table.shape[0]:
        raise UserError(f"{length} tokens are more than max_length {table.shape[0]}; raise max_length")
    return table[:length]


@register_method
class DePT(InputMethod):
    """Decomposed prompt tuning, as a Linen module of its own: usable in front of any model that takes embeddings.

    >>> import jax
    >>> dept = DePT(prompt_length=4, rank=3, max_length=16)
    >>> embeds, mask = jnp.zeros((2, 9, 8)), jnp.ones((2, 9), bool)
    >>> params = dept.init(jax.random.key(0), embeds, mask)["params"]
    >>> new_embeds, new_mask = dept.apply({"params": params}, embeds, mask)
    >>> new_embeds.shape, new_mask.shape
    ((2, 13, 8), (2, 13))

    Attributes:
      prompt_length: M, vectors in front of the text.
      rank: R; `None` takes the largest rank within `budget` parameters.
      max_length: X, the longest text in tokens that has offsets.
      alpha: used by `scaling="alpha/sqrt(rank)"`.
      scaling: c, `"alpha/sqrt(rank)"` (the authors' code), `"none"` (the paper's formula, 1), or a number.
      budget: parameters when `rank` is `None`; `None` means 100 * D, those of a vanilla soft prompt.
      prompt_init: start from text, vocab (sampled), labels, random numbers (random), or a saved prompt's folder.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
    """

    kind = "dept"
    paper = (
        "Shi and Lipani, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, ICLR 2024, "
        "arXiv 2309.05173"
    )
    formula = "M D + (X + D) R"
    free_size = "rank"
    letters = {"M": "prompt_length", "X": "max_length", "R": "rank"}
    sizes = ("prompt_length", "rank", "max_length")
    free = ("alpha", "scaling", "budget", "prompt_init", "prompt_text")

    prompt_length: int = 40
    rank: int | None = None
    max_length: int = 256
    alpha: float = 8.0
    scaling: str | float = "alpha/sqrt(rank)"
    budget: int | None = None
    prompt_init: str = "text"
    prompt_text: str = initializers.DEFAULT_TEXT

    def rank_at(self, width: int) -> int:
        """Returns R for embeddings of this width: `rank` if it was given, else what the budget allows."""
        if self.rank is not None:
            return self.rank
        return rank_for_budget(self.prompt_length, self.max_length, width, self.budget)

    def resolve(self, width: int) -> DePT:
        scaling_factor(self.scaling, self.alpha, 1)  # an unknown name is found now, not in the first step
        return self.clone(rank=self.rank_at(width))

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the prompt (M, D) and the source embeddings with their offsets, in the dtype of `embeds`."""
        width = embeds.shape[-1]
        rank = self.rank_at(width)
        prompt = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, width))
        # The authors' kaiming_uniform_(a=sqrt(5)) of an (X, R) matrix, whose fan-in is R.
        uniform = initializers.uniform_within(1.0 / math.sqrt(rank))
        a = self.param("lora_a", uniform, (self.max_length, rank))
        b = self.param("lora_b", nn.initializers.zeros, (rank, width))
        rows = rows_by_place(a, texts.positions, embeds.shape[1])
        offset = dept_offset(rows, b, scaling_factor(self.scaling, self.alpha, rank))
        return prompt.astype(embeds.dtype), embeds + jnp.broadcast_to(offset.astype(embeds.dtype), embeds.shape)

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        # 5e-3 is the first of the authors' low-rank rates on T5; where embeddings are small, so must the offsets be.
        return {"prompt": prompt_lr, "low_rank": min(5e-3, 1.25 * prompt_lr)}

    def scales(self) -> dict[str, float]:
        return {"lora_b": scaling_factor(self.scaling, self.alpha, self.rank or 1)}

    def source_limit(self) -> int:
        return self.max_length
