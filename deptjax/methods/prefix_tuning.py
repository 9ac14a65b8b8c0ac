"""Prefix tuning: P trained keys and values in front of those of each attention layer.

    attention(q) = softmax(scale * q [K_P; K]^T) [V_P; V]        K_P, V_P (P, K, H) trained, one pair a layer

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv 2101.00190; trained
directly, without their reparametrisation, as P-tuning v2 does (Liu et al., ACL 2022, arXiv 2110.07602). The keys are
attended to as they are: no rotary embedding is applied to them, no relative bias is added to their scores, and the
positions of the text do not change.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn

from deptjax.errors import UserError
from deptjax.methods.base import AttentionSite, Sites, register_method
from deptjax.methods.targets import TargetedMethod
from deptjax.typing import Array, Float

# Small, so that at first a layer's output is little more than scaled down by the attention that the prefix draws.
INIT_SCALE = 0.02


class Prefix(nn.Module):
    """What prefix tuning puts beside the keys and values of one layer.

    Attributes:
      length: P.
      num_heads: K, the layer's key and value heads.
      head_dim: H.
    """

    length: int
    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "P K H"], Float[Array, "P K H"]]:
        """Returns the keys and the values, which every row and every query attends to."""
        shape = (self.length, self.num_heads, self.head_dim)
        start = nn.initializers.normal(INIT_SCALE)
        return self.param("keys", start, shape), self.param("values", start, shape)


@register_method
@dataclasses.dataclass(frozen=True)
class PrefixTuning(TargetedMethod):
    """Trained keys and values in the attention layers whose path matches `targets`.

    Attributes:
      prefix_length: P, trained positions a layer.
      targets: a regular expression searched for in the path of an attention layer: `attention` (LLaMA),
        `encoder/attention`, `decoder/self_attention`, `decoder/encoder_decoder_attention` (T5). The default takes all.
    """

    kind = "prefix_tuning"
    starts_plain = False

    prefix_length: int = 20
    targets: str = "attention$"

    def __post_init__(self) -> None:
        if self.prefix_length < 1:
            raise UserError(f"prefix_tuning: prefix_length is {self.prefix_length}; it must be at least 1")
        super().__post_init__()

    def sites(self) -> Sites:
        return Sites(attention=self.fill)

    def fill(self, site: AttentionSite, name: str) -> nn.Module | None:
        """Returns the prefix of an attention layer, or `None` when `targets` does not match its path."""
        if not self.takes(site):
            return None
        return Prefix(self.prefix_length, site.num_heads, site.head_dim, name=name)

    def group(self, path: tuple[str, ...]) -> str:
        return "prompt"

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        # Keys and values live on the scale of a layer's own, not of the embeddings; 1e-2 is P-tuning v2's usual rate.
        return {"prompt": 1e-2}
