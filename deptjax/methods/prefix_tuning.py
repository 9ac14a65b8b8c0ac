"""Prefix tuning: P trained keys and values in front of those of each attention layer.

    attention(q) = softmax(scale * q [K_P; K]^T) [V_P; V]        K_P, V_P (P, K, H) trained, one pair a layer

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv 2101.00190. By default
they are trained directly, as P-tuning v2 does (Liu et al., ACL 2022, arXiv 2110.07602). The keys are attended to as
they are: no rotary embedding is applied to them, no relative bias is added to their scores, and the positions of the
text do not change.

With `hidden` one network makes them for all layers, as Li and Liang train them:

    S = tanh(Q W1 + b1)                         (P, F); Q (P, D), W1 (D, F)
    [K_P; V_P] of layer l = S W2_l + b2_l       W2_l (F, 2 K H)

Q starts from N(0, 1), the linear layers as torch's do; after training only K_P and V_P are saved. The authors write
the W2_l side by side as one matrix. On T5 the attention of all three kinds reads the same S (for BART they have a
network for each kind).
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deptjax.methods import initializers
from deptjax.methods.base import COMMON, AttentionSite, Filled, Method, Sites, Texts, register_method
from deptjax.methods.dense import dense
from deptjax.methods.in_common import in_place_of
from deptjax.methods.targets import TargetedMethod
from deptjax.typing import Array, Float, Tree

STATES = "states"  # what stands beside each layer of what is made in common

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


class PrefixNetwork(nn.Module):
    """The part of the network that all layers have in common; it leaves the input as it is.

    Attributes:
      length: P.
      hidden: F, the hidden width.
    """

    length: int
    hidden: int

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[None, Float[Array, "B T D"]]:
        """Returns no prompt, and the embeddings as they came."""
        width = embeds.shape[-1]
        into = initializers.uniform_within(1.0 / math.sqrt(width))
        self.param("vectors", nn.initializers.normal(1.0), (self.length, width))
        self.param("w1", into, (width, self.hidden))
        self.param("b1", into, (self.hidden,))
        return None, embeds


def prefix_states(vectors: Float[Array, "P D"], w1: Float[Array, "D F"], b1: Float[Array, "F"]) -> Float[Array, "P F"]:
    """Returns S, what the layers make their keys and values of: `tanh(vectors @ w1 + b1)`."""
    return jnp.tanh(dense(vectors, w1, b1))


def made_prefix(
    states: Float[Array, "P F"], w2: Float[Array, "F 2 K H"], b2: Float[Array, "2 K H"]
) -> tuple[Float[Array, "P K H"], Float[Array, "P K H"]]:
    """Returns a layer's keys and values: `states @ w2 + b2`."""
    made = jnp.einsum("pf,fckh->cpkh", states, w2)
    keys, values = made + jnp.broadcast_to(b2[:, None], made.shape)
    return keys, values


class MadePrefix(nn.Module):
    """What makes the keys and values of one layer out of S.

    Attributes:
      length: P.
      num_heads: K, the layer's key and value heads.
      head_dim: H.
      hidden: F, the hidden width.
    """

    length: int
    num_heads: int
    head_dim: int
    hidden: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "P K H"], Float[Array, "P K H"]]:
        """Returns the keys and the values, which every row and every query attends to."""
        heads, out = (self.num_heads, self.head_dim), initializers.uniform_within(1.0 / math.sqrt(self.hidden))
        w2 = self.param("w2", out, (self.hidden, 2, *heads))
        b2 = self.param("b2", out, (2, *heads))
        states = jnp.zeros((self.length, self.hidden))
        return made_prefix(states if self.is_initializing() else self.get_variable(COMMON, STATES), w2, b2)


def folded_prefixes(tree: Tree, states: Float[Array, "P F"]) -> Tree:
    """Returns a tree of sites, stacked over layers or not, with keys and values in the place of what makes them."""
    if not isinstance(tree, dict):
        return tree
    if "w2" not in tree:
        return {name: folded_prefixes(node, states) for name, node in tree.items()}
    made = made_prefix if tree["b2"].ndim == 3 else jax.vmap(made_prefix, in_axes=(None, 0, 0))
    keys, values = made(states, jnp.asarray(tree["w2"]), jnp.asarray(tree["b2"]))
    return {"keys": np.asarray(keys), "values": np.asarray(values)}


@register_method
@dataclasses.dataclass(frozen=True)
class PrefixTuning(TargetedMethod):
    """Trained keys and values in the attention layers whose path matches `targets`.

    Attributes:
      prefix_length: P, trained positions a layer.
      targets: a regular expression searched for in the path of an attention layer: `attention` (LLaMA),
        `encoder/attention`, `decoder/self_attention`, `decoder/encoder_decoder_attention` (T5). The default takes all.
      hidden: the hidden width of the reparametrisation; `None` trains keys and values directly.
    """

    kind = "prefix_tuning"
    paper = "Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021, arXiv 2101.00190"
    formula = "2 P K H for each attention layer"
    free_size = "prefix_length"
    letters = {"P": "prefix_length"}
    starts_plain = False
    more_sizes = ("prefix_length", "hidden")

    prefix_length: int = 20
    targets: str = "attention$"
    hidden: int | None = None

    def sites(self) -> Sites:
        common = None if self.hidden is None else PrefixNetwork(self.prefix_length, self.hidden)
        return Sites(input=common, attention=Filled(self))

    def fill(self, site: AttentionSite, name: str) -> nn.Module | None:
        """Returns the prefix of an attention layer, or `None` when `targets` does not match its path."""
        if not self.takes(site):
            return None
        if self.hidden is None:
            return Prefix(self.prefix_length, site.num_heads, site.head_dim, name=name)
        return MadePrefix(self.prefix_length, site.num_heads, site.head_dim, self.hidden, name=name)

    def common(self, trainable: Tree) -> Tree:
        if self.hidden is None:
            return {}
        return in_place_of(trainable["backbone"], "w2", {STATES: self._states(trainable)})

    def _states(self, trainable: Tree) -> Array:
        return prefix_states(*(jnp.asarray(trainable["input"][name]) for name in ("vectors", "w1", "b1")))

    def fold(self, trainable: Tree) -> tuple[Method, Tree]:
        if self.hidden is None:
            return self, trainable
        folded = folded_prefixes(trainable["backbone"], self._states(trainable))
        return dataclasses.replace(self, hidden=None), {"backbone": folded}

    def group(self, path: tuple[str, ...]) -> str:
        return "prompt" if path[-1] in ("keys", "values", "vectors") else "low_rank"

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        # Keys and values live on the scale of a layer's own, not of the embeddings; 1e-2 is P-tuning v2's usual rate.
        return {"prompt": 1e-2} if self.hidden is None else {"prompt": 1e-2, "low_rank": 1e-3}
