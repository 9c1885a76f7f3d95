"""Which rows of a batch are this process's, and the way to global arrays."""

from __future__ import annotations

import jax
import numpy as np

from lm.data.loader.reader import Batch
from lm.errors import UserError


class HostRows:
    """The rows of a global batch that this process's devices hold, and the way back to global arrays.

    sharding: its first dimension is the batch; the others are not split, whatever arrays the objective makes.
    """

    def __init__(self, sharding: jax.sharding.NamedSharding, batch_size: int):
        if any(axis is not None for axis in sharding.spec[1:]):
            raise UserError(f"sharding: expected one that splits rows only, got {sharding.spec}; the step may reshard")
        self.batch_size = batch_size
        self.sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
        try:
            placed = self.sharding.addressable_devices_indices_map((batch_size,))
        except ValueError:
            raise UserError(
                f"batch_size: expected a multiple of the {self._parts()} devices that {sharding.spec} splits it over, "
                f"got {batch_size}"
            ) from None
        # A set: devices along other axes have the same rows.
        ranges = sorted({index[0].indices(batch_size)[:2] for index in placed.values() if index})
        self.rows = np.concatenate([np.arange(*r, dtype=np.int64) for r in ranges])
        sizes = [stop - start for start, stop in ranges]
        self._at = {start: int(at) for (start, _), at in zip(ranges, np.cumsum(sizes) - sizes, strict=True)}

    def _parts(self) -> int:
        axes = self.sharding.spec[0]
        return int(np.prod([self.sharding.mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes)]))

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """Arrays of this process's rows [n, ...] -> global arrays [batch_size, ...], on the devices of the sharding."""
        return {name: self._put(x) for name, x in batch.items()}

    def _put(self, x: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(self.batch_size)
            return x[self._at[start] : self._at[start] + stop - start]

        return jax.make_array_from_callback((self.batch_size, *x.shape[1:]), self.sharding, part)
