"""Batches of a reader, read ahead by tf.data."""

from __future__ import annotations

import threading
from collections.abc import Generator

import jax
import numpy as np

from lm.data.loader.reader import Batch, HostReader
from lm.data.tf import tensorflow
from lm.errors import UserError

GROUP = 16  # batches that tf.data hands over at once, at most: an element costs 0.3 ms however small it is
GROUP_BYTES = 2**22  # and about how large they are together: larger ones have little to gain


def host_batches(reader: HostReader, *, prefetch: int) -> Generator[Batch, None, None]:
    """Yields the reader's batches 0, 1, ... without end, by tf.data; `close` of the iterator ends its thread. prefetch:
    groups of batches read ahead of the one that is handed out.

    One thread reads. With two, which share Python's lock, a batch takes more CPU time and no less of the clock's.
    """
    tf = tensorflow()
    batch = reader(0)
    first = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in sorted(batch.items())}
    n = min(GROUP, max(1, round(GROUP_BYTES / max(1, sum(x.nbytes for x in batch.values())))))
    closing = threading.Event()
    failures: dict[int, BaseException] = {}  # by batch, as they were raised: TensorFlow makes its own kind of them

    def read(group):
        out = {name: np.empty((n, *x.shape), x.dtype) for name, x in first.items()}
        i, batches = 0, reader.batches(group * n, n)
        try:
            while i < n and not closing.is_set():  # which waits for this thread
                batch = next(batches)
                _check_shapes(batch, first)
                for name, x in out.items():
                    x[i] = batch[name]
                i += 1
        except BaseException as e:  # those before it are whole, and a run may need no more
            failures[int(group) * n + i] = e
        return tuple(out.values())

    def read_in_graph(group):
        out = tf.numpy_function(read, [group], [x.dtype for x in first.values()], stateful=False)
        # What `numpy_function` gives has no shape.
        return tuple(tf.ensure_shape(x, (n, *like.shape)) for x, like in zip(out, first.values(), strict=True))

    options = tf.data.Options()  # for predictability; none changes the speed measurably
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    groups = tf.data.Dataset.range(np.iinfo(np.int64).max).map(read_in_graph).prefetch(prefetch).with_options(options)

    def batches():
        iterator = groups.as_numpy_iterator()
        try:
            for group, arrays in enumerate(iterator):
                for i in range(n):
                    if (failure := failures.get(group * n + i)) is not None:
                        raise failure
                    yield {name: x[i] for name, x in zip(first, arrays, strict=True)}
        finally:
            closing.set()
            del iterator  # only now: it waits for its thread as it goes

    return batches()


def _check_shapes(batch: Batch, first: dict[str, jax.ShapeDtypeStruct]) -> None:
    for name, expected in first.items():
        got = batch.get(name)
        if got is None or got.shape != expected.shape or got.dtype != expected.dtype:
            found = "none" if got is None else f"{got.dtype}{got.shape}"
            raise UserError(
                f"examples(): expected {name!r} {expected.dtype}{expected.shape} as in the first batch, got {found}; "
                "pad to one shape"
            )
