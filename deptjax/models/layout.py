"""The two layouts of a tree's layers: one node a layer, `layers_0`, `layers_1`, ..., or one whose leaves are stacked.

Which of them a model has is how it is computed (`scan_layers`), not what. So what was tuned in one is of use in the
other.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from flax import traverse_util

from deptjax.typing import Tree

Path = tuple[str, ...]

STACKED = "layers"
_LAYER = re.compile(r"layers_(\d+)")


def with_layout(tree: Tree, scan_layers: bool) -> Tree:
    """Returns a nested dict with its layers stacked on a leading axis (`scan_layers`), or one by one.

    Layers that are turned over become numpy arrays. What is not below a layer stays as it is; so do leaves that cannot
    be those of all layers, because one is missing or has another shape.

    >>> with_layout({"layers_0": {"a": np.zeros(2)}, "layers_1": {"a": np.ones(2)}}, scan_layers=True)
    {'layers': {'a': array([[0., 0.],
           [1., 1.]])}}
    """
    leaves = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(_stacked(leaves) if scan_layers else _apart(leaves))


def _stacked(leaves: dict[Path, Any]) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    groups: dict[Path, dict[int, Path]] = {}  # of a stacked leaf, the path of each layer's
    for path, leaf in leaves.items():
        at = next((i for i, part in enumerate(path) if _LAYER.fullmatch(part)), None)
        if at is None:
            found[path] = leaf
        else:
            groups.setdefault((*path[:at], STACKED, *path[at + 1 :]), {})[int(path[at].partition("_")[2])] = path
    for stacked, paths in groups.items():
        own = [np.asarray(leaves[paths[number]]) for number in sorted(paths)]
        if sorted(paths) == list(range(len(own))) and len({leaf.shape for leaf in own}) == 1:
            found[stacked] = np.stack(own)
        else:
            found |= {path: leaves[path] for path in paths.values()}
    return found


def _apart(leaves: dict[Path, Any]) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for path, leaf in leaves.items():
        if STACKED in path and np.ndim(leaf):
            at = path.index(STACKED)
            found |= {(*path[:at], f"layers_{i}", *path[at + 1 :]): layer for i, layer in enumerate(np.asarray(leaf))}
        else:
            found[path] = leaf
    return found
