"""What methods of the `input` site have in common: a prompt in front of embeddings, and its mask."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from deptjax.methods import initializers
from deptjax.methods.base import Method, Sites, Texts, Vocabulary
from deptjax.typing import Array, Bool, Float, Key, Tree


class InputMethod(Method, nn.Module):
    """A method that is itself the Linen module of the `input` site. Subclasses define `streams`.

    What is here fits a method with a prompt of `prompt_length` vectors, whose parameters have names that begin with
    `prompt`, and which starts as `prompt_init` and `prompt_text` say.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Linen would take a saved prompt's method, which is made while parameters start, for a part of this module.
        if "initialize" in cls.__dict__:
            nn.nowrap(cls.__dict__["initialize"])
        super().__init_subclass__(**kwargs)

    def __post_init__(self) -> None:
        self.check_sizes()
        super().__post_init__()

    def sites(self) -> Sites:
        return Sites(input=self)

    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Array | None, Float[Array, "B T D"]]:
        """Returns `(prompt, embeds)`: a prompt (M, D) that all rows share, or (B, M, D), and the changed embeddings."""
        raise NotImplementedError

    def __call__(
        self, embeds: Float[Array, "B T D"], mask: Bool[Array, "B T"], encoding: Float[Array, "B H"] | None = None
    ) -> tuple[Float[Array, "B M+T D"], Bool[Array, "B M+T"]]:
        """Returns the embeddings with the prompt in front, and the mask to match.

        For use with anybody's model. Text may be padded on either side: a token's place is counted by `mask`.
        `encoding` is what an encoder makes of each text, for a method that asks for one.
        """
        positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
        prompt, embeds = self.streams(embeds, Texts(mask, positions, encoding))
        if prompt is None:
            return embeds, mask
        prompt = jnp.broadcast_to(prompt, (embeds.shape[0], *prompt.shape[-2:]))
        ones = jnp.ones(prompt.shape[:2], mask.dtype)
        return jnp.concatenate([prompt, embeds], axis=1), jnp.concatenate([ones, mask], axis=1)

    @nn.nowrap
    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        length = params["prompt"].shape[0]
        start = initializers.initial_prompt(self.prompt_init, self.prompt_text, key, length, vocabulary)
        return {**params, "prompt": start}

    @nn.nowrap
    def soft_prompt(self, trainable: Tree, width: int) -> Array | None:
        if self.by_instance:
            return None
        embeds, params = jnp.zeros((1, 0, width)), {"params": trainable["input"]}
        fill: Any = self.resolve(width).sites().input
        prompt, _ = fill.apply(params, embeds, Texts.whole(embeds), method="streams")
        return prompt  # type: ignore[no-any-return]

    def group(self, path: tuple[str, ...]) -> str:
        return "prompt" if path[-1].startswith("prompt") else "low_rank"

    def positions_in_front(self) -> int:
        return int(self.prompt_length)
