"""Writes a model folder: safetensors as a stream, tensor by tensor, and the folder itself, all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.files import check_folder
from lm.hf.tensors.safetensors import METADATA, NAMES, safetensors_layout

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# transformers refuses safetensors that do not tell which framework their layout is for.
PYTORCH = {"format": "pt"}

Infos = dict[str, tuple[tuple[int, ...], np.dtype]]


def write_tensors(
    folder: str | Path,
    items: Iterable[tuple[str, np.ndarray]],
    *,
    infos: Mapping[str, tuple[tuple[int, ...], Any]],
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] = PYTORCH,
) -> None:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and their index if it would be larger than
    `max_shard_bytes`. Holds one tensor at a time (two where an item is not in C order).

    items: (name, array) in the order of `infos`; infos: name -> (shape, dtype) of all of them, which decide the files
    before the first array is made. A tensor above `max_shard_bytes` gets a shard of its own. The files get their names
    when all are complete, and then replace the safetensors of an earlier save; an error leaves the folder as it was.

    UserError for dtypes that safetensors has not, items that differ from `infos`, and a full disk.
    """
    folder = Path(folder)
    plain = {name: _check_info(folder, name, shape, dtype) for name, (shape, dtype) in infos.items()}
    if max_shard_bytes < 1:
        raise UserError(f"{folder}: expected max_shard_bytes of at least 1, got {max_shard_bytes}")
    shards = _plan(plain, max_shard_bytes)
    n = len(shards)
    names = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in (*names, INDEX)}
    try:
        with _disk_errors(folder):
            _write_shards(folder, items, plain, shards, [temporary[name] for name in names], metadata)
            if n > 1:
                total = sum(_n_bytes(info) for info in plain.values())
                weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                temporary[INDEX].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
                names.append(INDEX)
            for name in names:
                with open(temporary[name], "rb") as file:
                    os.fsync(file.fileno())
        # Without an index nobody takes shards of two saves for one model, should we be stopped in between.
        (folder / INDEX).unlink(missing_ok=True)
        for name in names:
            os.replace(temporary[name], folder / name)
        for old in folder.iterdir():
            if old.name not in names and (old.name == SINGLE or SHARD.fullmatch(old.name)):
                old.unlink()
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _n_bytes(info: tuple[tuple[int, ...], np.dtype]) -> int:
    return math.prod(info[0]) * info[1].itemsize


def _check_info(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> tuple[tuple[int, ...], np.dtype]:
    dtype = np.dtype(dtype)
    if dtype not in NAMES:
        known = ", ".join(str(d) for d in NAMES)
        raise UserError(f"{folder}: {name}: expected a dtype of {known}, got {dtype}; cast it first")
    if name == METADATA:
        raise UserError(f"{folder}: {name}: expected the name of a tensor, got one that safetensors keeps for itself")
    return tuple(int(n) for n in shape), dtype


def _plan(infos: Infos, max_bytes: int) -> list[Infos]:
    """Cuts as `split_state_dict_into_shards_factory` of huggingface_hub does: the shards are those of transformers."""
    shards: list[Infos] = []
    current: Infos = {}
    filled = 0
    for name, info in infos.items():
        size = _n_bytes(info)
        if size > max_bytes:
            shards.append({name: info})
            continue
        if filled + size > max_bytes:
            shards.append(current)
            current, filled = {}, 0
        current[name] = info
        filled += size
    return [*shards, current] if current or not shards else shards


def _write_shards(
    folder: Path,
    items: Iterable[tuple[str, np.ndarray]],
    infos: Infos,
    shards: list[Infos],
    paths: list[Path],
    metadata: Mapping[str, str],
) -> None:
    at: dict[str, tuple[Path, int]] = {}
    for path, shard in zip(paths, shards, strict=True):
        opening, starts = safetensors_layout(shard, metadata)
        path.write_bytes(opening)
        at |= {name: (path, start) for name, start in starts.items()}
    expected = iter(infos.items())
    for name, item in items:
        wanted, (shape, dtype) = next(expected, (None, ((), None)))
        if name != wanted:
            raise UserError(f"{folder}: expected {_tensor(wanted)} next, got {_tensor(name)}; give them as in `infos`")
        array = np.asarray(item)
        if (array.shape, array.dtype) != (shape, dtype):
            raise UserError(
                f"{folder}: {name}: expected {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}; "
                "`infos` tell another tensor"
            )
        path, start = at[name]
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del array, item  # before the next is made
    if (missing := next(expected, None)) is not None:
        raise UserError(f"{folder}: expected {_tensor(missing[0])} next, got no more; give all tensors of `infos`")


def _tensor(name: str | None) -> str:
    return "no more" if name is None else f"tensor {name!r}"


@contextlib.contextmanager
def write_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`with write_folder("out") as temporary:` gives a new directory beside `folder` that takes its name at the end,
    or goes if there was an error.

    UserError if `folder` is a file, or is not empty and `overwrite` is not set. With `overwrite` all that was in it
    goes, after the new content is complete.
    """
    check_folder(Path(folder))
    folder = Path(folder).resolve()
    check_folder(folder.parent)  # where the new one is made
    _check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _disk_errors(folder):
            yield temporary
        _check_target(folder, overwrite)  # it may have been filled meanwhile
        if folder.exists():
            os.rename(folder, replaced)
        try:
            os.rename(temporary, folder)
        except OSError:
            if replaced.exists():
                os.rename(replaced, folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(folder: Path, overwrite: bool) -> None:
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if found and not overwrite:
        listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"{folder}: expected a new or empty folder, got {listed} in it; give another, or set overwrite")
    if found and Path.cwd().is_relative_to(folder):
        raise UserError(f"{folder}: expected a folder that can go, got one around the working directory; give another")


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: disk full while writing: nothing was kept; free space and run again") from e
        raise
