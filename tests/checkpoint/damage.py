"""Ways in which a step folder is damaged: by disks, copies that were stopped, tools and people."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def array_file(step: Path, item: str = "params") -> Path:
    """The largest file of an item."""
    return max((p for p in Path(step / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(step: Path, item: str = "params") -> str:
    path = array_file(step, item)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a disk does not tell
    return str(path.relative_to(step))


def cut(step: Path) -> str:
    path = array_file(step)
    path.write_bytes(path.read_bytes()[:10])
    return str(path.relative_to(step))


def lose(step: Path) -> str:
    path = array_file(step)
    path.unlink()
    return str(path.relative_to(step))


def lose_item(step: Path) -> str:
    shutil.rmtree(step / "train")
    return "train"


def lose_meta(step: Path) -> str:
    shutil.rmtree(step / "meta")
    return "meta"


def empty(step: Path) -> str:
    shutil.rmtree(step)
    step.mkdir()
    return ""


def spoil_metadata(step: Path) -> str:
    (step / "params" / "_METADATA").write_bytes(b"{")
    return "params/_METADATA"


def spoil_meta(step: Path) -> str:
    path = step / "meta" / "metadata"
    path.write_bytes(path.read_bytes()[:-3])
    return "meta/metadata"


def spoil_checksums(step: Path) -> str:
    (step / "checksums.json").write_bytes(b"\xff[]")
    return "checksums.json"


def make_folder_of_file(step: Path) -> str:
    path = array_file(step)
    path.unlink()
    path.mkdir()
    return str(path.relative_to(step))


DAMAGES: list[Callable[[Path], str]] = [
    flip,
    cut,
    lose,
    lose_item,
    lose_meta,
    empty,
    spoil_metadata,
    spoil_meta,
    spoil_checksums,
    make_folder_of_file,
]
