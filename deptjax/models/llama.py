"""The LLaMA family: Llama 1, 2, 3, 3.1 and later, SmolLM2, TinyLlama, Mistral without its window.

    x = x + out(attention(rope(q), rope(k), v))      of RMSNorm(x), causal, grouped-query
    x = x + down(silu(gate(y)) * up(y))              of y = RMSNorm(x)

Touvron et al. 2023 (arXiv 2302.13971 and 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783). What it has in common
with other causal models is in `deptjax.models.causal`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn

from deptjax.methods.base import NO_SITES, Sites
from deptjax.models import layers
from deptjax.models.causal import CausalModel, Placed
from deptjax.models.config import BackboneConfig
from deptjax.models.rope import RopeScaling, rope_angles, rope_frequencies
from deptjax.typing import Array


@dataclasses.dataclass(frozen=True)
class LlamaConfig(BackboneConfig):
    """The shape of a LLaMA-family model."""

    family: ClassVar[str] = "llama"
    prompt_lr_ratio: ClassVar[float] = 0.03  # see Backbone.prompt_lr
    dropout_rate: ClassVar[float] = 0.0

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False

    @property
    def context(self) -> int | None:
        """The positions that the model was made for: prompt, source and targets together."""
        return self.max_positions

    def make(self, sites: Sites = NO_SITES) -> Llama:
        """Returns the Linen module with these sites filled."""
        return Llama(self, sites)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig
    sites: Sites

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def linear(name: str, features: int) -> layers.Linear:
            return layers.Linear(features, f"mlp/{name}", self.sites, name=name)

        gate, up = linear("gate", self.config.mlp_dim), linear("up", self.config.mlp_dim)
        return linear("down", self.config.width)(nn.silu(gate(x)) * up(x))


class Llama(CausalModel):
    """The backbone. It has no dropout, so `deterministic` changes nothing; positions are angles of queries and keys."""

    norm: ClassVar[type[nn.Module]] = layers.RMSNorm
    mlp: ClassVar[type[nn.Module]] = MLP

    def placed(self, x: Array, positions: Array, deterministic: bool = True) -> Placed:
        """Returns the stream as it is, and the angles of its positions."""
        return Placed(x, rope_angles(positions, rope_frequencies(self.config)))
