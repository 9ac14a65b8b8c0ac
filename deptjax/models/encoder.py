"""A text as one vector: an encoder's states of its tokens, pooled.

What is usual differs by family: BERT's first token is trained to stand for the text, sentence encoders are trained on
the mean, and of a causal model only the last token has seen the whole text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.interpreters.partial_eval import dce_jaxpr

from deptjax.errors import UserError
from deptjax.methods.base import EncoderChoice
from deptjax.models.pooling import l2_normalized, pool
from deptjax.typing import Array, Bool, Float, Int, Key, Tree

USUAL = {"bert": "first", "t5": "mean"}  # by family; `last` of all others


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a text becomes a vector: a backbone's module, and the pooling. Holds no parameters."""

    module: nn.Module
    pooling: str
    normalize: bool

    @classmethod
    def of(cls, config: Any, choice: EncoderChoice) -> Encoding:
        """Returns the encoding that `choice` says of a backbone with this config.

        Raises `UserError` for a pooling that the encoder does not have.
        """
        pooling = choice.pooling or USUAL.get(config.family, "last")
        if pooling == "pooled" and not getattr(config, "has_pooler", False):
            raise UserError(
                f"encoder_pooling 'pooled' needs a checkpoint with a pooling layer, and '{choice.name}' has none; take "
                "first, mean or last"
            )
        return cls(config.make(), pooling, bool(choice.normalize))

    def parameters(self, params: Tree) -> Tree:
        """Returns what of an encoder's parameters makes the vectors: no decoder, no head, no pooler that is not read.

        The leaves are those of `params`, arrays or `ShapeDtypeStruct`.
        """
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        traced = jax.make_jaxpr(lambda own: self(own, tokens, mask))(shapes)
        _, used = dce_jaxpr(traced.jaxpr, [True])
        read = traverse_util.flatten_dict(jax.tree.unflatten(jax.tree.structure(shapes), used))
        leaves = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict({path: leaf for path, leaf in leaves.items() if read[path]})

    def __call__(
        self, params: Tree, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], dropout_key: Key | None = None
    ) -> Float[Array, "B H"]:
        """Returns the vectors of texts, padded on the right, in float32; with a `dropout_key` the encoder drops out."""

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.module.apply({"params": params}, *args, **kwargs)

        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        states = run(run(tokens, method="embed"), mask, None, dropout_key is None, method="encode", rngs=rngs)
        pooled = (
            run(states, mask, "pooled", method="pool") if self.pooling == "pooled" else pool(states, mask, self.pooling)
        )
        vectors = pooled.astype(jnp.float32)
        return l2_normalized(vectors) if self.normalize else vectors
