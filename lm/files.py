"""Files that have their name once they are complete, and are whole on the disk by then; and locks on files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from lm.errors import UserError

Log = Callable[[str], None]  # a line for whoever waits


def is_remote(address: object) -> bool:
    """Whether this is an address in an object store and no local path."""
    return "://" in str(address)


def temporary_name(path: Path) -> Path:
    """Where what will be `path` is written: beside it, under a name of this process on this host."""
    # Hosts that share a folder may have one pid.
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
            os.fsync(f.fileno())  # before the rename: after a crash the name must not be of an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes all of `content` under `path`, or nothing."""
    with open_atomic(path) as f:
        f.write(content)


@contextlib.contextmanager
def locked(
    path: Path,
    log: Log = print,
    *,
    shared: bool = False,
    what: str = "prepares this folder",
    refusal: Callable[[str], str] | None = None,
) -> Iterator[None]:
    """Waits for the process that holds the file. The kernel frees it when that one ends, however it ends.

    shared: together with others that share it. what: they do. refusal: says to a UserError who holds it, instead of
    waiting. UserError for a file system without locks, and where the file cannot be written.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        file = open(path, "a+")  # not "w": it would empty the holder's name before the lock is ours
    except OSError as e:
        raise UserError(
            f"{path}: expected a file that can be written, got {e.strerror}; change its permissions, or choose another "
            "folder"
        ) from None
    with file as f:
        try:
            fcntl.flock(f, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            holder = f.read().strip() or "?"
            if refusal is not None:
                raise UserError(refusal(holder)) from None
            log(f"{path}: waiting for process {holder}, which {what}")
            fcntl.flock(f, kind)
        except OSError as e:
            raise UserError(
                f"{path}: expected a file system that can lock files, got {e}; mount it with locks (Lustre: -o flock), "
                "or choose another folder"
            ) from None
        f.truncate(0)
        f.write(f"{os.getpid()} on {os.uname().nodename}")
        f.flush()
        yield
