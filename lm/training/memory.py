"""How many bytes a device holds."""

from __future__ import annotations

import dataclasses
import math

import jax

from lm import sharding
from lm.config import Config
from lm.training.state import StateSpec


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Bytes on each device while the step runs, without activations."""

    params: int
    optimizer: int
    gradients: int
    ema: int

    @property
    def total(self) -> int:
        return self.params + self.optimizer + self.gradients + self.ema


def device_bytes(config: Config, n_devices: int) -> DeviceBytes:
    """Counts by arithmetic from axes and rules, for a mesh that need not exist. Raises where the rules do not fit
    it."""
    sizes = config.mesh.sizes(n_devices)
    spec = StateSpec.of(config)

    def size(abstract, names) -> int:
        def one(path, leaf, axes):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            spec = sharding.spec_for(config.rules, sizes, axes, leaf.shape, where)
            return math.prod(sharding.shard_shape(sizes, spec, leaf.shape)) * leaf.dtype.itemsize

        return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(one, abstract, names)))

    params, optimizer, ema = (
        size(abstract, axes) for abstract, axes in zip(spec.abstract[1:], spec.axes[1:], strict=True)
    )
    return DeviceBytes(params, optimizer, params, ema)  # gradients have the size and place of parameters
