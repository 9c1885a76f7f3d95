"""The compiled step for each shape of batch, made in the background: while data is prepared, and while steps run."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from lm.compilation import CacheCounter
from lm.data.stream.batches import BatchShape
from lm.training.setup import Setup


class Compiled(NamedTuple):
    """A compiled step, (state, batch) -> (state, metrics), and what compiling it took."""

    step: Any
    cache: CacheCounter
    seconds: float


class Programs:
    """`start(shape)` begins to compile, `programs[shape]` waits for it and raises what compiling raised."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._made: dict[BatchShape, concurrent.futures.Future[Compiled]] = {}

    def start(self, shape: BatchShape) -> None:
        """Compiles the step for batches of this shape on a thread of its own, once."""
        if shape not in self._made:
            self._made[shape] = background(self._compile, shape)

    def __getitem__(self, shape: BatchShape) -> Compiled:
        self.start(shape)
        return self._made[shape].result()

    def _compile(self, shape: BatchShape) -> Compiled:
        began = time.perf_counter()
        with CacheCounter() as cache:
            step = self._setup.lower(shape).compile()
        return Compiled(step, cache, time.perf_counter() - began)


def background(f: Callable[..., Any], *args: Any) -> concurrent.futures.Future:
    """f(*args) on a thread of its own."""
    executor = concurrent.futures.ThreadPoolExecutor(1)
    future = executor.submit(f, *args)
    executor.shutdown(wait=False)  # its one thread ends with its one job
    return future
