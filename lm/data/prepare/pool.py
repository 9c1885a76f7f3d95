"""The worker processes of `prepare`, and threads within one. Nothing here imports TensorFlow or JAX."""

from __future__ import annotations

import collections
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Job(Protocol):
    """What a worker process can be sent."""

    @property
    def n_bytes(self) -> int: ...

    def done(self) -> bool: ...

    def run(self) -> None: ...


class Workers:
    """Runs jobs in processes: `with Workers(n) as workers: workers.run(jobs, tick)`. They start when there is more than
    one job to do, and stay for the next `run`: each costs a quarter of a second of imports."""

    def __init__(self, n: int):
        self.n = n
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, jobs: Sequence[Job], tick: Callable[[int], None]) -> None:
        """Does what is not done yet, in up to `n` processes. tick: called with the bytes of each finished job."""
        todo = [job for job in jobs if not job.done()]
        tick(sum(j.n_bytes for j in jobs) - sum(j.n_bytes for j in todo))
        if min(self.n, len(todo)) <= 1:
            for job in todo:
                job.run()
                tick(job.n_bytes)
            return
        if self._pool is None:  # not fork: the parent may hold the threads of TensorFlow and JAX
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.n, mp_context=context, initializer=_end_with_parent)
        try:
            futures = {self._pool.submit(job.run): job for job in todo}
            for future in as_completed(futures):
                future.result()
                tick(futures[future].n_bytes)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process of prepare died: out of memory, or a script without `if __name__ == '__main__':`; "
                "what is finished is kept; try fewer data.workers"
            ) from None


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """Yields (item, function(item)) of each, in order: on the caller's thread, or on several while the caller goes on,
    one item more than there are threads at a time. Helps where `function` frees Python's lock, as encoding does."""
    if threads <= 1:
        for item in items:
            yield item, function(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: collections.deque[tuple[T, Future[R]]] = collections.deque()
        try:
            for item in items:
                ahead.append((item, pool.submit(function, item)))
                if len(ahead) > threads:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _end_with_parent() -> None:
    """Ends a worker with its parent: that of a killed one would wait for its next job for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)  # sys.exit would end this thread alone

    threading.Thread(target=watch, daemon=True).start()
