"""Attention by kernels that never hold all scores: cuDNN's on NVIDIA GPUs, the Pallas flash attention on TPUs.

Both compute softmax(q k^T + bias) v with float32 sums block by block (Dao et al. 2022, arXiv 2205.14135), so that what
is kept for the gradient grows with the length and not with its square. They differ in what they take, and this file
brings what `deptjax.models.attention` has into the form of each:

- Causality is square: as many queries as keys. Where the queries stand behind a prompt that they all see, as many rows
  of zeros are put in front of them, and what comes of these is cut away.
- Lengths are padded to what a kernel takes, and the padding is hidden.
- What rows share (a position bias) and what the query heads of a group share (keys and values) is not copied for each.
- The compiler cannot split a kernel over a mesh: `jax.shard_map` does, rows and heads as the placement in use has them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deptjax.errors import UserError, nearest
from deptjax.sharding import placement_in_use
from deptjax.typing import Array, Bool, Float

Kernel = Callable[["Problem"], Array]
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "flash")
MAPPED = "mapped"  # the axis of a map over rows or members
# From this many scores a head and row on, `auto` takes the TPU kernel: compiled for a v5e, two layers of LLaMA-2-7B
# or T5-3B need about half of the temporary memory at 8 x 2048, but more at 64 x 256 (docs/performance.md).
PAYS = 512 * 512
_BLOCKS = (512, 384, 256, 128)  # queries and keys that the TPU kernel holds at a time


class Problem(NamedTuple):
    """What a kernel computes: softmax(q k^T + bias) v, of what `mask` and causality leave.

    Queries are scaled. The bias is float32 with a B of 1 when rows share it. In `mask` the true keys come first. When
    `causal`, the last query sees all keys, the one before it all but the last, and so on.
    """

    query: Float[Array, "B T N H"]
    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    bias: Float[Array, "B N T S"] | None
    mask: Bool[Array, "B S"] | None
    causal: bool


def check_name(family: str, name: str) -> None:
    """Raises `UserError` when no implementation has this name."""
    if name not in IMPLEMENTATIONS:
        known, hint = ", ".join(IMPLEMENTATIONS), nearest(name, IMPLEMENTATIONS)
        raise UserError(f"{family}: attention '{name}' is not known; use one of: {known}.{hint}")


def check_runs_here(name: str, dtype: str, head_dim: int) -> None:
    """Raises `UserError` when this machine, or a model of this dtype and head width, cannot do with what was asked for.

    `auto` and `xla` run everywhere.
    """
    if name not in ("cudnn", "flash"):
        return
    needed, machine = {"cudnn": ("cuda", "an NVIDIA GPU"), "flash": ("tpu", "a TPU")}[name]
    if platform() != needed:
        raise UserError(f"attention '{name}' needs {machine}, and jax runs on {platform()} here; use --attention auto")
    if name == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        raise UserError(
            f"attention 'cudnn' computes in bfloat16, not {dtype}; use --dtype bfloat16, or --attention xla"
        )
    if not _takes(name, jnp.dtype(dtype), head_dim):
        raise UserError(f"attention '{name}' does not take heads {head_dim} wide; use --attention auto")


def platform() -> str:
    """Returns what a program that is being traced will run on: `cpu`, `tpu`, `cuda`, `rocm`.

    That is the kind of device in the placement in use, or jax's default.
    """
    placement = placement_in_use()
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    if device.platform != "gpu":
        return str(device.platform)
    return "cuda" if "cuda" in device.client.platform_version else "rocm"


def choose(asked: str, problem: Problem, bias_rows: int = 0) -> str:
    """Returns the implementation to use, `xla`, `cudnn` or `flash`, where one of `IMPLEMENTATIONS` is asked for.

    It is chosen while tracing, before there is a bias; that will have `bias_rows` rows (none: no bias). A kernel that
    was asked for is used wherever it can compute the problem, on whatever platform, so that a program can be compiled
    for a machine that is not here.
    """
    length, keys, head_dim = problem.query.shape[1], problem.keys.shape[2], problem.query.shape[3]
    if asked == "auto":
        long = length * keys >= PAYS
        asked = {"cuda": "cudnn", "tpu": "flash" if long else "xla"}.get(platform(), "xla")
    if asked == "xla" or not _takes(asked, problem.query.dtype, head_dim) or _split(problem) is None:
        return "xla"
    # jax's rule for mapping cuDNN's kernel wants every array mapped, which those that rows or members share are not;
    # and cuDNN has the gradient of a bias that rows share, not of one a row.
    return "xla" if asked == "cudnn" and (_is_mapped() or bias_rows > 1) else asked


def _is_mapped() -> bool:
    try:
        jax.lax.axis_size(MAPPED)
    except NameError:
        return False
    return True


def _takes(name: str, dtype: Any, head_dim: int) -> bool:
    if name == "cudnn":
        return dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return head_dim <= 128 or head_dim % 128 == 0


def fused(name: str, problem: Problem) -> Float[Array, "B T N H"]:
    """Returns the result of `cudnn` or `flash`, differentiable in queries, keys, values and bias."""
    kernel = {"cudnn": _cudnn, "flash": _flash}[name]
    split = _split(problem) or WHOLE
    return kernel(problem) if split.mesh is None else _over(split, kernel, problem)


# --- over a mesh


class Split(NamedTuple):
    """How a problem is split: the mesh, the mesh's axes of rows and those of heads, and whether K must become N."""

    mesh: Any
    rows: tuple[str, ...]
    heads: tuple[str, ...]
    spread: bool


WHOLE = Split(None, (), (), False)


def _split(problem: Problem) -> Split | None:
    """Returns how the problem is split in the placement in use, or `None` where it does not divide."""
    placement = placement_in_use()
    if placement is None or placement.mesh.size == 1:
        return WHOLE
    sizes, rules = placement.shape, dict(placement.rules)
    batch, _, heads, _ = problem.query.shape
    by_rows = tuple(axis for axis in rules.get("batch", ()) if axis in sizes)
    by_heads = tuple(axis for axis in rules.get("heads", ()) if axis in sizes)
    if batch == 1:  # what all rows share, such as a prompt's own stream, is computed everywhere
        by_rows = ()
    parts = math.prod(sizes[axis] for axis in by_heads)
    if batch % math.prod(sizes[axis] for axis in by_rows) or heads % parts:
        return None
    return Split(placement.mesh, by_rows, by_heads, problem.keys.shape[1] % parts != 0)


def _over(split: Split, kernel: Kernel, problem: Problem) -> Array:
    """Returns what the kernel computes, each device its own rows and heads of it."""
    query, keys, values, bias, mask, causal = problem
    if split.spread:
        keys, values = (jnp.repeat(a, query.shape[2] // a.shape[1], axis=1) for a in (keys, values))
    rows, heads = split.rows or None, split.heads or None
    arrays = {"query": query, "keys": keys, "values": values, "bias": bias, "mask": mask}
    specs = {
        "query": PartitionSpec(rows, None, heads),
        "keys": PartitionSpec(rows, heads),
        "values": PartitionSpec(rows, heads),
        "bias": None if bias is None else PartitionSpec(rows if len(bias) > 1 else None, heads),
        "mask": None if mask is None else PartitionSpec(rows),
    }

    def part(arrays: dict[str, Any]) -> Array:
        return kernel(Problem(**arrays, causal=causal))

    # Kernels do not say over which axes their results vary, so that is not checked.
    mapped = jax.shard_map(part, mesh=split.mesh, in_specs=(specs,), out_specs=specs["query"], check_vma=False)
    result: Array = mapped(arrays)
    return result


# --- the kernels


def _padded(problem: Problem, multiple: Callable[[int], int]) -> tuple[Problem, slice]:
    """Returns a problem whose lengths are multiples, square when causal, and where in its result the queries are.

    `multiple` says of what, given a length.
    """
    (_, length, _, _), size = problem.query.shape, problem.keys.shape[2]
    front = size - length if problem.causal else 0
    behind_queries, behind_keys = (-n % multiple(n) for n in (front + length, size))
    query_pad, key_pad, none = (front, behind_queries), (0, behind_keys), (0, 0)
    query = jnp.pad(problem.query, (none, query_pad, none, none))
    keys, values = (jnp.pad(a, (none, none, key_pad, none)) for a in (problem.keys, problem.values))
    bias, mask = problem.bias, problem.mask
    if bias is not None:
        bias = jnp.pad(bias, (none, none, query_pad, key_pad))
    if mask is None and behind_keys and not problem.causal:
        mask = jnp.ones((len(query), size), bool)
    if mask is not None:
        mask = jnp.pad(mask, (none, key_pad))
    return Problem(query, keys, values, bias, mask, problem.causal), slice(front, front + length)


def _cudnn(problem: Problem) -> Array:
    """Returns what cuDNN computes. It takes a bias in the dtype of the queries, and even lengths beside a bias."""
    (query, keys, values, bias, mask, causal), queries = _padded(problem, lambda _: 2)
    lengths = None if mask is None else jnp.sum(mask, axis=1, dtype=jnp.int32)
    mixed = jax.nn.dot_product_attention(
        query,
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        None if bias is None else bias.astype(query.dtype),
        scale=1.0,
        is_causal=causal,
        query_seq_lengths=None if lengths is None else jnp.full_like(lengths, query.shape[1]),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return mixed[:, queries]


def _flash(problem: Problem) -> Array:
    """Returns what the Pallas TPU kernel computes.

    It is mapped over rows and the heads of a group: what these share is not mapped, and so not copied.
    """
    # Late: it imports the TPU side of Pallas, which no other machine needs.
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    (query, keys, values, bias, mask, causal), queries = _padded(problem, _block)
    batch, length, _, width = query.shape
    kv_heads, size = keys.shape[1:3]
    grouped = query.reshape(batch, length, kv_heads, -1, width).transpose(0, 3, 2, 1, 4)  # (B, G, K, T, H)
    if bias is not None:
        bias = bias.reshape(len(bias), kv_heads, -1, length, size).swapaxes(1, 2)
    kernel = functools.partial(flash_attention, causal=causal, block_sizes=_blocks(length, size))

    def one(q: Array, k: Array, v: Array, b: Array | None, m: Array | None) -> Array:
        ids = None if m is None else SegmentIds(jnp.ones((1, length), jnp.int32), m[None].astype(jnp.int32))
        return kernel(q[None], k[None], v[None], None if b is None else b[None], ids)[0]

    biased = None if bias is None else 0
    group = jax.vmap(one, (0, None, None, biased, None))
    if bias is not None and len(bias) == 1:
        bias, biased = bias[0], None
    mixed = jax.vmap(group, (0, 0, 0, biased, None if mask is None else 0))(grouped, keys, values, bias, mask)
    return mixed.transpose(0, 3, 2, 1, 4).reshape(query.shape)[:, queries]


def _block(length: int) -> int:
    """Returns of what a length is padded to a multiple: the largest block that adds at most an eighth."""
    return next((block for block in _BLOCKS[:-1] if -length % block <= length // 8), _BLOCKS[-1])


def _blocks(length: int, size: int) -> Any:
    """Returns the kernel's block sizes for padded lengths, in values and gradients alike: the largest that divide."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes

    q, k = (next(block for block in _BLOCKS if n % block == 0) for n in (length, size))
    return BlockSizes(
        block_q=q,
        block_k_major=k,
        block_k=k,
        block_b=1,
        block_q_major_dkv=q,
        block_q_dkv=q,
        block_k_major_dkv=k,
        block_k_dkv=k,
        block_q_dq=q,
        block_k_major_dq=k,
        block_k_dq=k,
    )
