"""What a layer keeps of its forward pass for the backward pass, by name.

| `remat` | kept of each layer                                   | computed again in the backward pass            |
|---------|------------------------------------------------------|------------------------------------------------|
| `none`  | everything that the gradient needs                   | nothing                                        |
| `dots`  | its input, and the results of products with weights  | attention, norms, activations: few operations  |
| `full`  | its input                                            | the whole layer: one forward pass more a step  |

Rematerialisation after Chen et al. 2016 (arXiv 1604.06174). Losses and gradients are those of `none`; what is computed
twice may be fused otherwise, so their last bit may differ. On CPUs the compiler merges what is computed twice into what
is computed once and kept, unless layers are scanned: there a policy saves memory with `scan_layers` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

REMAT = ("none", "dots", "full")

# Products with a weight have no batch dimension; those of attention, whose results grow with the square of a text, do.
_KEPT: dict[str, Callable[..., Any]] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(layer: type[nn.Module], policy: str, scanned: bool) -> Any:
    """Returns the class of a layer which keeps what `policy`, one of `REMAT`, says; its parameters stay where they are.

    The arguments of a layer may be arrays, `None` and trees of them; what is not an array must be static in its tree.
    Inside of a scan nothing has to be done against the compiler's merging both computations.
    """
    return layer if policy == "none" else nn.remat(layer, policy=_KEPT[policy], prevent_cse=not scanned)
