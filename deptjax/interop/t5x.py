"""Turns a T5X checkpoint into a backbone's config and parameter tree.

The trees have T5X's names, so a parameter fills the leaf of its own path. What differs is how layers are stored:

    T5X's T5           encoder/layers_{i}/attention/query/kernel   (D, N*H), and one bias, encoder/relpos_bias
    scalable T5        encoder/layers_{i}/...                      (D, N, H), and a bias (N, buckets) in each layer
    scalable, scanned  encoder/encoder/attention/query/kernel      (D, L, N, H), layers on axis 1; bias (N, L, buckets)

(github.com/google-research/t5x, t5x/examples/t5 and t5x/examples/scalable_t5.) Any of them fills any tree, scanned or
not. A checkpoint has no config; `t5x_config` infers it.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, NamedTuple

import numpy as np

from deptjax.errors import UserError, nearest
from deptjax.interop.convert import (
    DTYPES,
    DefaultDevice,
    Place,
    empty_aligned,
    is_stacked,
    leaves_of,
    put,
    quantized_leaf,
)
from deptjax.interop.huggingface import config_from_dict
from deptjax.interop.names import Entry, Path, t5_entries
from deptjax.interop.t5x_gin import mlp_settings, t5_settings
from deptjax.interop.t5x_store import FILE, T5XStore, dotted
from deptjax.models.t5 import T5Config
from deptjax.quantization import scheme_of
from deptjax.typing import Tree

_LAYER = re.compile(r"layers_(\d+)")
_BIAS = ("relpos_bias", "rel_embedding")
GIN_FILES = ("model.gin", "config.gin")  # in this order, in the checkpoint's folder and then above it


class Stack(NamedTuple):
    """How T5X stored one stack: `inner` is the key of the stacked layers (`None` where each has a key of its own)."""

    name: str
    layers: int
    inner: str | None
    axis: int

    def stored(self, layer: int, rest: Path) -> Path:
        """Returns the path of the array that holds a parameter of a layer."""
        return (self.name, f"layers_{layer}" if self.inner is None else self.inner, *rest)

    def of_layer(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that one layer has in a stored array of this shape."""
        return shape if self.inner is None else shape[: self.axis] + shape[self.axis + 1 :]

    def of_all(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the stored array for a layer's shape."""
        return shape if self.inner is None else (*shape[: self.axis], self.layers, *shape[self.axis :])


def t5x_config(store: T5XStore) -> T5Config:
    """Returns the config of a checkpoint, from the shapes of its parameters.

    Shapes do not tell the activation. It is `relu`, and gated by `gelu_new` where there are two input kernels, as in
    T5 1.0 and 1.1, unless a `model.gin` or `config.gin` in the checkpoint's folder or above it binds `T5Config`'s
    `mlp_activations`; the dropout rate is 0.1 unless `dropout_rate` is bound there. T5X's layers fix the rest:
    distances up to 128 and a norm epsilon of 1e-6. A Hugging Face `config.json` in the checkpoint's folder goes before
    all that.

    Raises `UserError` for parameters that are not those of a T5, and for a file that contradicts them.
    """
    raw = store.beside("config.json")
    if raw is not None:
        return _huggingface_config(raw, f"{store.where}/config.json")
    vocab, width = _shape(store, ("token_embedder", "embedding"), 2)
    encoder, decoder = (stack_of(store, name, width) for name in ("encoder", "decoder"))
    heads, buckets = _bias_shape(store, encoder)
    query = encoder.of_layer(_shape(store, encoder.stored(0, ("attention", "query", "kernel"))))
    inner = int(np.prod(query[1:]))
    if inner % heads:
        raise UserError(
            f"{store.where}: {inner} query features are no whole number of {heads} heads; not a T5 of T5X's"
        )
    gated = encoder.stored(0, ("mlp", "wi_0", "kernel")) in store.paths()
    tied = ("decoder", "logits_dense", "kernel") not in store.paths()
    activation, dropout = _gin_settings(store, gated, tied)
    return T5Config(
        vocab_size=vocab,
        width=width,
        num_encoder_layers=encoder.layers,
        num_decoder_layers=decoder.layers,
        num_heads=heads,
        head_dim=inner // heads,
        mlp_dim=encoder.of_layer(_shape(store, encoder.stored(0, ("mlp", "wo", "kernel"))))[0],
        activation=activation,
        gated=gated,
        tied=tied,
        relative_buckets=buckets,
        dropout_rate=dropout,
    )


def stack_of(store: T5XStore, name: str, width: int) -> Stack:
    """Returns how the stack `name` is stored, its stacked axis read from the shape of a norm's scale.

    A scale of all L layers is (D, L) or (L, D). Where L = D they cannot be told apart, and T5X's default of 1 is taken.
    Raises `UserError` where there are no layers.
    """
    keys = {path[1] for path in store.paths() if path[0] == name and len(path) > 2}
    numbers = [int(found[1]) for key in keys if (found := _LAYER.fullmatch(key))]
    if numbers:
        return Stack(name, max(numbers) + 1, None, 0)
    scanned = sorted(keys & {name, "layers"})
    if not scanned:
        raise UserError(f"{store.where}/{FILE}: there are no layers under '{name}'; not an encoder-decoder T5 of T5X's")
    path = (name, scanned[0], "pre_mlp_layer_norm", "scale")
    shape = _shape(store, path, 2)
    if width not in shape:
        raise UserError(
            f"{store.where}: parameter '{dotted(path)}' has shape {shape}, expected {width} for one of them"
        )
    axis = 1 if shape[0] == width else 0
    return Stack(name, shape[axis], scanned[0], axis)


class _Part(NamedTuple):
    """A stored array and what it fills: the leaf `targets[0]`, or with an `axis` of layers, one leaf a layer.

    `shapes` are those that it may have: T5X joins the heads of a kernel or keeps them apart.
    """

    name: Path
    shapes: list[tuple[int, ...]]
    axis: int | None
    targets: list[int]


def fill_t5x(
    config: T5Config,
    store: T5XStore,
    *,
    scan_layers: bool,
    dtype: str,
    quantize: str | None = None,
    place: Place | None = None,
) -> Tree:
    """Returns the parameter tree that `config` describes, filled from a T5X checkpoint.

    Each stored array is read once, a few of its chunks at a time, straight into its leaves. So the peak of memory is
    the tree and a few megabytes, or a few times the largest stored chunk where that is more: a chunk cannot be
    decompressed in part (T5X's own are 64 MiB at most). What stands in the msgpack file itself is in memory beside it.

    `place` and `quantize` are as in `fill_tree`; a leaf is read whole before it is split, and what is quantised in
    float32, the layers of a kind together. Raises `UserError` for a parameter that is missing, unexpected or has
    another shape, before anything large is read, and for layers with different position biases.
    """
    place = place or DefaultDevice()
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    stacks = {name: stack_of(store, name, config.width)._replace(layers=count) for name, count in counts.items()}
    groups = leaves_of(t5_entries(config), True)  # of the same kind, one a layer: stored together, or filled together
    parts = {kind: _parts(store, config, stacks, group) for kind, group in groups.items()}
    _check(store, parts)
    tree: Tree = {}
    for kind, group in groups.items():
        shape, scheme = _shape_in_tree(group[0]), scheme_of(kind, quantize)
        leaf_dtype = DTYPES[dtype if scheme is None else "float32"]
        if scan_layers and is_stacked(kind):
            leaves = {kind: empty_aligned((len(group), *shape), leaf_dtype)}
            targets = list(leaves[kind])
        else:
            leaves = {entry.path: empty_aligned(shape, leaf_dtype) for entry in group}
            targets = list(leaves.values())
        for part in parts[kind]:
            _read(store, part, targets)
        for path, leaf in leaves.items():
            if scheme is not None:
                stack = len(leaf) if is_stacked(path) else None
                put(tree, path, quantized_leaf(path, [leaf] if stack is None else leaf, stack, scheme, place))
            else:
                put(tree, path, place.leaf(path, leaf.shape, [leaf[index] for index in place.parts(path, leaf.shape)]))
    return tree


def _parts(store: T5XStore, config: T5Config, stacks: dict[str, Stack], group: list[Entry]) -> list[_Part]:
    """Returns the stored arrays that fill the leaves of one kind."""
    path, shape = group[0].path, _shape_in_tree(group[0])
    bias_of_layers = path[1:] == _BIAS and path not in store.paths()
    if len(path) < 3 or not (bias_of_layers or _LAYER.fullmatch(path[1])):
        return [_Part(path, [shape], None, [0])]
    stack = stacks[path[0]]
    rest = path[1:] if bias_of_layers else path[2:]
    shapes = [stack.of_all(of_layer) for of_layer in (shape, _split_heads(rest, shape, config)) if of_layer]
    targets = [0] * stack.layers if bias_of_layers else list(range(stack.layers))
    if stack.inner is not None:
        return [_Part(stack.stored(0, rest), shapes, stack.axis, targets)]
    return [_Part(stack.stored(i, rest), shapes, None, [target]) for i, target in enumerate(targets)]


def _split_heads(rest: Path, shape: tuple[int, ...], config: T5Config) -> tuple[int, ...]:
    """Returns the shape of an attention kernel that keeps heads apart, or `()` for any other parameter."""
    heads = (config.num_heads, config.head_dim)
    if rest[-1] != "kernel" or rest[0] == "mlp":
        return ()
    return (*heads, shape[1]) if rest[1] == "out" else (shape[0], *heads)


def _shape_in_tree(entry: Entry) -> tuple[int, ...]:
    return entry.shape[::-1] if entry.transpose else entry.shape


def _check(store: T5XStore, parts: dict[Path, list[_Part]]) -> None:
    """Raises `UserError` where names and shapes are not those that the config wants, or biases differ by layer."""
    there, wanted = set(store.paths()), [part for group in parts.values() for part in group]
    remedy = "the config and the weights do not belong together"
    for part in wanted:
        if part.name not in there:
            raise UserError(f"{store.where}/{FILE}: parameter '{dotted(part.name)}' is missing; {remedy}")
        shape = store.shape(part.name)
        if shape not in part.shapes:
            expected = " or ".join(map(str, dict.fromkeys(part.shapes)))
            raise UserError(
                f"{store.where}/{FILE}: parameter '{dotted(part.name)}' has shape {shape}, expected {expected};"
                f" {remedy}"
            )
    known = {dotted(part.name) for part in wanted}
    for name in map(dotted, store.paths()):
        if name not in known:
            raise UserError(
                f"{store.where}/{FILE}: parameter '{name}' is not one that this model has; it would be silently"
                f" ignored, so take a checkpoint without it.{nearest(name, known)}"
            )
    for kind, group in parts.items():
        if kind[1:] == _BIAS:
            biases = [store.read(part.name) for part in group]
            if group[0].axis is not None:
                biases = list(np.moveaxis(biases[0], group[0].axis, 0))
            if not all(np.array_equal(bias, biases[0]) for bias in biases):
                raise UserError(
                    f"{store.where}/{FILE}: the layers of '{kind[0]}' have different 'relpos_bias' (UMT5 has such);"
                    " only one that all layers share is implemented; take a T5 or mT5"
                )


def _read(store: T5XStore, part: _Part, targets: list[np.ndarray]) -> None:
    """Reads a stored array into the leaves that it fills, which are contiguous and of the shape that the tree has."""
    for region, values in store.blocks(part.name):
        shape = store.shape(part.name)
        if part.axis is None:
            targets[part.targets[0]].reshape(shape)[region] = values
            continue
        layers, within = region[part.axis], region[: part.axis] + region[part.axis + 1 :]
        of_layer = shape[: part.axis] + shape[part.axis + 1 :]
        for layer, piece in zip(range(layers.start, layers.stop), np.moveaxis(values, part.axis, 0)):
            targets[part.targets[layer]].reshape(of_layer)[within] = piece


def _shape(store: T5XStore, path: Path, rank: int | None = None) -> tuple[int, ...]:
    """Returns the stored shape of a parameter that a config is inferred from."""
    if path not in store.paths():
        raise UserError(f"{store.where}/{FILE}: there is no parameter '{dotted(path)}'; not a T5 with T5X's names")
    shape = store.shape(path)
    if len(shape) < 2 or len(shape) != (rank or len(shape)):
        raise UserError(f"{store.where}/{FILE}: parameter '{dotted(path)}' has shape {shape}; not a T5 of T5X's")
    return shape


def _bias_shape(store: T5XStore, stack: Stack) -> tuple[int, ...]:
    """Returns (N, buckets), from the bias of the whole stack or, where layers have their own, from a layer's."""
    shared = (stack.name, *_BIAS)
    if shared in store.paths():
        return _shape(store, shared, 2)
    return stack.of_layer(_shape(store, stack.stored(0, _BIAS)))


def _huggingface_config(raw: bytes, where: str) -> T5Config:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); fetch it again") from None
    config = config_from_dict(fields if isinstance(fields, dict) else {}, where)
    if not isinstance(config, T5Config):
        raise UserError(
            f"{where}: 'model_type' is {fields['model_type']!r}, but T5X checkpoints are of T5; take it away"
        )
    return config


def _gin_settings(store: T5XStore, gated: bool, tied: bool) -> tuple[str, float]:
    """Returns activation and dropout rate, from gin files or by default."""
    settings: dict[str, Any] = {}
    where = store.where
    for above, name in itertools.product((False, True), GIN_FILES):
        raw = store.beside(name, above)
        if raw is not None:
            where = f"{store.where.rpartition('/')[0] if above else store.where}/{name}"
            settings = t5_settings(raw.decode("utf-8", "replace"), where)
        if settings:
            break
    activation = "gelu_new" if gated else "relu"
    if "mlp_activations" in settings:
        activation, said = mlp_settings(settings["mlp_activations"], where)
        if said != gated:
            kernels = "two input kernels (wi_0, wi_1)" if gated else "one input kernel (wi)"
            stated = settings["mlp_activations"]
            raise UserError(f"{where}: 'mlp_activations' is {stated!r}, but the checkpoint has {kernels}; correct it")
    if settings.get("logits_via_embedding", tied) != tied:
        head = "no" if tied else "a"
        raise UserError(
            f"{where}: 'logits_via_embedding' is {not tied}, but the checkpoint has {head} 'decoder.logits_dense';"
            " correct it"
        )
    dropout = settings.get("dropout_rate", 0.1)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"{where}: 'dropout_rate' is {dropout!r}, expected a number from 0 up to, not including, 1")
    return activation, float(dropout)
