"""Where arrays live: batches split over the data axis of a mesh, everything else on every device.

`jax.jit` with `NamedSharding` is what `pjit` became. A mesh of one device costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deptjax.errors import UserError
from deptjax.typing import Tree

DATA = "data"


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh of devices with one axis, `data`, over which the rows of a batch are split."""

    mesh: Mesh

    @classmethod
    def over(cls, devices: Sequence[jax.Device] | None = None) -> Placement:
        """Returns the placement over these devices, by default all of them, on all hosts."""
        devices = jax.devices() if devices is None else devices
        # Auto axes: the compiler propagates shardings. Explicit ones, the default, reject model-sharded contractions.
        return cls(Mesh(np.asarray(devices), (DATA,), axis_types=(AxisType.Auto,)))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """The sharding of what is split by rows."""
        return NamedSharding(self.mesh, PartitionSpec(DATA))

    def check_batch_size(self, batch_size: int) -> None:
        """Raises `UserError` when the rows of a batch do not divide evenly among the devices."""
        if batch_size % self.mesh.size:
            raise UserError(f"batch_size {batch_size} does not divide among {self.mesh.size} devices; use a multiple")

    def put(self, tree: Tree) -> Tree:
        """Returns the tree on every device."""
        return jax.device_put(tree, self.replicated)

    def put_batch(self, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, jax.Array]:
        """Returns the batch of all hosts together, given this host's rows of it, which lie along `axis`."""
        rows = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, DATA))
        return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}
