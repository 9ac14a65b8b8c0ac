"""Residual prompt tuning: a soft prompt and a small network beside it, which is added in and then thrown away.

    P' = P + MLP(P)        MLP(p) = LayerNorm(relu(p W1 + b1) W2 + b2)
    input = [P'; E]

Razdaibiedina et al., "Residual Prompt Tuning: Improving Prompt Tuning with Residual Reparameterization", ACL Findings
2023, arXiv 2305.03937. One network for all M vectors, or one each; with or without the norm, as in the authors' code.
Linear layers start as torch's do. The norm's scale starts from the size of the backbone's embeddings (at most 1, the
authors'), so that P' begins among them. After training P' is worked out, and saved as a prompt of prompt tuning.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.methods import initializers
from deptjax.methods.base import Vocabulary, register_method
from deptjax.methods.dense import dense, layer_norm
from deptjax.methods.reparametrised import ReparametrisedPrompt
from deptjax.typing import Array, Float, Key, Tree


def residual_mlp(
    prompt: Float[Array, "*M D"],
    w1: Float[Array, "D H"],
    b1: Float[Array, "H"],
    w2: Float[Array, "H D"],
    b2: Float[Array, "D"],
    norm: tuple[Float[Array, "D"], Float[Array, "D"]] | None = None,
) -> Float[Array, "*M D"]:
    """Returns `relu(prompt @ w1 + b1) @ w2 + b2`, and its LayerNorm where there is a `norm`, (scale, bias)."""
    made = dense(nn.relu(dense(prompt, w1, b1)), w2, b2)
    return made if norm is None else layer_norm(made, *norm)


@register_method
class ResidualPromptTuning(ReparametrisedPrompt):
    """Residual prompt tuning.

    Attributes:
      prompt_length: M, vectors in front of the text.
      prompt_init: start from text, vocab (sampled), labels, random numbers (random), or a saved prompt's folder.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
      bottleneck: H, the hidden width of the network.
      separate: a network for each vector instead of one for all.
      norm: whether the network ends in a LayerNorm.
    """

    kind = "residual_prompt_tuning"
    paper = "Razdaibiedina et al., Residual Prompt Tuning, ACL Findings 2023, arXiv 2305.03937"
    formula = "M D + 2 D H + H + 3 D"
    free_size = "bottleneck"
    letters = {"M": "prompt_length", "H": "bottleneck"}
    more_sizes = ("prompt_length", "bottleneck")

    prompt_length: int = 10
    bottleneck: int = 400
    separate: bool = False
    norm: bool = True

    @nn.compact
    def made_prompt(self, width: int) -> Float[Array, "M D"]:
        """Returns `P + MLP(P)` (M, D), float32."""
        each = (self.prompt_length,) if self.separate else ()
        into, out = (initializers.uniform_within(1.0 / math.sqrt(n)) for n in (width, self.bottleneck))
        prompt = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, width))
        w1 = self.param("w1", into, (*each, width, self.bottleneck))
        b1 = self.param("b1", into, (*each, self.bottleneck))
        w2 = self.param("w2", out, (*each, self.bottleneck, width))
        b2 = self.param("b2", out, (*each, width))
        norm = None
        if self.norm:
            scale = self.param("norm_scale", nn.initializers.ones, (*each, width))
            norm = scale, self.param("norm_bias", nn.initializers.zeros, (*each, width))
        network = jax.vmap(residual_mlp) if self.separate else residual_mlp
        return prompt + network(prompt, w1, b1, w2, b2, norm)

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        params = super().initialize(key, params, vocabulary)
        if self.norm:
            size = jnp.minimum(initializers.embedding_rms(vocabulary.embedding), 1.0)
            params = {**params, "norm_scale": size * params["norm_scale"]}
        return params

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr, "low_rank": min(1e-3, prompt_lr)}
