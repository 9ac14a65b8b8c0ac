"""P-tuning: a soft prompt that a network makes of trained vectors, an MLP or a bidirectional LSTM.

    P = net(Q)        Q (M, D) trained vectors, one a place in the prompt
    input = [P; E]

    mlp     net(q) = relu(relu(q W1 + b1) W2 + b2) W3 + b3                          each vector by itself
    lstm    net(Q) = relu(S W1 + b1) W2 + b2,   S = [forward; backward](Q)          the vectors see each other

Liu et al., "GPT Understands, Too", 2021, arXiv 2103.10385, with the networks that HF peft has; here the prompt stands
in front of the text. Q starts from N(0, 1) and the layers as torch's do, so at first the prompt is what the network
makes of its start, and resembles no text. After training P is worked out, and saved as a prompt of prompt tuning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.methods import initializers
from deptjax.methods.base import Vocabulary, register_method
from deptjax.methods.dense import dense
from deptjax.methods.reparametrised import ReparametrisedPrompt
from deptjax.typing import Array, Float, Key, Tree

NETWORKS = ("lstm", "mlp")
Layer = tuple[Array, Array, Array]  # of an LSTM: weights of the input (I, 4H), of the state (H, 4H), and bias (4H,)


def lstm(x: Float[Array, "M I"], layer: Layer, reverse: bool = False) -> Float[Array, "M H"]:
    """Returns the states of an LSTM over a sequence, from the first to the last, or the other way round.

    Gates lie side by side as torch has them: input, forget, cell, output. Hochreiter and Schmidhuber 1997; its state
    starts from 0.
    """
    w_input, w_state, bias = layer
    inputs = dense(x, w_input, bias)

    def step(carry: tuple[Array, Array], from_input: Array) -> tuple[tuple[Array, Array], Array]:
        state, cell = carry
        i, f, g, o = jnp.split(from_input + state @ w_state, 4)
        cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
        state = nn.sigmoid(o) * jnp.tanh(cell)
        return (state, cell), state

    nothing = jnp.zeros(w_state.shape[0], x.dtype)
    return jax.lax.scan(step, (nothing, nothing), inputs, reverse=reverse)[1]


def mlp(x: Float[Array, "*M I"], *layers: tuple[Array, Array]) -> Float[Array, "*M O"]:
    """Returns what linear layers, each (weight, bias), make of `x`, with a relu between them."""
    for weight, bias in layers[:-1]:
        x = nn.relu(dense(x, weight, bias))
    return dense(x, *layers[-1])


@register_method
class PTuning(ReparametrisedPrompt):
    """P-tuning.

    Attributes:
      prompt_length: M, vectors in front of the text.
      prompt_init: `random` draws the trained vectors from N(0, 1); else what the network is given at first: text, vocab
        (sampled), labels, or a saved prompt's folder.
      prompt_text: the text that they start from, with `prompt_init="text"`.
      network: what makes the prompt: mlp (three linear layers) or lstm (bidirectional, then two linear layers).
      hidden: H, the network's hidden width; `None` is that of the embeddings.
      num_layers: of the lstm.
    """

    kind = "p_tuning"
    paper = "Liu et al., GPT Understands, Too, 2021, arXiv 2103.10385"
    formula = "M D + 2 D H + H H + 2 H + D"
    free_size = "hidden"
    letters = {"M": "prompt_length", "H": "hidden"}
    more_sizes = ("prompt_length", "hidden", "num_layers")

    prompt_length: int = 20
    prompt_init: str = "random"
    network: str = "mlp"
    hidden: int | None = None
    num_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in NETWORKS:
            known = " or ".join(NETWORKS)
            raise UserError(f"p_tuning: network '{self.network}' is not {known}.{nearest(self.network, NETWORKS)}")

    def resolve(self, width: int) -> PTuning:
        return self.clone(hidden=width) if self.hidden is None else self

    @nn.compact
    def made_prompt(self, width: int) -> Float[Array, "M D"]:
        """Returns `net(Q)` (M, D), float32."""
        hidden = self.hidden or width
        x = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, width))
        if self.network == "mlp":
            return mlp(x, *self._linear(width, hidden, hidden, width))
        for i in range(self.num_layers):
            ways = [lstm(x, self._lstm(f"lstm{i}_{way}", x.shape[-1], hidden), way == "back") for way in ("on", "back")]
            x = jnp.concatenate(ways, axis=-1)
        return mlp(x, *self._linear(2 * hidden, 2 * hidden, width))

    def _linear(self, *widths: int) -> list[tuple[Array, Array]]:
        """Returns the parameters of linear layers between these widths."""
        layers = []
        for i, (features_in, features_out) in enumerate(itertools.pairwise(widths), start=1):
            start = initializers.uniform_within(1.0 / math.sqrt(features_in))
            weight = self.param(f"w{i}", start, (features_in, features_out))
            layers.append((weight, self.param(f"b{i}", start, (features_out,))))
        return layers

    def _lstm(self, name: str, features_in: int, hidden: int) -> Layer:
        """Returns the parameters of one direction of one layer; the bias is the sum of torch's two."""
        start: Callable[..., Array] = initializers.uniform_within(1.0 / math.sqrt(hidden))

        def summed(key: Key, shape: tuple[int, ...]) -> Array:
            return start(key, (2, *shape)).sum(axis=0)

        return (
            self.param(f"{name}_input", start, (features_in, 4 * hidden)),
            self.param(f"{name}_state", start, (hidden, 4 * hidden)),
            self.param(f"{name}_bias", summed, (4 * hidden,)),
        )

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        return params if self.prompt_init == "random" else super().initialize(key, params, vocabulary)

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": 1e-2, "low_rank": 1e-3}  # what they move are numbers of a network, on no scale of embeddings
