"""The safetensors format, by the library of that name.

The library reads and checks a header; we say where the tensors lie that it found, so that each is a view of the mapped
file as in PyTorch's files, and put into words how a file was cut. Writing is ours: the library takes all tensors of a
file at once, while `lm.hf.tensors.write` holds one. A file is 8 bytes with the length of a JSON header, the header, and
the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from lm.errors import UserError
from lm.hf.tensors.file import DAMAGED, DTYPES, Place, file_size, parse_json

MAX_HEADER_BYTES = 100_000_000  # the library's limit
METADATA = "__metadata__"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def safetensors_places(path: Path, file: BinaryIO) -> dict[str, Place]:
    """Finds where each tensor of an open safetensors file lies. UserError for a file that is cut, damaged or of another
    kind, and for dtypes that are not in DTYPES."""
    size = file_size(file)
    length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
    if length > MAX_HEADER_BYTES:
        raise UserError(
            f"{path}: expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got {length}; {DAMAGED}"
        )
    at = data = 8 + length
    if size < data:
        raise UserError(
            f"{path}: truncated: expected {data} bytes or more, got {size}, which end in the header; download it again"
        )
    header = parse_json(path, file.read(length), "header")  # of a name that stands twice the library takes the last
    places = {}
    try:
        with safe_open(path, framework="np") as opened:
            for name in opened.offset_keys():  # without gaps: one begins where the last ends
                tensor = opened.get_slice(name)
                kind, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if kind not in DTYPES:
                    raise UserError(
                        f"{path}: {name}: expected a dtype of {', '.join(DTYPES)}, got {kind}; quantized weights are "
                        "not read: get the version of this model in BF16 or F32"
                    )
                places[name] = Place(shape, DTYPES[kind], at)
                at += places[name].n_bytes
    except SafetensorError as e:
        _check_size(path, header, data, size)
        said = str(e).removeprefix("Error while deserializing header: ")
        raise UserError(f"{path}: expected a header of safetensors, got {said}; {DAMAGED}") from None
    return places


def _check_size(path: Path, header: dict[str, Any], data: int, size: int) -> None:
    """Raises UserError where the file is not as long as its header says: the library has one message for all such."""
    ends = {}
    for name, entry in header.items():
        match entry:
            case {"data_offsets": [int(), int(end)]}:
                ends[name] = data + end
    expected = max([data, *ends.values()])
    if size < expected:
        cut = next(name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size)
        raise UserError(
            f"{path}: truncated: expected {expected} bytes, got {size}, which end in {cut}; download it again"
        )
    if size > expected:
        raise UserError(f"{path}: expected {expected} bytes, got {size}, more than the header tells of; {DAMAGED}")


def safetensors_layout(
    infos: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Lays out a file: (its opening bytes, the byte of the file at which each tensor starts) for tensors of these
    shapes and dtypes, all in DTYPES. The file is the opening and the tensors, without gaps.

    Wide dtypes come first, else in the order of `infos`: so each tensor is aligned to its own dtype.
    """
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    starts, at = {}, 0
    for name in sorted(infos, key=lambda name: -infos[name][1].itemsize):
        shape, dtype = infos[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        starts[name], at = at, end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the tensors begin at a multiple of 8
    opening = len(raw).to_bytes(8, "little") + raw
    return opening, {name: len(opening) + start for name, start in starts.items()}
