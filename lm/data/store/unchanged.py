"""Whether files that a run has mapped are still the files it opened."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lm.errors import UserError

CHECK_EVERY_S = 10.0  # a few steps of a large run; thousands of files cost some ms


class FileState(NamedTuple):
    """What tells one file from another under the same name."""

    size: int
    mtime_ns: int
    inode: int  # another file may have the same size and date

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def __str__(self) -> str:
        when = datetime.datetime.fromtimestamp(self.mtime_ns / 1e9).isoformat(sep=" ", timespec="milliseconds")
        return f"{self.size} bytes of {when}, inode {self.inode}"


def check_files(opened: Mapping[Path, FileState]) -> None:
    """Raises UserError where one is not what it was when it was opened: replaced, written to, cut, or gone."""
    for path, was in opened.items():
        try:
            now = FileState.of(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            now = None
        if now != was:
            raise UserError(
                f"{path}: expected the file that was opened ({was}), got {now or 'nothing there'}: it changed under a "
                "live run; put the old corpus back to go on from the last checkpoint, or start a new run"
            )


class Watch:
    """Makes the checks when it is called, but not again within CHECK_EVERY_S."""

    def __init__(self, checks: Iterable[Callable[[], None]]):
        self._checks, self._next = list(checks), -math.inf

    def __call__(self) -> None:
        if time.monotonic() >= self._next:
            for check in self._checks:
                check()
            self._next = time.monotonic() + CHECK_EVERY_S
