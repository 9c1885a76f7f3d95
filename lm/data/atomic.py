"""Files that have their name once they are complete, and are whole on the disk by then."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO


def temporary_name(path: Path) -> Path:
    """Where what will be `path` is written: beside it, under a name of this process on this host."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.unfinished")


def remove_temporary(paths: Iterable[Path]) -> None:
    """Removes those of the paths that are temporary: a killed process left them. Only where no other writes now."""
    for path in paths:
        if re.fullmatch(r"\..+\.\d+\.unfinished", path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when the block ends without an error, and goes otherwise."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """All of `content` under `path`, or nothing."""
    with open_atomic(path) as f:
        f.write(content)
