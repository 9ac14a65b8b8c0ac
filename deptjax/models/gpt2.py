"""The GPT-2 family: GPT-2 small to XL, DistilGPT2, and models trained in its shape.

    x = wte[token] + wpe[position]
    x = x + out(attention(q, k, v))                  of LayerNorm(x), causal
    x = x + down(gelu(up(y)))                        of y = LayerNorm(x)

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Projections and norms have biases, the head
is the embedding. Query, key and value are one matrix in the published files and three here, so that a method that names
`attention/query` means what it means elsewhere. What it has in common with other causal models is in
`deptjax.models.causal`.

Positions are absolute: a prompt's vectors stand at 0 .. M-1, the text behind them, and each is given the vector of its
position, a prompt's vector as a token's.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn

from deptjax.methods.base import NO_SITES, Sites
from deptjax.models import layers
from deptjax.models.causal import CausalModel, Placed
from deptjax.models.config import EvenHeads, check_activation
from deptjax.typing import Array


@dataclasses.dataclass(frozen=True)
class GPT2Config(EvenHeads):
    """The shape of a GPT-2-family model.

    `dropout_rate` is that of the embedded text, of the attention weights and of the result of each sub-layer.
    """

    family: ClassVar[str] = "gpt2"
    prompt_lr_ratio: ClassVar[float] = 0.03  # see Backbone.prompt_lr

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int = 1024
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    tied: bool = True
    dropout_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.family, self.activation)

    @property
    def context(self) -> int | None:
        """The positions that the model has vectors for: prompt, source and targets together."""
        return self.max_positions

    def make(self, sites: Sites = NO_SITES) -> GPT2:
        """Returns the Linen module with these sites filled."""
        return GPT2(self, sites)


class GPT2(CausalModel):
    """The backbone. With `deterministic=False` a prompt that rows share is dropped out once a batch, alike for all."""

    norm: ClassVar[type[nn.Module]] = layers.LayerNorm
    mlp: ClassVar[type[nn.Module]] = layers.MLP
    biases: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.position_embedder = layers.PositionEmbedding(self.config.max_positions, self.config.width)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def placed(self, x: Array, positions: Array, deterministic: bool = True) -> Placed:
        """Returns the stream with the vectors of its positions added, and no angles."""
        vectors = self.position_embedder(positions, x.dtype)
        vectors = vectors.reshape((1,) * (x.ndim - vectors.ndim) + vectors.shape)
        return Placed(self.dropout(x + vectors, deterministic=deterministic), None)
