"""LoRA: a low-rank update beside chosen projections of every layer.

    y = x W + (alpha / R) * (x A) B        A (in, R) uniform, B (R, out) zero, W frozen

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, equation 3. A starts from
U(-1/sqrt(in), 1/sqrt(in)), torch's `kaiming_uniform_(a=sqrt(5))`, as in the authors' code and in HF peft.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn

from deptjax.methods import initializers
from deptjax.methods.base import Filled, LinearSite, Sites, register_method
from deptjax.methods.targets import TargetedMethod
from deptjax.typing import Array, Float


def lora_update(x: Float[Array, "... I"], a: Float[Array, "I R"], b: Float[Array, "R O"], scaling: float) -> Array:
    """Returns `scaling * (x @ a) @ b`, shape (..., O)."""
    return scaling * ((x @ a) @ b)


class LoRALinear(nn.Module):
    """What LoRA puts beside one projection.

    Attributes:
      rank: R.
      scaling: alpha / R.
      features_out: O, the width of the projection's result.
    """

    rank: int
    scaling: float
    features_out: int

    @nn.compact
    def __call__(self, x: Float[Array, "... I"], y: Float[Array, "... O"]) -> Float[Array, "... O"]:
        """Returns `y` plus the update for `x`."""
        uniform = initializers.uniform_within(1.0 / math.sqrt(x.shape[-1]))
        a = self.param("lora_a", uniform, (x.shape[-1], self.rank))
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features_out))
        return y + lora_update(x, a.astype(x.dtype), b.astype(x.dtype), self.scaling)


@register_method
@dataclasses.dataclass(frozen=True)
class LoRA(TargetedMethod):
    """Low-rank adaptation of the projections whose path matches `targets`.

    Attributes:
      rank: R.
      alpha: the update is scaled by alpha / R.
      targets: a regular expression searched for in the path of a projection, such as `attention/query`, `mlp/up`,
        `decoder/encoder_decoder_attention/value`. The default takes query and value everywhere.
    """

    kind = "lora"
    paper = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685"
    formula = "(I + O) R for each projection"
    free_size = "rank"
    letters = {"R": "rank"}
    sizes = ("rank",)
    free = ("alpha",)
    axes = {"lora_a": ("in", None), "lora_b": (None, "out")}

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"(query|value)$"

    def sites(self) -> Sites:
        return Sites(linear=Filled(self))

    def fill(self, site: LinearSite, name: str) -> nn.Module | None:
        """Returns the update for a projection, or `None` when `targets` does not match its path."""
        if not self.takes(site):
            return None
        return LoRALinear(self.rank, self.alpha / self.rank, site.features_out, name=name)

    def group(self, path: tuple[str, ...]) -> str:
        return "low_rank"

    def scales(self) -> dict[str, float]:
        return {"lora_b": self.alpha / self.rank}

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"low_rank": 1e-3}
