"""Quantised frozen weights: int8 with a scale a channel, int4 and NF4 with a scale for every 64 values of a channel.

    kernel ~ scale * value,   scale = max |kernel| / bound                 over the values that share it

    int8    value in -128 .. 127, bound 127.5; a column of the kernel shares a scale
    int4    value in -8 .. 7, bound 7.5; each 64 values of a column, one behind the other, share a scale
    nf4     value one of 16 quantiles of the normal distribution, bound 1; scales as for int4

Weights alone are quantised, by the nearest value, without data. NF4 is that of Dettmers et al., "QLoRA: Efficient
Finetuning of Quantized LLMs", NeurIPS 2023, arXiv 2305.14314, appendix E, without its quantisation of scales, which are
bfloat16 here: 4.25 bits a weight.

The array type and the two directions are those of qwix. Its interception of whole models is not used: it rewrites the
products that a module makes, by rules on module paths, and the tree of a backbone would then be known to it alone. Here
a `qwix.QArray` lies in the tree in the place of a kernel, as a node with the leaves `qvalue` (..., I, O) and `scale`
(..., tiles, O). So `jit`, `vmap`, `scan` (both leaves have the axis of layers), `eval_shape` and shardings by path see
ordinary arrays, and `deptjax.models.layers.Linear` is the one place that knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deptjax.errors import UserError, nearest
from deptjax.typing import Array, Float, Tree

if TYPE_CHECKING:
    from qwix import QArray  # imported where it is used: a run without quantisation has no need of it

_BLOCK = 1 << 18  # values quantised together: what is in memory beside a kernel and its quantised form


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a kernel is quantised.

    Attributes:
      qtype: qwix's name of the values.
      stored: the dtype of `qvalue`; two values of four bits share a byte on the device.
      tile: how many values along the contracting axis share a scale, `None` for all of them.
      scale: the dtype of `scale`.
    """

    qtype: Any
    stored: np.dtype
    tile: int | None
    scale: np.dtype

    def tile_of(self, width: int) -> int:
        """Returns how many of the `width` values of a column share a scale: the most, up to `tile`, that divide it.

        >>> [SCHEMES["int4"].tile_of(width) for width in (576, 96, 23, 67)]
        [64, 48, 23, 67]
        """
        sizes = range(_LEAST_TILE, (self.tile or 0) + 1)
        return max((size for size in sizes if width % size == 0), default=width)


_LEAST_TILE = 16  # in smaller tiles the scales would be much of the memory: such a width gets one scale a column
_FOUR_BITS = {"tile": 64, "scale": np.dtype(ml_dtypes.bfloat16)}
SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(np.dtype(np.int8), np.dtype(np.int8), None, np.dtype(np.float32)),
    "int4": Scheme(np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.int4), **_FOUR_BITS),
    "nf4": Scheme("nf4", np.dtype(ml_dtypes.uint4), **_FOUR_BITS),
}


def check_scheme(name: str | None) -> None:
    """Raises `UserError` for a name that is not `None` and not one of the schemes."""
    if name is not None and name not in SCHEMES:
        raise UserError(f"quantize '{name}' is not one of {', '.join(SCHEMES)}.{nearest(str(name), SCHEMES)}")


def is_quantized(leaf: Any) -> bool:
    """Returns whether a leaf of a backbone's tree is a quantised kernel."""
    return hasattr(leaf, "qvalue")


def scheme_of(path: tuple[str, ...], scheme: str | None) -> str | None:
    """Returns the scheme of what lies at a path of a backbone's tree, `None` for what is not quantised.

    Kernels are. A head of its own has int8 at least: NF4 there added 0.15 nats a token to SmolLM2-135M's loss, int8
    0.003 at most (benchmarks/README.md). Embedding tables are looked up, not multiplied, and a tied
    one is the head as well; norms and biases are small.
    """
    if scheme is None or path[-1] != "kernel":
        return None
    return "int8" if path[-2] == "logits_dense" else scheme


def quantize_kernel(kernel: Float[Array, "... I O"], scheme: str) -> QArray:
    """Returns a kernel, or a stack of them, quantised; float32 inside, whatever the kernel's dtype.

    The node has `qvalue` (..., I, O) in the scheme's dtype and `scale` (..., I / tile, O), one tile for int8.
    """
    import qwix

    chosen, contracting = SCHEMES[scheme], kernel.ndim - 2
    return qwix.quantize(
        kernel.astype(jnp.float32),
        chosen.qtype,
        channelwise_axes=tuple(axis for axis in range(kernel.ndim) if axis != contracting),
        tiled_axes={contracting: chosen.tile_of(kernel.shape[contracting])},
        scale_dtype=chosen.scale,
    )


_compiled = jax.jit(quantize_kernel, static_argnames="scheme")


def quantize_host(kernel: np.ndarray, scheme: str) -> QArray:
    """Returns the node of a kernel (I, O), its leaves numpy arrays, in which a value of four bits takes a byte.

    It is quantised on the default device, a few megabytes at a time.
    """
    from qwix import QArray

    chosen, (rows, columns) = SCHEMES[scheme], kernel.shape
    qvalue = np.empty((rows, columns), chosen.stored)
    scale = np.empty((rows // chosen.tile_of(rows), columns), chosen.scale)
    step = max(1, _BLOCK // rows)
    for start in range(0, columns, step):
        block = slice(start, start + step)
        node = _compiled(np.ascontiguousarray(kernel[:, block]), scheme=scheme)
        qvalue[:, block], scale[:, block] = node.qvalue, node.scale
    return QArray(qvalue, scale, None, chosen.qtype)


def quantize_tree(params: Tree, scheme: str) -> Tree:
    """Returns a backbone's tree with its kernels quantised; other leaves are the same arrays. Works under `eval_shape`.

    Raises `UserError` for an unknown scheme, and for a tree that is quantised already.
    """
    check_scheme(scheme)
    if any_quantized(params):
        raise UserError(f"quantize '{scheme}': the backbone is quantised already; load it without quantize")

    def leaf(path: tuple[Any, ...], value: Any) -> Any:
        own = scheme_of(tuple(key.key for key in path), scheme)
        return value if own is None else _compiled(value, scheme=own)

    return jax.tree_util.tree_map_with_path(leaf, params)


def any_quantized(params: Tree) -> bool:
    """Returns whether a tree has a quantised kernel."""
    return any(is_quantized(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized))


def dequantize(kernel: Any, dtype: Any) -> Array:
    """Returns a kernel as an array in `dtype`: a quantised one times its scales, in float32; any other as it is."""
    if not is_quantized(kernel):
        return kernel.astype(dtype)
    import qwix

    return qwix.dequantize(kernel.astype(jnp.float32)).astype(dtype)


def with_kernel(product: Callable[[Array, Array], Array], x: Array, kernel: Any) -> Array:
    """Returns `product(x, kernel)`, the kernel dequantised to the dtype of `x` inside of it.

    A gradient with respect to `x` needs the kernel again. It is dequantised once more then: kept from the forward pass,
    the kernels of all layers would be in memory at once, as wide as if they were not quantised.
    """
    if not is_quantized(kernel):
        return product(x, kernel.astype(x.dtype))
    return jax.checkpoint(lambda x, kernel: product(x, dequantize(kernel, x.dtype)))(x, kernel)


def tree_bytes(tree: Tree) -> int:
    """Returns the bytes that the arrays of a tree take on a device, where two values of four bits share one.

    >>> tree_bytes({"a": jnp.zeros((2, 3)), "b": jnp.zeros(6, jnp.int4)})
    27
    """
    leaves = jax.tree.leaves(tree)
    return sum((leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) + 7) // 8 for leaf in leaves)
