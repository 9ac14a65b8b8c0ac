"""ACCEPT: soft prompts whose parts are mixtures of shared codewords, one in front of the text and one added to it.

A vector of D numbers is K = D / t parts of t numbers; part k is a mix of the R codewords (R, t) of codebook k, with
free weights:

    prompt   p_i = [ sum_r W[i, 1, r] C[1, r] ; ... ; sum_r W[i, K, r] C[K, r] ]      i = 1 .. M     (SCPP)
    offset   o_i = the same of another codebook and other weights                     i = 1 .. X     (SCAP)
    input    = [P; E + O[:T]]                          row i of O belongs to token i of the text itself

Lin et al., "ACCEPT: Adaptive Codebook for Composite and Efficient Prompt Tuning", EMNLP Findings 2024, arXiv
2410.12847. The default sizes are those of the authors' T5-base run; on a width that their parts do not divide, the
nearest that do. Weights start from U(-1/sqrt(K R), 1/sqrt(K R)),
the prompt's codebook from U(-1/sqrt(R t), 1/sqrt(R t)) and the offset's from U(-sqrt(6/(R t)), sqrt(6/(R t))): torch's
`kaiming_uniform_` as the authors call it. **So the offset is not zero at the start**, as published. Where the prompt
starts from a text, its weights and codewords are those whose mix is nearest to it (the authors load such ones from a
file). The offset is added with scale 1, and only to source tokens.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp

from deptjax.errors import UserError
from deptjax.methods import initializers
from deptjax.methods.base import Texts, Vocabulary, register_method
from deptjax.methods.dept import rows_by_place
from deptjax.methods.input_method import InputMethod
from deptjax.typing import Array, Float, Key, Tree

PARTS = {"prompt": 32, "offset": 256}  # numbers in a codeword, as the authors have them on T5-base


def mixed_codewords(weights: Float[Array, "*M K R"], codebook: Float[Array, "K R t"]) -> Float[Array, "*M D"]:
    """Returns vectors of D = K t numbers: part k of each is its mix of the codewords of codebook k.

    >>> mixed_codewords(jnp.ones((5, 3, 2)), jnp.ones((3, 2, 4))).shape
    (5, 12)
    """
    *rows, count, part = (parts := jnp.einsum("...kr,krt->...kt", weights, codebook)).shape
    return parts.reshape(*rows, count * part)  # of a text without tokens, -1 would say nothing


def divisors(width: int) -> list[int]:
    """Returns the numbers that divide a width, the smallest first."""
    return [n for n in range(1, width + 1) if width % n == 0]


def nearest_part(width: int, wanted: int) -> int:
    """Returns the number nearest to `wanted` that divides a width, of two the smaller one.

    >>> nearest_part(576, 256), nearest_part(768, 256)
    (288, 256)
    """
    return min(divisors(width), key=lambda part: abs(part - wanted))


def check_part(width: int, part: int, field: str) -> None:
    """Raises `UserError` that names the field and the divisors where `part` numbers do not divide `width`."""
    if width % part == 0:
        return
    near, *others = sorted(divisors(width), key=lambda n: abs(n - part))
    known = ", ".join(map(str, sorted(others)))
    raise UserError(
        f"accept: {field} {part} does not divide the backbone's width {width}; use {near}, or another divisor: {known}"
    )


@register_method
class ACCEPT(InputMethod):
    """ACCEPT, as a Linen module of its own: usable in front of any model that takes embeddings.

    Attributes:
      prompt_length: M, vectors in front of the text.
      prompt_part: t of the prompt, numbers in a codeword; it must divide the width of the embeddings. `None` is the
        number nearest to the authors' 32 that does.
      prompt_codewords: R of the prompt, codewords in a codebook.
      max_length: X, the longest text in tokens that has offsets.
      offset_part: t of the offsets, as `prompt_part`; `None` is the one nearest to their 256.
      offset_codewords: R of the offsets.
      prompt_init: `random` keeps weights and codewords as they are drawn; text, vocab (sampled), labels, or a saved
        prompt's folder starts from those whose mix is nearest to that prompt.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
    """

    kind = "accept"
    paper = (
        "Lin et al., ACCEPT: Adaptive Codebook for Composite and Efficient Prompt Tuning, "
        "EMNLP Findings 2024, arXiv 2410.12847"
    )
    formula = "M (D / t) r + r D + X (D / u) q + q D"
    free_size = "prompt_codewords"
    letters = {
        "M": "prompt_length",
        "t": "prompt_part",
        "r": "prompt_codewords",
        "X": "max_length",
        "u": "offset_part",
        "q": "offset_codewords",
    }
    starts_plain = False
    sizes = ("prompt_length", "prompt_codewords", "max_length", "offset_codewords")
    more_sizes = ("prompt_part", "offset_part")
    free = ("prompt_init", "prompt_text")
    in_front = {"prompt_weights": -3}

    prompt_length: int = 60
    prompt_part: int | None = None
    prompt_codewords: int = 20
    max_length: int = 256
    offset_part: int | None = None
    offset_codewords: int = 20
    prompt_init: str = "text"
    prompt_text: str = initializers.DEFAULT_TEXT

    def resolve(self, width: int) -> ACCEPT:
        prompt, offset = (self._part(name, width) for name in ("prompt", "offset"))
        if (self.prompt_part, self.offset_part) == (prompt, offset):
            return self
        return self.clone(prompt_part=prompt, offset_part=offset)

    def _part(self, name: str, width: int) -> int:
        """Returns t of one of the two. Raises `UserError` for one that is given and does not divide the width."""
        part = getattr(self, f"{name}_part")
        if part is None:
            return nearest_part(width, PARTS[name])
        check_part(width, part, f"{name}_part")
        return part

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "M D"], Float[Array, "B T D"]]:
        """Returns the prompt (M, D) and the source embeddings with their offsets, in the dtype of `embeds`."""
        width = embeds.shape[-1]
        prompt = mixed_codewords(*self._parts("prompt", self.prompt_length, width, self.prompt_codewords, 1.0))
        # torch's gain without `a` is sqrt(2), and 1/sqrt(3) with a = sqrt(5).
        gain = math.sqrt(6.0)
        weights, codebook = self._parts("offset", self.max_length, width, self.offset_codewords, gain)
        weights = rows_by_place(weights, texts.positions, embeds.shape[1])  # no others are mixed
        offset = mixed_codewords(weights, codebook).astype(embeds.dtype)
        return prompt.astype(embeds.dtype), embeds + jnp.broadcast_to(offset, embeds.shape)

    def _parts(self, name: str, rows: int, width: int, codewords: int, gain: float) -> tuple[Array, Array]:
        """Returns weights (rows, K, R) and codebook (K, R, t) of one of the two: `NAME_weights` and `NAME_codebook`."""
        part = self._part(name, width)
        count = width // part
        start = initializers.uniform_within(1.0 / math.sqrt(count * codewords))
        weights = self.param(f"{name}_weights", start, (rows, count, codewords))
        start = initializers.uniform_within(gain / math.sqrt(codewords * part))
        return weights, self.param(f"{name}_codebook", start, (count, codewords, part))

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        if self.prompt_init == "random":
            return params
        start = initializers.initial_prompt(self.prompt_init, self.prompt_text, key, self.prompt_length, vocabulary)
        parts = start.reshape(self.prompt_length, -1, params["prompt_codebook"].shape[-1]).swapaxes(0, 1)
        weights, codebook = initializers.fitted_factors(parts, params["prompt_codebook"])
        return {**params, "prompt_weights": weights.swapaxes(0, 1), "prompt_codebook": codebook}

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        # 5e-3 is the largest of the authors' rates for the added part, as it is of DePT's; see there.
        return {"prompt": prompt_lr, "low_rank": min(5e-3, 1.25 * prompt_lr)}

    def source_limit(self) -> int:
        return self.max_length
