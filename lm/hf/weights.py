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

from lm.hf.table import Slot

Shape = tuple[int, ...]


def read_params(
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    shardings: Mapping[str, NamedSharding],
    dtype: DTypeLike = jnp.float32,
) -> dict:
    """The nested dict of parameters on the devices of `shardings` (by path); `read` gives a stored tensor."""
    arrays: dict[str, jax.Array] = {}
    for name, slot in slots.items():
        for path, part in slot.to_ours(read(name), shapes).items():
            _store(arrays, path, slot.index, part, shapes[path], shardings[path], np.dtype(dtype))
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


def _store(
    arrays: dict[str, jax.Array],
    path: str,
    index: tuple[int, ...],
    part: np.ndarray,
    shape: Shape,
    sharding: NamedSharding,
    dtype: np.dtype,
) -> None:
    """Puts `part` at `index` of the array at `path`, which the first part makes.

    The part goes to the devices as it is stored: the runtime copies a transposed view several times as fast as numpy
    does, half the bytes are moved where it has half the size, and the cast is free in the copy to its place.
    """
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    own = NamedSharding(sharding.mesh, PartitionSpec(*spec[len(index) :]))
    piece = jax.make_array_from_callback(part.shape, own, lambda i: part[i])
    if path not in arrays:
        arrays[path] = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    arrays[path] = _putter(sharding, len(index))(arrays[path], piece, np.array(index, np.int32))


@functools.lru_cache(maxsize=64)
def _putter(sharding: NamedSharding, n: int) -> Any:
    def put(array, piece, index):
        start = [index[i] for i in range(n)] + [0] * piece.ndim
        piece = piece.reshape((1,) * n + piece.shape).astype(array.dtype)
        return jax.lax.dynamic_update_slice(array, piece, start)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
