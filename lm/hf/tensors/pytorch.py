"""PyTorch's own files of tensors: where each tensor lies in them. Nothing is read but the pickles.

Both layouts of `torch.save` (torch/serialization.py): the zip archive (since torch 1.6) with a pickle and a file for
each storage, and the older stream of pickles that the storages follow.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lm.errors import UserError
from lm.hf.tensors.file import DAMAGED, Place, file_size
from lm.hf.tensors.unpickle import WAY_OUT, Tensor, TensorUnpickler, damage_of

MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py: MAGIC_NUMBER, PROTOCOL_VERSION
PROTOCOL = 1001


class Span(NamedTuple):
    """Where a storage lies in the file, in bytes."""

    start: int
    size: int


class Content(NamedTuple):
    """What a file holds, and where its storages lie, by key."""

    tree: Any
    spans: dict[str, Span]
    big_endian: bool


def pickle_places(path: Path, file: BinaryIO) -> dict[str, Place]:
    """Where each tensor of an open `pytorch_model.bin` lies. UserError for a file that is cut, damaged or of another
    kind, for one that names anything but plain tensors, and for a tensor that does not fit its storage."""
    zipped = file.read(4) == b"PK\3\4"
    file.seek(0)
    tree, spans, big_endian = (_read_archive if zipped else _read_stream)(path, file)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a dict of tensors, got {_kind(tree)}; {WAY_OUT}")
    places = {}
    for name, tensor in dict.items(tree):  # not tree.items: a pickle may give its OrderedDict attributes
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            where = name if isinstance(name, str) else f"a name of type {type(name).__name__}"
            raise UserError(
                f"{path}: {where}: expected a tensor under a name, got {_kind(tensor)}: a training checkpoint rather "
                f"than a model; {WAY_OUT}"
            )
        places[name] = _place(f"{path}: {name}", tensor, spans[tensor.storage.key], big_endian)
    return places


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _place(where: str, tensor: Tensor, span: Span, big_endian: bool) -> Place:
    storage, shape, strides, size = tensor.storage, tensor.shape, tensor.strides, tensor.dtype.itemsize
    numbers = isinstance(shape, tuple) and isinstance(strides, tuple) and (tensor.first, *shape, *strides)
    if not numbers or not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise UserError(f"{where}: expected sizes, strides and an offset, got others; {DAMAGED}")
    first = storage.first * storage.dtype.itemsize + tensor.first * size
    end = first + (sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1) * size
    held = (storage.first + storage.n) * storage.dtype.itemsize
    if 0 not in shape and end > held:
        raise UserError(
            f"{where}: expected its storage {storage.key} to hold {end} bytes for shape {list(shape)}, strides "
            f"{list(strides)}, got {held}; {DAMAGED}"
        )
    return Place(shape, tensor.dtype, span.start + first, tuple(stride * size for stride in strides), big_endian)


def _read_archive(path: Path, file: BinaryIO) -> Content:
    with damage_of(path):
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as e:
            raise UserError(
                f"{path}: truncated: expected a zip archive with its table at the end, got {file_size(file)} bytes "
                f"without ({e}); download it again"
            ) from None
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
        if root is None or len(entries) != len(archive.infolist()):
            raise UserError(f"{path}: expected the archive of torch.save with one data.pkl, got another; {DAMAGED}")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise UserError(f"{path}: expected byteorder little or big, got {order[:20]!r}; {DAMAGED}")
        unpickler = TensorUnpickler(path, io.BytesIO(archive.read(f"{root}data.pkl")))
        tree = unpickler.load()
        spans = {}
        for key, storage in unpickler.storages.items():
            name = f"{root}data/{key}"
            size = storage.total * storage.dtype.itemsize
            spans[key] = _stored(path, file, name, entries.get(name), size)
    return Content(tree, spans, order == b"big")


def _stored(path: Path, file: BinaryIO, name: str, entry: zipfile.ZipInfo | None, size: int) -> Span:
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
        got = "none" if entry is None else f"{entry.file_size} bytes, compression {entry.compress_type}"
        raise UserError(f"{path}: {name}: expected {size} bytes, not compressed, got {got}; {DAMAGED}")
    # The data follow a header of 30 bytes, which ends in the lengths of the name and of what pads it.
    file.seek(entry.header_offset)
    header = file.read(30)
    start = entry.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if header[:4] != b"PK\3\4" or start + size > file_size(file):
        raise UserError(f"{path}: {name}: expected it at byte {entry.header_offset}, got none; {DAMAGED}")
    return Span(start, size)


def _read_stream(path: Path, file: BinaryIO) -> Content:
    size = file_size(file)
    with damage_of(path):
        magic = TensorUnpickler(path, file).load()
        if magic != MAGIC:
            raise UserError(f"{path}: expected the file of torch.save, got another kind of pickle; {WAY_OUT}")
        version = TensorUnpickler(path, file).load()
        if version != PROTOCOL:
            raise UserError(f"{path}: expected torch.save's protocol {PROTOCOL}, got {version!r:.40}; {WAY_OUT}")
        TensorUnpickler(path, file).load()  # about the machine that wrote it; the storages are little-endian on all
        unpickler = TensorUnpickler(path, file)
        tree = unpickler.load()
        keys = TensorUnpickler(path, file).load()
        if not isinstance(keys, list) or set(keys) != unpickler.storages.keys():
            raise pickle.UnpicklingError("a list of storages that is not that of the tensors")

    spans = {}
    at = file.tell()
    for key in keys:
        storage = unpickler.storages[key]
        file.seek(at)
        count = file.read(8)
        span = Span(at + 8, storage.total * storage.dtype.itemsize)
        at = span.start + span.size
        if at > size:
            raise UserError(
                f"{path}: truncated: expected {at} bytes or more, got {size}, which end in storage {key}; "
                "download it again"
            )
        if (n := int.from_bytes(count, "little")) != storage.total:
            raise UserError(f"{path}: storage {key}: expected {storage.total} elements, got {n}; {DAMAGED}")
        spans[key] = span
    return Content(tree, spans, big_endian=False)
