"""How many operations a training step has, by formula: the matrix products alone, 2 for a multiply and its addition.

    y = x W          2 * positions * in * out
    attention        2 * rows * queries * keys * N * H for the scores, as many for the mixing; masked pairs included
    head             2 * rows * targets * D * (V, or the labels' tokens)

A product y = x W has as many operations again for the gradient of x, where x depends on something that is trained, and
for that of W, where W is trained; attention's products have two operands that may. So a step of full fine-tuning is
three forward passes, and one in front of a frozen model two, and attention's once more: nothing that neither is trained
nor depends on it has a gradient.

A prompt that rows of a causal batch share is M positions a batch, and in the last layer its keys and values alone; in
front of an encoder it is M positions a row. The head sees the target positions alone; of a masked model the one of
the mask. What rematerialisation computes
again is left out, as is usual where a chip's utilisation is told.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.methods.base import COMMON, SITE, AttentionSite, Method, Texts, input_parameters
from deptjax.models.prompted import PromptedModel
from deptjax.models.sizes import parameter_shapes
from deptjax.products import product_flops
from deptjax.typing import Array, Tree

_LAST = ("down", "wo")  # of an MLP's projections: the one that reads what the others have written


class BatchShape(NamedTuple):
    """A padded batch: B rows of T source and U target tokens; `logits` a target, by default the whole vocabulary.

    Where the loss is over the labels' tokens, `targets` is 1 and `logits` their number.
    """

    rows: int
    source: int
    targets: int
    logits: int | None = None


class Flops(NamedTuple):
    """Operations of a step: of its forward pass, and of the gradients of activations and of what is trained."""

    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def total(self) -> int:
        """All of the step."""
        return sum(self)


def forward_flops(config: Any, batch: BatchShape) -> int:
    """Returns the operations of one forward pass of a frozen model over a batch, without a method."""
    return step_flops(config, Method(), batch).forward


def step_flops(config: Any, method: Method, batch: BatchShape, share_prompt: bool = True) -> Flops:
    """Returns the operations of one training step of `method` on the backbone of `config`.

    Counted are the projections and what fills their `linear` sites (each matrix of it one factor more), attention and
    what fills its site, the head, the formula of the input site and of what all layers have in common; what fills a
    `residual` or a `stream` site is not. A prompt that each layer of a causal model replaces is counted as if what the
    layer before made of it were used.
    """
    method = method.resolve(config.width)
    tally = _Tally(config, method)
    front = _input_site(tally, method, config.width, batch)
    if method.sites().attention is not None:
        tally.formula(method.common, _trained_shapes(config, method))
    if method.tunes_backbone:
        front = front._replace(text=True)
    if config.is_encoder_decoder:
        live = _encoder_decoder(tally, config, batch, front)
    elif config.is_masked:
        live, batch = _masked(tally, config, batch, front), batch._replace(targets=1)
    else:
        live = _causal(tally, config, batch, front if share_prompt else front._replace(of_each_row=True))
    logits = config.vocab_size if batch.logits is None else batch.logits
    tally.add(2 * batch.rows * batch.targets * config.width * logits, live, tally.all_trained)
    return Flops(tally.forward, tally.input_gradient, tally.weight_gradient)


class _Front(NamedTuple):
    """What the input site gives: the vectors of the prompt, whose they are, and whether the text depends on it."""

    prompt: int = 0
    of_each_row: bool = False
    text: bool = False


class _Tally:
    """Adds up products. *Live* is what depends on something that is trained."""

    def __init__(self, config: Any, method: Method) -> None:
        self.forward = self.input_gradient = self.weight_gradient = 0
        self.all_trained = method.tunes_backbone
        self._kernels = parameter_shapes(config)
        self._sites, self._common = _inner_sites(config, method)
        self._fill = method.sites().attention
        self._heads = getattr(config, "num_kv_heads", config.num_heads), config.head_dim

    def add(self, flops: int, live: bool, trained: bool) -> None:
        """Adds a product x W: is `x` live, is `W` trained?"""
        self.forward += flops
        self.input_gradient += flops * live
        self.weight_gradient += flops * trained

    def linear(self, layer: str, name: str, positions: int, live: bool) -> bool:
        """Adds a projection of a layer, and what fills its site; returns whether its result is live."""
        *_, inputs, outputs = _at(self._kernels, f"{layer}/{name}/kernel").shape
        self.add(2 * positions * inputs * outputs, live, self.all_trained)
        live = live or self.all_trained
        for factor in jax.tree.leaves(_at(self._sites, f"{layer}/{name}/{SITE}")):
            self.add(2 * positions * math.prod(factor.shape[1:]), live, True)
            live = True
        return live

    def mlp(self, layer: str, positions: int, live: bool) -> bool:
        """Adds the MLP of a layer."""
        names = sorted(_at(self._kernels, f"{layer}/mlp"), key=lambda name: name in _LAST)
        *into, last = names
        hidden = [self.linear(layer, f"mlp/{name}", positions, live) for name in into]
        return self.linear(layer, f"mlp/{last}", positions, any(hidden))

    def attention(
        self, layer: str, name: str, rows: int, queries: int, keys: int, q: bool, k: bool, v: bool, heads: int
    ) -> bool:
        """Adds scores and mixing of `heads` = N * H numbers a position; what fills the site is keys and values more."""
        prefix = self._prefix(layer, name)
        keys += prefix
        k, v = k or prefix > 0, v or prefix > 0
        flops = 2 * rows * queries * keys * heads
        self.forward += 2 * flops
        self.input_gradient += flops * (q + k) + flops * ((q or k) + v)  # of the scores' operands, of the mixing's
        return q or k or v

    def _prefix(self, layer: str, name: str) -> int:
        """Adds the formula of what fills an attention site, and returns how many keys that gives."""
        path = f"{layer.removesuffix('layers')}{name}"
        fill = self._fill and self._fill(AttentionSite(path, *self._heads), SITE)
        if not fill:
            return 0
        params = jax.eval_shape(fill.init, jax.random.key(0))
        keys, _ = self.formula(fill.apply, {**params, COMMON: _at(self._common, f"{layer}/{name}/{SITE}")})
        return int(keys.shape[0])

    def formula(self, function: Callable[[Tree], Any], params: Tree) -> Any:
        """Adds a function of what is trained, and its gradient; returns the shapes of its result."""

        def with_gradient(params: Tree, of_result: Any) -> Any:
            result, gradient = jax.vjp(function, params)
            return result, gradient(of_result)

        result, own = jax.eval_shape(function, params), product_flops(function, params)
        self.forward += own
        self.weight_gradient += product_flops(with_gradient, params, result) - own
        return result


def _causal(tally: _Tally, config: Any, batch: BatchShape, front: _Front) -> bool:
    length, shared = batch.source + batch.targets - 1, front.prompt
    text, prompt = front.text, shared > 0
    if front.of_each_row:
        length, shared, text, prompt = length + shared, 0, text or prompt, False
    rows, positions, heads = batch.rows, batch.rows * length, config.num_heads * config.head_dim

    def block(tally: _Tally, text: bool, prompt: bool, last: bool) -> tuple[bool, bool]:
        def qkv(positions: int, live: bool, names: tuple[str, ...] = ("query", "key", "value")) -> list[bool]:
            return [tally.linear("layers", f"attention/{name}", positions, live) for name in names]

        def rest(positions: int, live: bool, mixed: bool) -> bool:
            live = tally.linear("layers", "attention/out", positions, mixed) or live
            return tally.mlp("layers", positions, live) or live

        q, k, v = qkv(positions, text)
        if shared:
            own_k, own_v = qkv(shared, prompt, ("key", "value"))
            k, v = k or own_k, v or own_v
            if not last:
                (own_q,) = qkv(shared, prompt, ("query",))
                mixed = tally.attention("layers", "attention", 1, shared, shared, own_q, own_k, own_v, heads)
                prompt = rest(shared, prompt, mixed)
        mixed = tally.attention("layers", "attention", rows, length, length + shared, q, k, v, heads)
        return rest(positions, text, mixed), prompt

    if config.scan_layers:  # one program for all layers: what is live behind one is so in front of each
        text, prompt = block(_dry(tally), text, prompt, last=False)
    for i in range(config.num_layers):
        text, prompt = block(tally, text, prompt, last=i == config.num_layers - 1 and not config.scan_layers)
    return text


def _encoder_decoder(tally: _Tally, config: Any, batch: BatchShape, front: _Front) -> bool:
    rows, source, target = batch.rows, front.prompt + batch.source, batch.targets
    heads = config.num_heads * config.head_dim
    for length in (source, target):  # the bias of relative positions is a product with one-hot rows
        tally.add(2 * config.num_heads * config.relative_buckets * length * length, False, tally.all_trained)

    def attended(tally: _Tally, layer: str, name: str, queries: int, keys: int, live: bool, live_keys: bool) -> bool:
        q = tally.linear(layer, f"{name}/query", rows * queries, live)
        k, v = (tally.linear(layer, f"{name}/{part}", rows * keys, live_keys) for part in ("key", "value"))
        mixed = tally.attention(layer, name, rows, queries, keys, q, k, v, heads)
        return tally.linear(layer, f"{name}/out", rows * queries, mixed) or live

    def encoder(tally: _Tally, live: bool) -> bool:
        live = attended(tally, "encoder/layers", "attention", source, source, live, live)
        return tally.mlp("encoder/layers", rows * source, live) or live

    def decoder(tally: _Tally, live: bool) -> bool:
        live = attended(tally, "decoder/layers", "self_attention", target, target, live, live)
        live = attended(tally, "decoder/layers", "encoder_decoder_attention", target, source, live, encoded)
        return tally.mlp("decoder/layers", rows * target, live) or live

    encoded, live = front.text or front.prompt > 0, tally.all_trained
    if config.scan_layers:
        encoded = encoder(_dry(tally), encoded)
    for _ in range(config.num_encoder_layers):
        encoded = encoder(tally, encoded)
    if config.scan_layers:
        live = decoder(_dry(tally), live)
    for _ in range(config.num_decoder_layers):
        live = decoder(tally, live)
    return live


def _masked(tally: _Tally, config: Any, batch: BatchShape, front: _Front) -> bool:
    rows, length, heads = batch.rows, front.prompt + batch.source, config.num_heads * config.head_dim
    positions = rows * length

    def block(tally: _Tally, live: bool) -> bool:
        q, k, v = (tally.linear("layers", f"attention/{name}", positions, live) for name in ("query", "key", "value"))
        mixed = tally.attention("layers", "attention", rows, length, length, q, k, v, heads)
        live = tally.linear("layers", "attention/out", positions, mixed) or live
        return tally.mlp("layers", positions, live) or live

    live = front.text or front.prompt > 0
    if config.scan_layers:
        live = block(_dry(tally), live)
    for _ in range(config.num_layers):
        live = block(tally, live)
    tally.add(2 * rows * config.width**2, live, tally.all_trained)  # of the head, at the mask alone
    return live or tally.all_trained


def _input_site(tally: _Tally, method: Method, width: int, batch: BatchShape) -> _Front:
    """Adds the formula of the input site and its gradient's for what is trained, and returns what it gives."""
    fill = method.sites().input
    if fill is None:
        return _Front()

    encoded = method.encoding_width()

    def streams(params: Tree, embeds: Array) -> Any:
        texts = Texts.whole(embeds, None if encoded is None else jnp.zeros((batch.rows, encoded)))
        return fill.apply({"params": params}, embeds, texts, method="streams")

    embeds = jax.ShapeDtypeStruct((batch.rows, batch.source, width), jnp.float32)
    params = jax.eval_shape(lambda key: input_parameters(method, key, width), jax.random.key(0))
    prompt, _ = tally.formula(lambda params: streams(params, jnp.zeros(embeds.shape, embeds.dtype)), params)
    jaxpr = jax.make_jaxpr(streams)(params, embeds).jaxpr
    unchanged = jaxpr.outvars[-1] is jaxpr.invars[-1]
    if prompt is None:
        return _Front(text=not unchanged)
    return _Front(prompt.shape[-2], len(prompt.shape) == 3, not unchanged)


@functools.lru_cache(maxsize=16)
def _inner_sites(config: Any, method: Method) -> tuple[Tree, Tree]:
    """Returns the shapes of what fills the inner sites, stacked over the layers, and of what these have in common."""
    sites = method.sites()
    if sites.linear is None and sites.attention is None:
        return {}, {}
    trained = _trained_shapes(config, method)
    return trained.get("backbone", {}), jax.eval_shape(method.common, trained)


def _trained_shapes(config: Any, method: Method) -> Tree:
    """Returns the shapes of a method's parameters, stacked over the layers."""
    module = dataclasses.replace(config, scan_layers=True).make(method.sites())
    return PromptedModel(module, method).shapes(config.width)


def _dry(tally: _Tally) -> _Tally:
    """Returns a tally whose numbers nobody reads."""
    copy = _Tally.__new__(_Tally)
    copy.__dict__.update(tally.__dict__)
    return copy


def _at(tree: Tree, path: str) -> Any:
    """Returns what stands at a path of a nested dict, `{}` where nothing does."""
    for name in path.split("/"):
        tree = tree.get(name, {})
    return tree
