"""Weights between a folder and devices, one tensor at a time in both directions.

What is on a host at once is one tensor, read as a view of its file, and the part of our arrays that its devices hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lm.hf.families.table import Slot

Shape = tuple[int, ...]


def read_params(
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    shardings: Mapping[str, NamedSharding],
    dtype: DTypeLike = jnp.float32,
) -> dict:
    """The nested dict of parameters on the devices of `shardings` (by path); `read` gives a stored tensor.

    A tensor goes to the devices as it is stored, each its own part: the runtime copies a transposed view several times
    as fast as numpy does, fewer bytes travel where a tensor is smaller than `dtype`, and the cast is part of the copy
    to its place.
    """
    arrays: dict[str, jax.Array] = {}
    filled: jax.Array | None = None
    for name, slot in slots.items():
        for path, part in slot.to_ours(read(name), shapes).items():
            shape, sharding = shapes[path], shardings[path]
            piece = _piece(part, shape, sharding)
            if filled is not None:
                filled.block_until_ready()  # else a fast reader piles up pieces in memory
            array = arrays.pop(path) if path in arrays else _zeros(shape, np.dtype(dtype), sharding)()
            filled = arrays[path] = _put(sharding, len(slot.index))(array, piece, np.array(slot.index, np.int32))
    return nested(arrays)


def write_items(
    slots: Mapping[str, Slot], flat: Mapping[str, jax.Array], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor to store) of all slots in their order; flat: path -> our array; dtypes: by name."""
    for name, slot in slots.items():
        parts = {p: np.asarray(jax.device_get(flat[p][slot.index])) for p in slot.row.paths}
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
    """`part`, the last axes of an array of `shape`, where the devices hold that array."""
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

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
