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


def check_folder(path: Path, name: str = "") -> None:
    """Raises UserError where there is no folder at `path` and none can be made, or one that cannot be written.

    name: of the setting that the path comes from, for the error.
    """
    at = f"{name}: {path}" if name else str(path)
    try:
        there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if there.is_symlink() and not there.exists():
            raise UserError(
                f"{at}: expected a folder, got a link to {os.readlink(there)}, which is not there; name another"
            )
        if not there.is_dir():
            got = "a file" if there in (path, path.absolute()) else f"a path below the file {there}"
            raise UserError(f"{at}: expected a folder, got {got}; name another")
        os.listdir(there)
    except OSError as e:  # of looking: no permission, too long a name, a loop of links
        raise UserError(f"{at}: expected a folder that can be made, got {e.strerror or e}; name another") from None
    if not may_write(there):
        why = "a read-only file system" if os.statvfs(there).f_flag & os.ST_RDONLY else "no permission to write there"
        raise UserError(f"{at}: expected a folder that can be written, got {why} ({there}); name another")


def may_write(path: Path) -> bool:
    """Whether a file may be written, or a folder get new ones."""
    needed = os.W_OK | (os.X_OK if path.is_dir() else 0)
    return os.access(path, needed, effective_ids=os.access in os.supports_effective_ids)


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
