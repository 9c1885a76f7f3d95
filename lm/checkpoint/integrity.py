"""The files of a step folder: which a restore needs, and whether they are as they were saved.

`seal` looks for what a restore will need and writes `checksums.json`, the size and the CRC-32 of every file there is,
before the folder gets the name by which it is found. `damage` compares. A store has checksums of its own, which it
compares whenever an object is read: there nothing is sealed, and names and sizes are compared alone. So they are of
steps that older versions saved without checksums.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from etils import epath

from lm.errors import UserError
from lm.files import is_remote
from lm.system_errors import refuse
from lm.workdir import objects, write

CHECKSUMS = "checksums.json"
ALGORITHM = "crc32"  # 3.9 GiB/s on a core, faster than disks; sha256 1.7
COMMITTED = "commit_success.txt"  # what Orbax writes last in a store, where it cannot rename a whole folder
WRITTEN_LATER = (COMMITTED, "_CHECKPOINT_METADATA")  # than the checksums
JSON_ITEMS = {"meta": "metadata", "metrics": "metrics"}  # item -> its file
PACKED = "manifest.ocdbt"  # of items that older versions packed
READERS = 8  # files at a time: a disk serves several readers faster than one
PIECE = 4 << 20  # bytes
SMALL = 64 << 10  # bytes: read at a quick look too
METADATA = ("metadata", "metrics", "_METADATA")  # read at any look: of what is in them more is decided
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EIO)  # of a file; others pass

LOOK = "`lm checkpoints list RUN` says which steps are whole"

Depth = Literal["quick", "full"]


class Damage(NamedTuple):
    """What is wrong with a step: `file` is relative to its folder."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


class Step(NamedTuple):
    """A finished step folder. items: names of what it holds."""

    folder: epath.Path
    items: tuple[str, ...]
    n_bytes: int
    sealed: bool  # has checksums


def steps(checkpoints: epath.Path) -> list[int]:
    """The numbers of the step folders that were finished, ascending; whether they still are whole says `damage`."""
    if not checkpoints.is_dir():
        return []
    # Those that are being written have more than digits in their name; in a store they lack a file.
    found = [p for p in checkpoints.iterdir() if p.name.isdigit() and p.is_dir()]
    return sorted(int(p.name) for p in found if not is_remote(p) or (p / COMMITTED).exists())


def look(folder: epath.Path) -> Step:
    """What a step folder holds."""
    files = _files(folder)
    return Step(folder, tuple(sorted(_items(files))), sum(files.values()), CHECKSUMS in files)


def seal(folder: epath.Path) -> Damage | None:
    """Writes the checksums of a folder whose files are all written; gives what a restore would miss, and then writes
    nothing."""
    files = _files(folder)
    if lacking := _lacking(folder, files, _items(files)):
        return lacking
    if not is_remote(folder):
        names = sorted(name for name in files if name not in WRITTEN_LATER)
        with ThreadPoolExecutor(READERS) as pool:
            sums = pool.map(lambda name: _crc32(folder, name), names)
            table = {name: [files[name], crc] for name, crc in zip(names, sums, strict=True)}
        write(folder / CHECKSUMS, json.dumps({"algorithm": ALGORITHM, "files": table}, indent=0))
    return None


def damage(
    folder: epath.Path, items: Collection[str] | None = None, depth: Depth = "full", share: tuple[int, int] = (0, 1)
) -> Damage | None:
    """The first file of a step folder that is not as it was saved; None: no such file is known of.

    items: those that are looked at; None: all that it should have. depth: `quick` reads no large file but metadata.
    share: (i, n) of process i of n that read each a part of the files. UserError where that cannot be told: the system
    does not let us look now, or a newer version has saved the step.
    """
    try:
        files = _files(folder)
        said = _expected_items(folder) if items is None else set(items)
        if is_remote(folder) or not (CHECKSUMS in files or _says(folder).get("custom_metadata")):
            return _lacking(folder, files, said) or (None if depth == "quick" else _unpacked(folder, files, said))
        if CHECKSUMS not in files:
            return Damage(CHECKSUMS, "missing")
        table = _checksums(folder)
        if gone := sorted(item for item in said if not any(name.startswith(f"{item}/") for name in table)):
            return Damage(gone[0], "missing")
        within = {name: e for name, e in table.items() if name.partition("/")[0] in said}
        return _compare(folder, files, within, depth, share)
    except OSError as e:
        if e.errno not in DAMAGE:
            raise refuse(e.filename or folder, e) from e
        return Damage(_relative(folder, e.filename), e.strerror or str(e))
    except _UnreadableError as e:
        return Damage(*e.args)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        return Damage("metadata", f"expected that of arrays, got something else ({type(e).__name__}: {e})")


class _UnreadableError(Exception):
    """A file of metadata that is no such file: its name, and what is wrong."""


def _compare(folder: epath.Path, files: dict[str, int], table: dict, depth: Depth, share: tuple) -> Damage | None:
    if found := _missing(files, ((name, n_bytes) for name, (n_bytes, _) in sorted(table.items()))):
        return found
    small = lambda name: table[name][0] <= SMALL or name.rpartition("/")[2] in METADATA
    names = [name for name in sorted(table) if depth == "full" or small(name)]
    with ThreadPoolExecutor(READERS) as pool:
        mine = names[share[0] :: share[1]]
        for name, crc in zip(mine, pool.map(lambda name: _crc32(folder, name), mine), strict=True):
            if crc != table[name][1]:
                pool.shutdown(cancel_futures=True)
                return Damage(name, f"expected CRC-32 {table[name][1]}, got {crc}: its bytes are not those saved")
    return None


def _lacking(folder: epath.Path, files: dict[str, int], items: Collection[str]) -> Damage | None:
    """The first file that a restore of the items needs and that is not there, or not of its size."""
    return _missing(files, itertools.chain.from_iterable(_needed(folder, files, item) for item in sorted(items)))


def _missing(files: dict[str, int], wanted: Iterable[tuple[str, int | None]]) -> Damage | None:
    """The first of the wanted files that is not there, or not of its size where that is known."""
    for name, n_bytes in wanted:
        if name not in files:
            return Damage(name, "missing")
        if n_bytes is not None and files[name] != n_bytes:
            return Damage(name, f"expected {n_bytes} bytes, got {files[name]}")
    return None


def _items(files: Iterable[str]) -> set[str]:
    return {name.partition("/")[0] for name in files if "/" in name}


def _needed(folder: epath.Path, files: dict[str, int], item: str) -> Iterator[tuple[str, int | None]]:
    """Yields the files that make an item, and the size of each where that can be told; the next ones are read of those
    before, which whoever asks has seen to be there."""
    about = f"{item}/{JSON_ITEMS.get(item, '_METADATA')}"
    yield about, None
    metadata = _json(folder, about)
    if item in JSON_ITEMS or f"{item}/{PACKED}" in files:
        return
    for leaf in metadata.get("tree_metadata", {}).values():
        if not leaf["value_metadata"].get("skip_deserialize"):  # an empty part of the tree
            array = f"{item}/{'.'.join(str(key['key']) for key in leaf['key_metadata'])}"
            yield f"{array}/.zarray", None
            yield from _chunks(array, _json(folder, f"{array}/.zarray"))


def _chunks(array: str, about: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Yields the files of an array of the Zarr format, version 2."""
    n_bytes = None if about["compressor"] else math.prod(about["chunks"]) * _itemsize(about["dtype"])
    counts = [range(math.ceil(size / chunk)) for size, chunk in zip(about["shape"], about["chunks"], strict=True)]
    for index in itertools.product(*counts):
        yield f"{array}/{about.get('dimension_separator', '.').join(map(str, index)) or '0'}", n_bytes


def _unpacked(folder: epath.Path, files: dict[str, int], items: Collection[str]) -> Damage | None:
    """Reads what was packed: its layout has checks of its own."""
    import tensorstore as ts

    if is_remote(folder):
        return None
    for item in sorted(items):
        if f"{item}/{PACKED}" not in files:
            continue
        try:
            base = {"driver": "file", "path": f"{folder / item}/"}
            packed = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
            for key in packed.list().result():
                if not packed.read(key).result().value:  # of a file that is lost it gives nothing, without an error
                    return Damage(item, f"expected {key.decode()} in it, got nothing")
        except (ValueError, OSError) as e:
            return Damage(item, str(e).partition(" [")[0])
    return None


def _expected_items(folder: epath.Path) -> set[str]:
    """The items that were saved, as the step's own metadata says; those that are there where it says nothing."""
    there = {p.name for p in folder.iterdir() if p.is_dir()}
    return there | set(_says(folder).get("item_handlers") or ()) | {"meta", "params"}


def _says(folder: epath.Path) -> dict[str, Any]:
    """What Orbax wrote of the step; {} where that is damaged, as nothing else needs it."""
    try:
        said = json.loads((folder / "_CHECKPOINT_METADATA").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _checksums(folder: epath.Path) -> dict[str, list]:
    table = _json(folder, CHECKSUMS)
    if table.get("algorithm", ALGORITHM) != ALGORITHM:
        raise UserError(
            f"{folder}: expected checksums of {ALGORITHM}, got {table['algorithm']!r}: a newer version has saved it; "
            "update this one"
        )
    try:
        return {name: [int(n_bytes), str(crc)] for name, (n_bytes, crc) in table["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _UnreadableError(CHECKSUMS, f"expected sizes and checksums, got {type(e).__name__}: {e}") from None


def _json(folder: epath.Path, name: str) -> dict[str, Any]:
    try:
        read = json.loads((folder / name).read_bytes())
    except ValueError as e:
        raise _UnreadableError(name, f"expected JSON, got {e}") from None
    if not isinstance(read, dict):
        raise _UnreadableError(name, f"expected a JSON object, got {type(read).__name__}")
    return read


def _itemsize(dtype: str) -> int:
    import jax.numpy as jnp  # knows bfloat16 and its like

    return jnp.dtype(dtype).itemsize


def _files(folder: epath.Path) -> dict[str, int]:
    """Returns the path of every file, relative to the folder, and its bytes."""
    if is_remote(folder):
        return objects(folder)
    found = {}
    for at, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = os.path.join(at, name)
            found[os.path.relpath(path, folder)] = os.path.getsize(path)
    return found


def _raise(e: OSError) -> None:
    raise e


def _relative(folder: epath.Path, path: Any) -> str:
    return os.path.relpath(path, folder) if path else "?"


def _crc32(folder: epath.Path, name: str) -> str:
    crc = 0
    with open(folder / name, "rb", buffering=0) as f:
        while piece := f.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"
