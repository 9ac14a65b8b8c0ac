"""What the configs of all backbones have in common: how a function is computed, whichever function it is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from deptjax.errors import UserError, nearest
from deptjax.models.fused_attention import check_name
from deptjax.models.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The part of a backbone's config that does not say which function it is.

    A family adds the sizes of its shape, `context` (the positions that a prompt, its text and targets may take
    together, or `None`) and `make(sites)` (the Linen module).

    Attributes:
      scan_layers: whether layers are stacked, and one program runs for all of them.
      remat: what a layer keeps for a gradient, one of `deptjax.models.remat.REMAT`.
      dtype: of the computation.
      attention: one of `fused_attention.IMPLEMENTATIONS`.
      quantize: the scheme of kernels (`deptjax.quantization`), `None` for none.

    Raises `UserError` for an attention that does not exist.
    """

    family: ClassVar[str]
    is_encoder_decoder: ClassVar[bool] = False
    is_masked: ClassVar[bool] = False
    prompt_lr_ratio: ClassVar[float]  # see Backbone.prompt_lr

    scan_layers: bool = False
    remat: str = "none"
    dtype: str = "float32"
    attention: str = "auto"
    quantize: str | None = None

    def __post_init__(self) -> None:
        check_name(self.family, self.attention)

    @property
    def is_causal(self) -> bool:
        """Whether no token sees those behind it; a prompt is then read before the texts, and others with each."""
        return not (self.is_encoder_decoder or self.is_masked)


class EvenHeads(BackboneConfig):
    """A config whose heads share the width evenly, and which has as many of keys and values as of queries.

    Raises `UserError` for a width that the heads do not divide.
    """

    width: int
    num_heads: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            told = f"num_heads {self.num_heads} does not divide width {self.width}"
            raise UserError(f"{self.family}: {told}; correct one of them")

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values: as many as of queries."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """H, the width of a head."""
        return self.width // self.num_heads


def check_activation(family: str, activation: str) -> None:
    """Raises `UserError` for the name of an activation that is not one of `layers.ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        known, hint = ", ".join(ACTIVATIONS), nearest(activation, ACTIVATIONS)
        raise UserError(f"{family}: activation '{activation}' is not known; use one of: {known}.{hint}")
