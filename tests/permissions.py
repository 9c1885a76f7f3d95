"""Permissions of files as they are for everybody but root."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """This process is nobody's within the block, if it is root's: what it needs of modules must have been imported."""
    root = os.geteuid() == 0
    if root:
        os.setresuid(NOBODY, NOBODY, 0)  # the real one too, which some checks go by
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def let_in(folder: Path) -> None:
    """Lets everybody look into a folder of pytest, which are their owner's alone."""
    for path in (folder, *folder.parents):
        if path.is_relative_to(tempfile.gettempdir()) and path != Path(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o055)


@contextlib.contextmanager
def open_to_all() -> Iterator[Path]:
    """A folder that everybody may look into; those of pytest are their owner's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
