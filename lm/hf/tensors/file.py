"""What the formats of tensor files share: where a tensor lies in its file, and the file seen as read-only memory."""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from lm.errors import UserError

DAMAGED = "the file is damaged or of another kind: download it again"
# The dtypes of weights and buffers, under the names that safetensors gives them.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class Place(NamedTuple):
    """Where a tensor lies: from byte `start` of its file on, `strides` in bytes (None: in C order)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    strides: tuple[int, ...] | None = None
    big_endian: bool = False

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Parse = Callable[[Path, BinaryIO], dict[str, Place]]


class TensorFile:
    """One file of tensors, its layout checked by `parse` and its content mapped into memory.

    Arrays are views of one mapping, which lives as long as the last of them.
    """

    def __init__(self, path: Path, parse: Parse):
        self.path = path
        with open(path, "rb") as file:
            pointer = b"version https://git-lfs"
            if file.read(len(pointer)) == pointer:
                raise UserError(
                    f"{path}: expected tensors, got a Git LFS pointer to them; run `git lfs pull` in its folder"
                )
            file.seek(0)
            self.places = parse(path, file)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """A read-only view, or a copy where the bytes have to be swapped."""
        place = self.places[name]
        if place.n_bytes == 0:
            return np.empty(place.shape, place.dtype)
        dtype, size = place.dtype, place.dtype.itemsize
        # As integers: bfloat16 has no byte order in numpy.
        stored = np.dtype(f">u{size}") if place.big_endian else dtype
        array = np.ndarray(place.shape, stored, self._map, place.start, place.strides)
        extent = sum((n - 1) * stride for n, stride in zip(place.shape, array.strides, strict=True)) + size
        # At exit the map may be gone before the arrays.
        weakref.finalize(array, _release, self._map, place.start, place.start + extent).atexit = False
        if place.big_endian:
            array = array.astype(f"<u{size}").view(dtype)
            array.flags.writeable = False
        return array


def _release(memory: mmap.mmap, start: int, stop: int) -> None:
    """Takes pages out of the process's resident memory; whoever still looks at one gets it back from the file."""
    start -= start % mmap.PAGESIZE
    memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


def file_size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def parse_json(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `raw`. UserError where it is none, or names a thing twice: json alone keeps the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise UserError(f"{path}: {what}: expected each name once, got {name!r} duplicated; {DAMAGED}")
            seen[name] = value
        return seen

    try:
        parsed = json.loads(raw, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: {what}: expected JSON, got {e}; {DAMAGED}") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: {what}: expected a JSON object, got {type(parsed).__name__}; {DAMAGED}")
    return parsed
