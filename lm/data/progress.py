"""What a person sees of a long preparation, and the lock that keeps two of them apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lm.errors import UserError

Log = Callable[[str], None]


@contextlib.contextmanager
def locked(path: Path, log: Log, *, shared: bool = False, what: str = "prepares this folder") -> Iterator[None]:
    """Waits for the process that holds the file. The kernel frees it when that one ends, however it ends.

    shared: together with others that share it. what: they do. UserError for a file system without locks, and where the
    file cannot be written.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        file = open(path, "a+")
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
            log(f"{path}: waiting for process {f.read().strip() or '?'}, which {what}")
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


class Progress:
    """with progress("reading", total_bytes) as tick: tick(n_bytes)."""

    def __init__(self, wanted: bool, log: Log):
        self._wanted, self._log = wanted, log

    @contextlib.contextmanager
    def __call__(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        if self._wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (
                "{task.description}",
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(what, total=total)
                yield lambda n: bar.advance(task, n)
            return
        done, said = 0, time.monotonic()

        def tick(n):
            nonlocal done, said
            done += n
            if self._wanted and time.monotonic() - said > 10:
                said = time.monotonic()
                self._log(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        yield tick
