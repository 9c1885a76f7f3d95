"""The safetensors format: 8 bytes with the length of a JSON header, the header, the tensors without gaps.

https://huggingface.co/docs/safetensors: the checks are those of its reference reader, with messages that tell which
tensor is wrong, and one more: a name may not stand twice in the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lm.errors import UserError
from lm.hf.tensors.file import DAMAGED, DTYPES, Place, file_size, parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader
METADATA = "__metadata__"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def safetensors_places(path: Path, file: BinaryIO) -> dict[str, Place]:
    """Where each tensor of an open safetensors file lies. UserError for a file that is cut, damaged or of another
    kind, and for dtypes that are not in DTYPES."""
    size = file_size(file)
    length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
    if length > MAX_HEADER_BYTES:
        raise UserError(
            f"{path}: expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got {length}; {DAMAGED}"
        )
    data = 8 + length
    if size < data:
        raise UserError(
            f"{path}: truncated: expected {data} bytes or more, got {size}, which end in the header; download it again"
        )
    header = parse_json(path, file.read(length), "header")
    header.pop(METADATA, None)
    places = {name: _place(path, name, entry, data) for name, entry in header.items()}

    at = data
    whole = None
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if place.start != at:
            what = "another tensor's bytes" if place.start < at else "unused bytes before it"
            raise UserError(f"{path}: {name}: expected its data at byte {at}, got {place.start} ({what}); {DAMAGED}")
        at += place.n_bytes
        if whole is None and at > size:
            whole = name
    if size < at:
        raise UserError(f"{path}: truncated: expected {at} bytes, got {size}, which end in {whole}; download it again")
    if size > at:
        raise UserError(f"{path}: expected {at} bytes, got {size}, more than the header tells of; {DAMAGED}")
    return places


def _place(path: Path, name: str, entry: object, data: int) -> Place:
    where = f"{path}: {name}"
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]}:
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise UserError(f"{where}: expected sizes and offsets, got {shape}, [{begin}, {end}]; {DAMAGED}")
        case _:
            raise UserError(f"{where}: expected dtype, shape, data_offsets, got {str(entry)[:80]}; {DAMAGED}")
    if kind not in DTYPES:
        raise UserError(
            f"{where}: expected a dtype of {', '.join(DTYPES)}, got {kind}; quantized weights are not read: get the "
            "version of this model in BF16 or F32"
        )
    expected = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != expected:
        raise UserError(f"{where}: expected {expected} bytes for {kind} {shape}, got {end - begin}; {DAMAGED}")
    return Place(tuple(shape), DTYPES[kind], data + begin)


def safetensors_layout(
    infos: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """(the file's opening bytes, the byte of the file at which each tensor starts) for tensors of these shapes and
    dtypes, all in DTYPES. The file is the opening and the tensors, without gaps.

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
    raw += b" " * (-len(raw) % 8)
    opening = len(raw).to_bytes(8, "little") + raw
    return opening, {name: len(opening) + start for name, start in starts.items()}
