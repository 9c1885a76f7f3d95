"""Weights between a folder and devices, one tensor at a time in both directions.

What is on a host at once is one tensor, read as a view of its file, and the part of our arrays that its devices hold.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lm.hf.families.table import Slot

Shape = tuple[int, ...]

# Up to here numpy's slow cast and copy take less time than XLA needs to compile the program that does it on devices.
HOST_BYTES = 2**24


def read_params(
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    shardings: Mapping[str, NamedSharding],
    dtype: DTypeLike = jnp.float32,
) -> dict:
    """The nested dict of parameters on the devices of `shardings` (by path); `read` gives a stored tensor.

    An array of up to HOST_BYTES is put together on the host. The tensors of a larger one go to the devices as they are
    stored, each device its own part: the runtime copies a transposed view several times as fast as numpy does, fewer
    bytes travel where a tensor is smaller than `dtype`, and the cast is part of the copy to its place.
    """
    left = collections.Counter(path for slot in slots.values() for path in slot.row.paths)
    host: dict[str, np.ndarray] = {}
    arrays: dict[str, jax.Array] = {}
    filled: jax.Array | None = None
    for name, slot in slots.items():
        for path, part in slot.to_ours(read(name), shapes).items():
            shape, sharding = shapes[path], shardings[path]
            left[path] -= 1
            if math.prod(shape) * np.dtype(dtype).itemsize <= HOST_BYTES:
                if path not in host:
                    host[path] = np.empty(shape, dtype)
                host[path][slot.index] = part
                if not left[path]:
                    arrays[path] = jax.make_array_from_callback(shape, sharding, host.pop(path).__getitem__)
                continue
            piece = _piece(part, shape, sharding)
            if filled is not None:
                filled.block_until_ready()  # else a fast reader piles up pieces in memory
            array = arrays.pop(path) if path in arrays else _zeros(shape, np.dtype(dtype), sharding)()
            # The index is an argument: as a constant each place would be compiled.
            filled = arrays[path] = _put(sharding, len(slot.index))(array, piece, np.array(slot.index, np.int32))
    return nested(arrays)


def write_items(
    slots: Mapping[str, Slot], flat: Mapping[str, jax.Array], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor to store) of all slots in their order; flat: path -> our array; dtypes: by name."""
    host: dict[str, np.ndarray] = {}  # small arrays of the row that is being written, whose slots stand together
    for name, slot in slots.items():
        if host.keys() - set(slot.row.paths):
            host = {}
        parts = {}
        for path in slot.row.paths:
            if flat[path].nbytes > HOST_BYTES:
                parts[path] = np.asarray(jax.device_get(flat[path][slot.index]))
                continue
            if path not in host:
                host[path] = np.asarray(jax.device_get(flat[path]))
            parts[path] = host[path][slot.index]
        yield name, np.ascontiguousarray(slot.to_theirs(parts)).astype(dtypes[name], copy=False)


def nested(flat: Mapping[str, Any]) -> dict:
    """`layers.attn.q` -> leaf as a nested dict."""
    out: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = out
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def _piece(part: np.ndarray, shape: Shape, sharding: NamedSharding) -> jax.Array:
    """Puts `part`, the last axes of an array of `shape`, where the devices hold that array."""
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    own = NamedSharding(sharding.mesh, PartitionSpec(*spec[len(shape) - part.ndim :]))
    return jax.make_array_from_callback(part.shape, own, lambda index: part[index])


@functools.lru_cache(maxsize=64)
def _zeros(shape: Shape, dtype: np.dtype, sharding: NamedSharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _put(sharding: NamedSharding, n: int) -> Any:
    """Writes a piece at an index [n] of the first axes of an array, which is consumed."""

    def put(array: jax.Array, piece: jax.Array, index: jax.Array) -> jax.Array:
        start = [index[i] for i in range(n)] + [0] * piece.ndim
        piece = piece.reshape((1,) * n + piece.shape).astype(array.dtype)
        return jax.lax.dynamic_update_slice(array, piece, start)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)  # in place: two of the largest array may not fit
