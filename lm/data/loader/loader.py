"""Batches on devices: tf.data reads rows of a `Stream` ahead of time, JAX puts each host's share on its devices.

Which rows a process reads follows from the sharding, and what is in a row from its example id alone. So the batches are
the same for any number of hosts, and the position of a loader is one integer, `examples_seen`.
"""

from __future__ import annotations

import collections
from collections.abc import Generator

import jax

from lm.data.loader.host_rows import HostRows
from lm.data.loader.reader import Batch, Examples, HostReader, identity
from lm.data.loader.tfdata import host_batches
from lm.data.stream.stream import Stream
from lm.errors import UserError


class Loader:
    """Iterator of global batches without end. `examples_seen` is where to start to get the next batch again.

    One batch is on its way to the devices while the caller works on the one before. `close`, or leaving a `with`, ends
    the reading thread.
    """

    def __init__(self, reader: HostReader, host: HostRows, *, start: int, batch_size: int, prefetch: int):
        self.examples_seen, self._batch_size = start, batch_size
        self._host = host
        self._batches: Generator[Batch, None, None] | None = host_batches(reader, prefetch=prefetch)
        self._ahead: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._failure: Exception | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if self._batches is None:
            raise UserError("loader: expected an open one, got one after close()")
        while len(self._ahead) < 2 and self._failure is None:
            try:
                self._ahead.append(self._host.put(next(self._batches)))
            except Exception as e:  # comes when it is that batch's turn, which a run may end before
                self._failure = e
        if not self._ahead and self._failure is not None:
            raise self._failure
        self.examples_seen += self._batch_size
        return self._ahead.popleft()

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def make_loader(
    stream: Stream,
    *,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    start: int = 0,
    examples: Examples = identity,
    extra_rows: int = 0,
    rows_per_example: int = 1,
    prefetch: int = 2,
) -> Loader:
    """Batches {"tokens": int32 [batch_size * N, seq_len / N + 1], ...} from example `start` on.

    examples: from tokens int32 [n, seq_len+1] and id int64 [n] of some rows to the arrays [n, ...] of a batch; runs in
        the reading thread, must keep shapes, and must draw randomness from `id` only. "id" itself stays on the host.
    extra_rows: 1 gives `examples` "other" too, int32 [n, seq_len+1]: for each row one of its source from elsewhere.
    rows_per_example: N, the rows that each example is cut into (`lm.data.stream.batches`).
    prefetch: groups of host batches read ahead of the two batches that are on the devices; see `host_batches`.
    """
    if batch_size < 1 or start < 0:
        raise UserError(f"loader: expected batch_size >= 1 and start >= 0, got {batch_size} and {start}")
    host = HostRows(sharding, batch_size * rows_per_example)
    reader = HostReader(
        stream,
        host.rows,
        batch_size=batch_size,
        start=start,
        examples=examples,
        extra_rows=extra_rows,
        rows_per_example=rows_per_example,
    )
    return Loader(reader, host, start=start, batch_size=batch_size, prefetch=prefetch)
