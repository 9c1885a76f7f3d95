"""The device mesh: five named axes, of which any may be 1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from lm.errors import UserError

AXES = ("data", "fsdp", "expert", "seq", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; one axis may be -1 and takes what is left.

    `data` replicates parameters, `fsdp` shards them, `expert` splits experts, `seq` the sequence,
    `tensor` heads, feed-forward and vocabulary. Outer axes vary slowest, so `tensor` stays on the fastest links.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            if size != -1 and size < 1:
                raise UserError(f"mesh.{axis}: expected a positive number of devices or -1, got {size}")
        if sum(getattr(self, a) == -1 for a in AXES) > 1:
            free = " x ".join(f"{a}=-1" for a in AXES if getattr(self, a) == -1)
            raise UserError(f"mesh: only one axis may be -1, got {free}; set the others to a number")

    def sizes(self, n_devices: int) -> dict[str, int]:
        """Axis -> size with -1 resolved, for `n_devices` devices."""
        sizes = {a: getattr(self, a) for a in AXES}
        fixed = math.prod(s for s in sizes.values() if s != -1)
        if n_devices % fixed or (-1 not in sizes.values() and fixed != n_devices):
            way_out = f"use a multiple of {fixed} devices" if -1 in sizes.values() else "set one axis to -1"
            raise UserError(f"mesh: {layout(sizes)} does not fit {n_devices} devices; {way_out}, or other sizes")
        return {a: n_devices // fixed if s == -1 else s for a, s in sizes.items()}

    @property
    def n_devices(self) -> int | None:
        """The number of devices the axes ask for, None when one of them is -1."""
        return None if -1 in (getattr(self, a) for a in AXES) else self.min_devices

    @property
    def min_devices(self) -> int:
        """The least number of devices that the axes fit: -1 counts as 1."""
        return math.prod(abs(getattr(self, a)) for a in AXES)


def layout(sizes: Mapping[str, int]) -> str:
    """`data=2 x tensor=4`: the axes that are not 1, for people."""
    return " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1) or "one device"


def make_mesh(config: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all devices of all processes), laid out along the physical links."""
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(config.sizes(len(devices)).values())
    if devices[0].platform == "cpu":  # no links to follow; keeps process order, so rows of a batch stay local
        grid = np.array(devices).reshape(shape)
    else:
        # A mesh axis may be a part of a torus axis.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # The compiler places what is not constrained.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
