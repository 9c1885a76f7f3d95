"""What a person sees of a long preparation."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from lm.files import Log


class Progress:
    """Shows how far a job is: `with progress("reading", total_bytes) as tick: tick(n_bytes)`."""

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
            if self._wanted and time.monotonic() - said > 10:  # seconds: a log is no terminal
                said = time.monotonic()
                self._log(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        yield tick
