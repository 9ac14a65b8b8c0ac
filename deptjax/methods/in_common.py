"""What all layers have in common: kept once, in `trainable["input"]`, and found beside each layer when the model runs.

A gradient of what is found in several places is the sum over these, as it should be of one parameter. And the other
way: what is kept beside the first layer, and acts at the input.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from deptjax.typing import Tree

_LAYER = re.compile(r"layers_(\d+)")


def beside_layers(tree: Tree, own: str, common: Callable[[Any], Tree], layer: int | None = None) -> Tree:
    """Returns a tree of inner sites with `common(i)` among the parameters of each that has one named `own`.

    i is the number of the layer, traced where layers are stacked; then what is common is stacked too.

    >>> beside_layers({"layers_1": {"site": {"own": 3}}}, "own", lambda i: {"number": i})
    {'layers_1': {'site': {'own': 3, 'number': 1}}}
    """
    if not isinstance(tree, dict):
        return tree
    if own in tree:
        made = jax.vmap(common)(jnp.arange(len(tree[own]))) if layer is None else common(layer)
        return {**tree, **made}

    def number(name: str) -> int | None:
        found = _LAYER.fullmatch(name)
        return int(found[1]) if found else layer

    return {name: beside_layers(node, own, common, number(name)) for name, node in tree.items()}


def first_adds_nothing(tree: Tree, own: str) -> Tree:
    """Returns a tree of inner sites with `adds` beside each parameter named `own`: 0 in the first layer, else 1.

    For what the first layer would add to the prompt and `Method.at_input` has put in front of the text already.
    """
    return beside_layers(tree, own, lambda i: {"adds": jnp.asarray(i > 0, jnp.float32)})


def in_place_of(tree: Tree, own: str, common: Tree) -> Tree:
    """Returns a tree of inner sites with `common` as the parameters of each that has one named `own`, and no others.

    It is the same object everywhere, and once where layers are stacked.

    >>> in_place_of({"layers": {"site": {"own": 3}, "other_site": {"lora_a": 5}}}, "own", {"number": 7})
    {'layers': {'site': {'number': 7}}}
    """
    if own in tree:
        return common
    below = {name: in_place_of(node, own, common) for name, node in tree.items() if isinstance(node, dict)}
    return {name: node for name, node in below.items() if node}


def of_first_layer(tree: Tree, own: str) -> Any:
    """Returns the parameter `own` of the site beside the first layer, of layers one by one or stacked.

    >>> of_first_layer({"encoder": {"layers_0": {"site": {"own": 3}}, "layers_1": {"site": {"own": 5}}}}, "own")
    3
    """
    for path, leaf in traverse_util.flatten_dict(tree).items():
        if path[-1] == own and "layers_0" in path:
            return leaf
        if path[-1] == own and "layers" in path:
            return leaf[0]
    raise KeyError(own)


def with_first_layer(tree: Tree, own: str, value: Any) -> Tree:
    """Returns the tree with another parameter `own` of the site beside the first layer, one by one or stacked.

    >>> with_first_layer({"layers_0": {"site": {"own": 3}}, "layers_1": {"site": {"own": 5}}}, "own", 4)
    {'layers_0': {'site': {'own': 4}}, 'layers_1': {'site': {'own': 5}}}
    """
    flat = traverse_util.flatten_dict(tree)
    for path, leaf in flat.items():
        if path[-1] == own and "layers_0" in path:
            flat[path] = value
        elif path[-1] == own and "layers" in path:
            flat[path] = leaf.at[0].set(value)
    return traverse_util.unflatten_dict(flat)
