"""What the system has against a file, in words for whoever owns it: permissions, disks, what was moved away."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from lm.errors import UserError

DISK = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.ENOTCONN)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Within this, what the system has against a file is a UserError. Other errors are what they are."""
    try:
        yield
    except OSError as e:
        if e.filename is not None and (said := system_error(os.fsdecode(e.filename), e)):
            raise UserError(said) from e
        raise


def refuse(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The UserError for a path that could not be looked at."""
    return UserError(system_error(path, error) or f"{path}: expected to look at it, got {error}; name another")


def system_error(path: str | os.PathLike[str], error: OSError) -> str | None:
    """Says in a line what the system has against a file, None where it is the file's content."""
    reason = _of_the_system(str(path), error)
    return reason and f"{path}: {reason}"


def _of_the_system(path: str, error: OSError) -> str | None:
    code = error.errno
    said = os.strerror(code).lower() if code else str(error)
    if isinstance(error, PermissionError) or code in (errno.EACCES, errno.EPERM):
        return f"expected a file or folder that may be used, got {said or 'no permission'}; {_permissions(path)}"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "expected the file that was found there, got nothing; it was moved or removed: put it back, or run again"
    if code in FULL:
        return f"expected room to write it, got {said}; make room, then run again: what is finished is kept"
    if code == errno.EROFS:
        return f"expected a folder that can be written, got a {said}; name another"
    if code in DISK:
        return f"expected a disk that can be read, got {said}; look at the disk or its mount, then run again"
    if isinstance(error, IsADirectoryError):
        return "expected a file, got a folder; name the files in it"
    if code == errno.ELOOP:
        return "expected a file, got a link that leads to itself; mend the link"
    if code in (errno.EMFILE, errno.ENFILE):
        return f"expected to open it, got {said}; raise `ulimit -n`"
    if code in (errno.ENAMETOOLONG, errno.EINVAL):
        return f"expected a file that can be opened, got {said}; name another"
    return None


def _permissions(path: str) -> str:
    """The command that gives the permission that a path lacks: its own, or that of the first folder above it."""
    above = os.path.dirname(os.path.abspath(path))
    while not _may(above, os.X_OK) and above != "/":
        path, above = above, os.path.dirname(above)
    if not os.path.lexists(path):
        path, mode = above, "u+w"
    elif _may(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
        mode = "u+w"
    else:
        mode = "a+rx" if os.path.isdir(path) else "a+r"
    return f"change its permissions (chmod {mode} {path}), or run as its owner"


def _may(path: str, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
