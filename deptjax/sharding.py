"""Where arrays live: one table of axis rules, and the mesh of devices that they map to.

Every array of a backbone has *logical axes*, named in `PARAMETERS`: `embed`, `heads`, `mlp`, ... A mesh has the axes
`data`, `fsdp` and `model`. `RULES` says which of a mesh's axes each logical axis is split over:

    data     the rows of a batch; weights are on every device
    fsdp     the rows of a batch, and every large weight along `embed`: a layer's weights are gathered when it runs
    model    heads, the MLP's hidden width and the vocabulary: each device computes its part of every layer

So the preset `fsdp+tensor` is a mesh whose axes `fsdp` and `model` are larger than 1, and a mesh of one device costs
nothing. `jax.jit` with `NamedSharding` is what `pjit` became. The trained parameters are on every device, but for those
whose method says that they are large (`Method.axes`, and full fine-tuning's, which are the backbone's own).

FSDP: Rajbhandari et al. 2020, arXiv 1910.02054 (ZeRO, stage 3). Tensor parallelism: Shoeybi et al. 2019, arXiv
1909.08053.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from deptjax.errors import UserError, nearest
from deptjax.mesh import AXES, DATA, FSDP, MODEL, Axes, MeshShape, Sizes, mesh_shape, shown
from deptjax.typing import Array, Tree

SITE = re.compile(r"\w*_site|site")  # the key of what fills an inner site (`deptjax.methods.base`)

# The logical axes of every parameter of every backbone, by the end of its path. A kernel that is quantised is a node
# with leaves of its own below this path, each of the kernel's rank.
PARAMETERS: tuple[tuple[str, Axes], ...] = (
    (r"token_embedder/embedding", ("vocab", "embed")),
    (r"(position|type)_embedder/embedding", ("positions", "embed")),
    (r"relpos_bias/rel_embedding", ("heads", "buckets")),
    (r"query/kernel", ("embed", "heads")),
    (r"(key|value)/kernel", ("embed", "kv_heads")),
    (r"out/kernel", ("heads", "embed")),
    (r"mlp/(wi|wi_0|wi_1|gate|up)/kernel", ("embed", "mlp")),
    (r"mlp/(wo|down)/kernel", ("mlp", "embed")),
    (r"logits_dense/kernel", ("embed", "vocab")),
    (r"(pooler|masked_head/dense)/kernel", ("embed", "vector")),
    (r"(pooler|masked_head/dense)/bias", ("vector",)),
    (r"masked_head/bias", ("vocab",)),
    (r"query/bias", ("heads",)),
    (r"(key|value)/bias", ("kv_heads",)),
    (r"mlp/up/bias", ("mlp",)),
    (r"(out|down)/bias", ("vector",)),
    (r"\w*norm/(scale|bias)", ("vector",)),
)
_PARAMETERS = tuple((re.compile(rf"(.*/)?{path}(/\w+)?"), axes) for path, axes in PARAMETERS)

# What each logical axis is split over. One that is not named here is whole on every device.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "embed": (FSDP,),
    "heads": (MODEL,),
    "kv_heads": (MODEL,),
    "mlp": (MODEL,),
    "vocab": (MODEL,),
    "layers": (),
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh of devices, and the rules by which arrays are laid out over it.

    Attributes:
      mesh: has the axes `data`, `fsdp` and `model`, each perhaps of size 1.
      rules: pairs of a logical axis and the mesh axes that it is split over; `RULES` and the user's own.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...] = tuple(RULES.items())

    @classmethod
    def over(
        cls,
        devices: Sequence[Any] | None = None,
        mesh: str | MeshShape | None = None,
        rules: str | Mapping[str, str | Sequence[str] | None] | None = None,
        config: Any = None,
        weight_bytes: int | None = None,
        device_bytes: int | None = None,
    ) -> Placement:
        """Returns the placement over these devices, by default all of them, on all hosts.

        Args:
          devices: of this run, or of a topology that is only described.
          mesh: the size of each axis, as `data:2,fsdp:4` or a mapping; a preset (`data`, `fsdp`, `tensor`,
            `fsdp+tensor`), which fits the number of devices; `auto`, by the size of the model; `None` is `data`.
          rules: what a logical axis is split over instead of what `RULES` says, `None` for nothing; a mapping, or a
            text such as `vocab:none,embed:fsdp+model`.
          config: of the backbone, whose sizes the mesh must divide.
          weight_bytes: the size of the weights, for `auto`.
          device_bytes: the memory of a device, for `auto`; by default what the device says.

        Raises `UserError` for a mesh that does not fit the devices or divide the model, which names one that does.
        """
        devices = jax.devices() if devices is None else list(devices)
        merged = _merged(rules)
        memory = _memory_of(devices[0]) if device_bytes is None else device_bytes
        sizes = {} if config is None else sizes_of(config)
        shape = mesh_shape(mesh, len(devices), sizes, merged, weight_bytes, memory)
        # Auto axes: the compiler propagates shardings. Explicit ones, the default, reject model-sharded contractions.
        return cls(Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * 3), tuple(merged.items()))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """The sharding of what is split by rows."""
        return self.sharding("batch")

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in self._mesh_axes("batch"))

    @property
    def shape(self) -> MeshShape:
        """The size of each axis of the mesh that is larger than 1."""
        return {axis: size for axis, size in self.mesh.shape.items() if size > 1}

    def __str__(self) -> str:
        return shown(self.mesh.shape)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns the sharding of an array with these logical axes; `None` is an axis that is whole."""
        # As the compiler writes it, so that a step's result has the very sharding of its argument, and compiles once.
        split = [tuple(name for name in self._mesh_axes(axis) if self.mesh.shape[name] > 1) for axis in axes]
        while split and not split[-1]:
            split.pop()
        return NamedSharding(self.mesh, PartitionSpec(*(s[0] if len(s) == 1 else s or None for s in split)))

    def check_batch_size(self, batch_size: int, name: str = "batch_size") -> None:
        """Raises `UserError` when the rows of a batch do not divide evenly among the parts of the mesh."""
        if batch_size % self.row_parts:
            below = batch_size - batch_size % self.row_parts
            use = " or ".join(str(size) for size in (below, below + self.row_parts) if size)
            raise UserError(
                f"{name} {batch_size} does not divide among the {self.row_parts} parts of the mesh {self}; use {use}"
            )

    def of_backbone(self, params: Tree) -> Tree:
        """Returns the sharding of each leaf, concrete or abstract, of a backbone's parameters.

        Raises `UserError` for a parameter that `PARAMETERS` does not cover.
        """
        return jax.tree_util.tree_map_with_path(
            lambda path, a: self.fitting(backbone_axes(_names(path)), a.shape), params
        )

    def of_trainable(self, tree: Tree, axes: Mapping[str, Axes], members: bool = False) -> Tree:
        """Returns the sharding of each leaf of `trainable`, or of a tree that holds copies of it: a training state.

        Args:
          tree: its leaves concrete or abstract.
          axes: of a method (`Method.axes`).
          members: whether leaves have a leading axis of members.
        """

        def of_leaf(path: Any, leaf: Any) -> NamedSharding:
            return self.fitting(trainable_axes(_names(path), leaf.ndim, axes, members), leaf.shape)

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def put(self, tree: Tree, shardings: Tree | None = None) -> Tree:
        """Returns the tree on the devices, by default whole on each; every host must have all of the tree."""
        if shardings is None:
            return jax.tree.map(lambda leaf: put_leaf(leaf, self.replicated), tree)
        return jax.tree.map(put_leaf, tree, shardings)

    def put_batch(self, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, jax.Array]:
        """Returns the batch of all hosts together, given this host's part of its rows, which lie along `axis`."""
        sharding = self.sharding(*[None] * axis, "batch")
        part, parts = self.host_part

        def placed(own: np.ndarray) -> jax.Array:
            rows = own.shape[axis]
            shape = (*own.shape[:axis], rows * parts, *own.shape[axis + 1 :])

            def piece(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # it is for arrays without axes alone
                low, high, _ = index[axis].indices(shape[axis])
                return own[(*index[:axis], slice(low - part * rows, high - part * rows))]

            return jax.make_array_from_callback(shape, sharding, piece)

        return {name: placed(np.asarray(own)) for name, own in batch.items()}

    @functools.cached_property
    def host_part(self) -> tuple[int, int]:
        """Which of how many equal parts of a batch's rows this host's devices work on.

        Hosts that share the rows, because the model is split between them, have the same part.
        """
        held = self.rows.addressable_devices_indices_map((self.row_parts,)).values()
        own = sorted({row for index in held for row in range(*(index or ())[0].indices(self.row_parts))})
        parts, rest = divmod(self.row_parts, len(own))
        if rest or own != list(range(own[0], own[0] + len(own))) or own[0] % len(own):
            return 0, 1  # parts that do not lie together: each host makes the whole batch
        return own[0] // len(own), parts

    @contextlib.contextmanager
    def activations(self) -> Iterator[None]:
        """While a step is traced under it, `split_rows` keeps activations split by the rows of the batch."""
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def _mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        return dict(self.rules).get(axis, ()) if axis else ()

    def fitting(self, axes: Axes, shape: Sequence[int]) -> NamedSharding:
        """Returns the sharding of an array; an axis that does not divide, such as that of few scales, is whole."""
        kept = [
            axis if size % math.prod(self.mesh.shape[name] for name in self._mesh_axes(axis)) == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        ]
        return self.sharding(*kept)


_IN_USE: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


def placement_in_use() -> Placement | None:
    """Returns the placement that a step is being traced for, or `None`."""
    return _IN_USE.get()


def split_rows(x: Array) -> Array:
    """Returns activations (B, ...), split by rows and whole otherwise where a step is traced for a placement.

    Without it the compiler might split them as the weights are, and add up partial sums of activations instead of
    gathering a layer's weights, which are fewer bytes.
    """
    placement = _IN_USE.get()
    if placement is None or placement.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, placement.sharding("batch", *[None] * (x.ndim - 1)))


def backbone_axes(names: Sequence[str]) -> Axes:
    """Returns the logical axes of the backbone's parameter at a path.

    >>> backbone_axes(("layers_0", "attention", "query", "kernel"))
    ('embed', 'heads')
    >>> backbone_axes(("layers", "mlp", "down", "kernel"))
    ('layers', 'mlp', 'embed')
    """
    path = "/".join(names)
    for pattern, axes in _PARAMETERS:
        if pattern.fullmatch(path):
            return ("layers", *axes) if "layers" in names else axes
    raise UserError(f"no axis rule covers parameter '{path}'; add its logical axes to deptjax.sharding.PARAMETERS")


def trainable_axes(names: Sequence[str], rank: int, axes: Mapping[str, Axes], members: bool = False) -> Axes:
    """Returns the logical axes of a trained parameter, or of a moment of it, by its path in a state.

    `in` and `out` among the axes of a method are those of the kernel beside which the parameter lies.
    """
    whole: Axes = (None,) * rank
    names = _in_tree(list(names))
    if rank == 0 or not names:
        return whole
    at = next((i for i, name in enumerate(names) if SITE.fullmatch(name)), None)
    if at is None:
        own = backbone_axes(names) if names and rank > int(members) else ()
    elif names[-1] in axes:
        features_in, features_out = backbone_axes([*names[:at], "kernel"])[-2:]
        beside = {"in": features_in, "out": features_out}
        own = tuple(beside.get(axis, axis) if axis else None for axis in axes[names[-1]])
        own = ("layers", *own) if "layers" in names else own
    else:
        return whole
    lead = ("members",) if members else ()
    return (*lead, *own) if len(own) + len(lead) == rank else whole


def _in_tree(names: list[str]) -> list[str]:
    """Returns a path below the root of the model that it belongs to, of a backbone or a tuned encoder; else nothing.

    Groups of the optimiser have such names too, so that of a moment is the part behind `mu` or `nu`.
    """
    marks = [at for at, name in enumerate(names) if name in ("trainable", "mu", "nu", "acc_grads")]
    names = names[marks[-1] + 1 :] if marks else names
    if names[:1] == ["encoder"]:
        return names[1:]
    return names[len(names) - names[::-1].index("backbone") :] if "backbone" in names else []


def sizes_of(config: Any) -> Sizes:
    """Returns the size of each logical axis of a backbone that a mesh may split."""
    return {
        "embed": config.width,
        "heads": config.num_heads,
        "kv_heads": getattr(config, "num_kv_heads", config.num_heads),
        "mlp": config.mlp_dim,
        "vocab": config.vocab_size,
    }


def put_leaf(leaf: Any, sharding: Sharding) -> jax.Array:
    """Returns an array, or a key, that every host has, on the devices of a sharding."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put_leaf(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(tree: Tree) -> Tree:
    """Returns a tree's arrays as numpy arrays, gathered from all hosts: every host must call it, at the same place."""

    def gathered(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            assert isinstance(leaf.sharding, NamedSharding)  # as `Placement` makes them
            leaf = jax.jit(lambda a: a, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        return leaf

    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(gathered, tree)))


def _merged(rules: str | Mapping[str, str | Sequence[str] | None] | None) -> dict[str, tuple[str, ...]]:
    """Returns `RULES` with the user's own in their places."""
    merged = dict(RULES)
    if isinstance(rules, str):
        rules = {name.strip(): axes.strip() for name, _, axes in (rule.partition(":") for rule in rules.split(","))}
    for name, given in (rules or {}).items():
        axes = tuple(given.split("+")) if isinstance(given, str) else tuple(given or ())
        axes = () if axes == ("none",) else axes
        if name not in merged:
            raise UserError(
                f"sharding rule '{name}': there is no such logical axis; there are {', '.join(merged)}."
                f"{nearest(name, merged)}"
            )
        for axis in axes:
            if axis not in AXES:
                raise UserError(
                    f"sharding rule '{name}:{axis}': there is no such axis of a mesh; there are {', '.join(AXES)}, or "
                    f"none.{nearest(axis, AXES)}"
                )
        merged[name] = axes
    return merged


def _arranged(shape: MeshShape, devices: list[Any]) -> np.ndarray:
    """Returns the devices as the mesh has them; on TPUs so that neighbours on an axis are neighbours in the machine."""
    sizes = tuple(shape[axis] for axis in AXES)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(sizes)


def _memory_of(device: Any) -> int | None:
    try:
        stats = device.memory_stats()
    except Exception:  # a device of a topology is only described, and each kind refuses in its own way
        return None
    return stats.get("bytes_limit") if stats else None


def _names(path: Any) -> tuple[str, ...]:
    """Returns the keys and fields on a path in a tree."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
