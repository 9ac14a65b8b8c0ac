"""The one place where a method meets a backbone.

    embeds         = backbone.embed(source)
    prompt, embeds = method.streams(embeds)                       the input site, if it is filled
    states         = backbone.target_states(embeds, prompt, ...)  the inner sites act in here
    logits         = backbone.head(states)

Parameters come as two trees. `frozen` is the backbone; `trainable` is the method: `{"input": ...}` for what fills the
input site, `{"backbone": ...}` for what lies inside the backbone's own tree. They are merged here and nowhere else, so
gradients can be taken of `trainable` alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from deptjax.errors import UserError
from deptjax.methods.base import COMMON, ENCODER, SITE, Method, Texts, Vocabulary, input_parameters
from deptjax.models.backbone import Backbone
from deptjax.models.encoder import Encoding
from deptjax.quantization import any_quantized
from deptjax.typing import Array, Bool, Float, Int, Key, Tokens, Tree


def merge_trees(frozen: Tree, inner: Tree) -> Tree:
    """Returns the nested dict `frozen` with the leaves of `inner` added to it.

    >>> merge_trees({"a": {"kernel": 1}}, {"a": {"site": 2}})
    {'a': {'kernel': 1, 'site': 2}}
    """
    if not isinstance(inner, dict) or not isinstance(frozen, dict):
        return inner
    return {**frozen, **{key: merge_trees(frozen.get(key, {}), value) for key, value in inner.items()}}


def site_leaves(params: Tree, shared: tuple[str, ...] = ()) -> Tree:
    """Returns the part of a backbone's tree that belongs to what fills its sites, without what these have in common."""
    if not isinstance(params, dict):
        return {}

    def kept_of(key: str, node: Tree) -> Tree:
        if key == SITE or key.endswith(f"_{SITE}"):
            return {name: leaf for name, leaf in node.items() if name not in shared}
        return site_leaves(node, shared)

    kept = {key: kept_of(key, node) for key, node in params.items()}
    return {key: value for key, value in kept.items() if not isinstance(value, dict) or value}


def left_aligned(tokens: Tokens, mask: Array) -> tuple[Array, Array]:
    """Returns tokens and mask with each row's real tokens moved to the front, in order.

    After this a token's column is its place in its own text, whichever side the batch was padded on.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


def check_context(backbone: Backbone, method: Method, source_length: int, target_length: int) -> None:
    """Raises `UserError` when prompt, source and targets do not fit the positions that a backbone has.

    What fills a mask takes no position of its own.
    """
    target_length = 0 if backbone.config.is_masked else target_length
    context, prompt_length = backbone.config.context, method.positions_in_front()
    total = prompt_length + source_length + target_length
    if context is not None and total > context:
        raise UserError(
            f"{prompt_length} prompt vectors, max_length {source_length} and targets of {target_length} tokens are "
            f"{total} positions, and '{backbone.name}' has {context}; lower prompt_length or max_length"
        )


def check_parameters(backbone: Backbone, method: Method, trainable: Tree, where: str) -> None:
    """Raises `UserError`, naming the tensor, for parameters that are not those of `method` on `backbone`.

    `where` is what the message calls the place that they come from.
    """
    try:
        method = method.resolve(backbone.width)
        if method.tunes_backbone:
            wanted = _shapes({"backbone": backbone.params})
        else:
            wanted = _parameter_shapes(backbone.config, method)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, ValueError) as error:  # fields of a card that somebody edited may hold anything
        told = " ".join(str(error).split())
        raise UserError(f"{where}: method '{method.kind}' cannot be made of its fields: {told}") from None
    actual = _shapes(trainable)
    for name in wanted | actual:
        if actual.get(name) != wanted.get(name):
            told = f"has shape {actual[name]}" if name in actual else "is missing"
            expected = wanted.get(name, "no such tensor")
            raise UserError(f"{where}: tensor '{name}' {told}, expected {expected} for '{backbone.name}'")


@functools.lru_cache(maxsize=64)
def _parameter_shapes(config: Any, method: Method) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a method's parameters by name; kept, since a server adds many prompts of one method."""
    return _shapes(PromptedModel(config.make(method.sites()), method).shapes(config.width))


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


class RowCache(NamedTuple):
    """What decoding keeps of one text: the backbone's cache, and the prompt's front where `start` had to make it."""

    front: Any
    backbone: Any


@dataclasses.dataclass(frozen=True)
class PromptedModel:
    """A backbone's module with a method in its sites. Holds no parameters: every function takes both trees.

    Attributes:
      module: the backbone's Linen module, its sites filled.
      method: the method, resolved for the width of the backbone.
      encoding: how a tuned encoder's weights make a vector of each text; `None` where the vectors are given.
      share_prompt: in training on causal backbones, compute a prompt that is the same for all rows once a batch;
        `False` puts a copy in front of each row. Same result without dropout, more work: kept for comparison.
    """

    module: nn.Module
    method: Method
    share_prompt: bool = True
    encoding: Encoding | None = None

    @classmethod
    def build(
        cls, backbone: Backbone, method: Method, share_prompt: bool = True, encoding: Encoding | None = None
    ) -> PromptedModel:
        """Returns the model of a backbone and a method; the method's open fields are resolved."""
        method = method.resolve(backbone.width)
        return cls(backbone.module(method.sites()), method, share_prompt, encoding)

    def init(self, key: Key, frozen: Tree, vocabulary: Vocabulary, encoder: Tree | None = None) -> tuple[Tree, Tree]:
        """Returns the first `trainable`, and what stays in `frozen`; `encoder` has the weights of one that is tuned.

        Only the method's parameters are made; the frozen tree is neither copied nor made again.
        """
        input_key, inner_key, start_key = jax.random.split(key, 3)
        if self.method.tunes_backbone:
            if any_quantized(frozen):
                raise UserError(
                    f"method '{self.method.kind}' trains every weight, which quantised ones are not for; leave out"
                    " quantize (--quantize), or take a method that trains beside the weights"
                )
            # In float32 whatever the backbone computes in: small updates of bfloat16 weights round to nothing.
            return {"backbone": jax.tree.map(lambda a: a.astype(jnp.float32), frozen)}, {}
        trainable = self._parameters(input_key, inner_key, vocabulary.embedding.shape[1])
        if not trainable or (self.method.sites().inner and "backbone" not in trainable):
            targets = getattr(self.method, "targets", None)
            asked = "" if targets is None else f", where its targets are {targets}"
            raise UserError(f"method '{self.method.kind}' fills no site of this backbone: check its targets{asked}")
        trainable = self.method.start(start_key, trainable, vocabulary)
        if encoder is not None:
            if any_quantized(encoder):
                raise UserError(
                    f"method '{self.method.kind}': encoder_trainable tunes every weight of the encoder, which quantised"
                    " ones are not for; leave out quantize (--quantize), or name an encoder of its own"
                )
            assert self.encoding is not None
            read = self.encoding.parameters(encoder)
            trainable[ENCODER] = jax.tree.map(lambda a: a.astype(jnp.float32), read)
        return trainable, frozen

    def shapes(self, width: int) -> Tree:
        """Returns the tree of `trainable` on a backbone of this width, its leaves `ShapeDtypeStruct`."""
        return jax.eval_shape(lambda key: self._parameters(key, key, width), jax.random.key(0))

    def _parameters(self, input_key: Key, inner_key: Key, width: int) -> Tree:
        """Returns the parameters of what fills the sites, as Linen makes them."""
        trainable: dict[str, Any] = {}
        if own := input_parameters(self.method, input_key, width):
            trainable["input"] = own
        inner = jax.jit(self._init_sites)(inner_key)  # under jit, what is not returned is not computed
        return {**trainable, "backbone": inner} if inner else trainable

    def _init_sites(self, key: Key) -> Tree:
        return site_leaves(self.module.init(key, method="init_pass")["params"], self.method.derived)

    def target_logits(
        self,
        trainable: Tree,
        frozen: Tree,
        batch: dict[str, Array],
        *,
        vocab_ids: Int[Array, "C"] | None = None,
        dropout_key: Key | None = None,
    ) -> Float[Array, "B U V"]:
        """Returns float32 logits at the target positions alone: (B, U, V), or (B, U, C) over `vocab_ids`.

        `batch` has `source`, `source_mask` (B, T) and `targets` (B, U); for a method with an encoder also `encoding`
        (B, H), or, where the encoder is tuned, the texts in its tokens, `encoder_source` and `encoder_mask`. With a
        `dropout_key` backbone, encoder and method drop out.
        """
        states = self.target_states(trainable, frozen, batch, dropout_key=dropout_key)
        return self.head(trainable, frozen, states, vocab_ids)

    def head(
        self, trainable: Tree, frozen: Tree, states: Float[Array, "B U D"], vocab_ids: Int[Array, "C"] | None = None
    ) -> Float[Array, "B U V"]:
        """Returns float32 logits of states, over the vocabulary or over `vocab_ids` alone."""
        return self._apply(self._variables(trainable, frozen), states, vocab_ids, method="head")

    def target_states(
        self, trainable: Tree, frozen: Tree, batch: dict[str, Array], *, dropout_key: Key | None = None
    ) -> Float[Array, "B U D"]:
        """Returns the states that predict the targets, before the head; arguments as those of `target_logits`."""
        encoding = self._encoding(trainable, batch, dropout_key)
        source, mask, prompt, ids = self._source(
            trainable, frozen, batch["source"], batch["source_mask"], encoding, dropout_key
        )
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        args = self._variables(trainable, frozen), source, mask, prompt, batch["targets"], dropout_key is None
        return self._apply(*args, method="target_states", rngs=rngs, **ids)

    def front(self, trainable: Tree, frozen: Tree, length: Int[Array, ""] | None = None) -> Any:
        """Returns what the method's prompt is to every text, a pytree for `start`, or `None`.

        On a causal backbone these are the prompt's keys and values: no offset touches them, no text changes them. It is
        `None` for a method that has no prompt, or one that depends on the text. Only the last `length` vectors of the
        prompt are real; by default all are.
        """
        fill = self.method.sites().input
        if fill is None or self.method.by_instance:
            return None
        nothing = self._apply(self._variables(trainable, frozen), jnp.zeros((1, 0), jnp.int32), method="embed")
        none = Texts(jnp.zeros((1, 0), bool))
        prompt, _ = fill.apply({"params": self.method.at_input(trainable)}, nothing, none, method="streams")
        if prompt is None:
            return None
        return self._apply(self._variables(trainable, frozen), prompt, length, method="front")

    def read(
        self,
        trainable: Tree,
        frozen: Tree,
        front: Any,
        source: Int[Array, "T"],
        source_mask: Bool[Array, "T"],
        encoding: Float[Array, "H"] | None = None,
    ) -> tuple[Float[Array, "T D"], Any]:
        """Returns a text's embeddings as the input site leaves them, and what its prompt is to them, or `None`.

        The text is moved to the front. Of a method that fills no inner site this is all there is to it: `start` of a
        model without a method goes on from both. `front` is what was computed ahead.
        """
        encoding = None if encoding is None else encoding[None]
        embeds, _, prompt, _ = self._source(trainable, frozen, source[None], source_mask[None], encoding)
        if front is None and prompt is not None:
            alone = prompt.reshape(prompt.shape[-2:])
            front = self._apply(self._variables(trainable, frozen), alone, method="front")
        return embeds[0], front

    def start(
        self,
        trainable: Tree,
        frozen: Tree,
        front: Any,
        source: Int[Array, "T"],
        source_mask: Bool[Array, "T"],
        max_new: int,
        beams: int = 1,
        vocab_ids: Int[Array, "C"] | None = None,
        encoding: Float[Array, "H"] | None = None,
        embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "V"], RowCache]:
        """Returns float32 logits (V,) of the first new token, or (C,) over `vocab_ids`, and the cache.

        Of one text: `deptjax.inference.rows` maps it over the rows of a batch, which may then differ in `trainable`
        and `front`. The cache has room for `max_new` tokens of each of the `beams`, which share all that is before.
        `embeds` is the text as another model has read it, for a model without a method.
        """
        encoding = None if encoding is None else encoding[None]
        own_embeds, mask, prompt, ids = self._source(trainable, frozen, source[None], source_mask[None], encoding)
        embeds = own_embeds if embeds is None else embeds[None]
        variables = self._variables(trainable, frozen)
        own = None
        if front is None and prompt is not None:
            own = front = self._apply(variables, prompt, method="front")
        state, cache = self._apply(variables, embeds, mask, front, max_new, beams, method="start", **ids)
        return self._apply(variables, state[0], vocab_ids, method="head"), RowCache(own, cache)

    def extend(
        self, trainable: Tree, frozen: Tree, front: Any, cache: RowCache, tokens: Int[Array, "K U"], t: Array | int
    ) -> tuple[Float[Array, "K U V"], RowCache]:
        """Returns float32 logits (K, U, V) behind each new token of each beam, and the cache with them.

        `front` as given to `start`. New tokens get neither prompt nor offset: those belong to the source.
        """
        variables = self._variables(trainable, frozen)
        front = cache.front if front is None else front
        states, backbone_cache = self._apply(variables, cache.backbone, tokens, t, front, method="extend")
        return self._apply(variables, states, method="head"), cache._replace(backbone=backbone_cache)

    def _encoding(self, trainable: Tree, batch: dict[str, Array], dropout_key: Key | None) -> Array | None:
        if self.encoding is None:
            return batch.get("encoding")
        if dropout_key is not None:  # its layers may have the names of the backbone's, which draw by the key itself
            dropout_key = jax.random.fold_in(dropout_key, 2)
        return self.encoding(trainable[ENCODER], batch["encoder_source"], batch["encoder_mask"], dropout_key)

    def _source(
        self,
        trainable: Tree,
        frozen: Tree,
        tokens: Array,
        mask: Array,
        encoding: Array | None = None,
        dropout_key: Key | None = None,
    ) -> tuple[Array, Array, Array | None, dict[str, Array]]:
        """Returns embedded sources, their mask, the prompt, and the ids for a backbone that has to find its mask."""
        tokens, mask = left_aligned(tokens, mask)
        ids = {"tokens": tokens} if self.module.config.is_masked else {}
        embeds = self._apply(self._variables(trainable, frozen), tokens, method="embed")
        fill = self.method.sites().input
        if fill is None:
            return embeds, mask, None, ids
        rngs = {} if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, 1)}
        texts = Texts(mask, None, encoding)
        params = {"params": self.method.at_input(trainable)}
        prompt, embeds = fill.apply(params, embeds, texts, method="streams", rngs=rngs)
        if prompt is not None and prompt.ndim == 2 and not self.share_prompt:
            prompt = jnp.broadcast_to(prompt, (embeds.shape[0], *prompt.shape))
        return embeds, mask, prompt, ids

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.apply(*args, **kwargs)  # never with mutable collections, so there is one result

    def _variables(self, trainable: Tree, frozen: Tree) -> dict[str, Tree]:
        params = merge_trees(frozen, self.method.inner(trainable))
        return {"params": params, COMMON: self.method.common(trainable)}
