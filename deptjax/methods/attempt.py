"""ATTEMPT: attention over frozen prompts of source tasks, and a prompt of the task's own, anew for each text.

    x^ (D)   = max over the text's tokens of E            p^_j (D) = max over the vectors of P_j
    h (D)    = LayerNorm(W_up silu(W_down x^))            a network that all texts share, without biases
    a_j      = softmax over j of p^_j . h / tau
    P        = P_0 + sum_j a_j P_j                        (M, D); j over the sources 1..S and the task's own, 0
    input    = [P; E]

Asai et al., "ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts", EMNLP 2022,
arXiv 2205.11961. P_0 and the network are trained; the sources, tuned before by prompt tuning, stay as they are. The
temperature is D e, as in the paper; the authors' configuration has 2087, which is that of D = 768.

Parameters: M D + 2 D G + 2 D trained, and S M D that are kept beside them, G being `bottleneck`.
"""

from __future__ import annotations

import math
import os

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.errors import UserError
from deptjax.methods import initializers
from deptjax.methods.base import FIXED, Texts, Vocabulary, register_method
from deptjax.methods.dense import layer_norm
from deptjax.methods.input_method import InputMethod
from deptjax.typing import Array, Bool, Float, Key, Tree


def pooled(embeds: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Returns the greatest value of each dimension over a text's real tokens, in float32."""
    low = jnp.finfo(jnp.float32).min
    return jnp.max(jnp.where(mask[..., None], embeds.astype(jnp.float32), low), axis=1)


def mixed(
    query: Float[Array, "B D"], own: Float[Array, "M D"], sources: Float[Array, "S M D"], temperature: float
) -> Float[Array, "B M D"]:
    """Returns the prompt of each text: its own part, and all prompts by their share of attention.

    >>> own, sources = jnp.ones((1, 2)), jnp.full((3, 1, 2), 5.0)
    >>> mixed(jnp.zeros((1, 2)), own, sources, 1.0)  # attention is even: 1 + (1 + 5 + 5 + 5) / 4
    Array([[[5., 5.]]], dtype=float32)
    """
    prompts = jnp.concatenate([own[None], sources])
    attention = jax.nn.softmax(query @ jnp.max(prompts, axis=1).T / temperature, axis=-1)
    return own[None] + jnp.einsum("bs,smd->bmd", attention, prompts)


@register_method
class ATTEMPT(InputMethod):
    """Attention over source prompts.

    Attributes:
      prompt_length: M, vectors of each prompt; that of the source prompts.
      sources: folders of the source prompts, a list of them or one text with commas; a saved prompt of this method has
        them in itself.
      bottleneck: G, the hidden width of the network that makes the query.
      temperature: tau; `None` takes D e.
      prompt_init: start from text, vocab (sampled), labels, random numbers (random), or a saved prompt's folder.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
    """

    kind = "attempt"
    paper = (
        "Asai et al., ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts, EMNLP"
        " 2022, arXiv 2205.11961"
    )
    formula = "M D + 2 D G + 2 D"
    free_size = "bottleneck"
    letters = {"M": "prompt_length", "G": "bottleneck"}
    by_instance = True
    starts_plain = False
    free = ("prompt_init", "prompt_text")

    prompt_length: int = 100
    sources: str = ""
    bottleneck: int = 100
    temperature: float | None = None
    prompt_init: str = "vocab"
    prompt_text: str = initializers.DEFAULT_TEXT

    def __post_init__(self) -> None:
        places = self.sources if isinstance(self.sources, (list, tuple)) else [self.sources]
        for place in places:
            if not isinstance(place, (str, os.PathLike)):
                raise UserError(f"{self.kind}: sources is or holds a {type(place).__name__}; name folders, a,b,c")
        self.sources = ",".join(map(os.fspath, places))
        self.check_types()
        self.check_positive("prompt_length", "bottleneck")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"{self.kind}: temperature is {self.temperature}; it must be above 0, and finite")
        if not self.places:
            raise UserError(f"{self.kind}: sources is empty; name the folders of prompts of other tasks, a,b,c")
        super().__post_init__()

    @classmethod
    def typical(cls) -> ATTEMPT:
        return cls(sources="mnli,qnli,qqp,sst2,squad,record")  # the authors' tasks

    @property
    def places(self) -> list[str]:
        """The folders of the source prompts."""
        return [place.strip() for place in self.sources.split(",") if place.strip()]

    def stacked_by(self, name: str) -> object:
        # A saved prompt has its sources in itself; where they lay does not matter.
        return len(self.places) if name == "sources" else super().stacked_by(name)

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "B M D"], Array]:
        """Returns each text's prompt and the embeddings as they came."""
        width = embeds.shape[-1]
        down, up = nn.initializers.normal(0.02), nn.initializers.normal(0.02)
        own = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, width))
        sources = self.param("sources", nn.initializers.zeros, (len(self.places), self.prompt_length, width))
        hidden = pooled(embeds, texts.mask) @ self.param("w_down", down, (width, self.bottleneck))
        query = nn.silu(hidden) @ self.param("w_up", up, (self.bottleneck, width))
        scale = self.param("norm_scale", nn.initializers.ones, (width,))
        query = layer_norm(query, scale, self.param("norm_bias", nn.initializers.zeros, (width,)))
        temperature = width * math.e if self.temperature is None else self.temperature
        return mixed(query, own, jax.lax.stop_gradient(sources), temperature).astype(embeds.dtype), embeds

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        loaded = [self._source(place, vocabulary) for place in self.places]
        return {**super().initialize(key, params, vocabulary), "sources": jnp.stack(loaded)}

    @nn.nowrap
    def _source(self, place: str, vocabulary: Vocabulary) -> Array:
        try:
            prompt = initializers.saved_prompt(place, vocabulary, alone=True)
        except UserError as error:
            raise UserError(f"{self.kind}: sources: {error}") from None
        if len(prompt) != self.prompt_length:
            raise UserError(
                f"{self.kind}: sources: {place} has {len(prompt)} vectors, and prompt_length is {self.prompt_length}; "
                "give it the length that all source prompts have"
            )
        return prompt

    def group(self, path: tuple[str, ...]) -> str:
        return FIXED if path[-1] == "sources" else super().group(path)

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr, "low_rank": min(1e-3, prompt_lr)}
