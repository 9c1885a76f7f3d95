"""Batches on devices: tf.data reads rows of a `Stream` ahead of time, JAX puts each host's share on its devices.

Which rows a process reads follows from the sharding, and what is in a row from its example id alone. So the batches are
the same for any number of hosts, and the position of a loader is one integer, `examples_seen`.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Generator, Iterator

import jax
import numpy as np

from lm.data.index import mix
from lm.data.ramp import cut, piece_ids
from lm.data.store import Store
from lm.data.stream import Plan, Stream
from lm.data.tf import tensorflow
from lm.data.tokenizer import PAD_ID
from lm.data.unchanged import Watch
from lm.errors import UserError

Batch = dict[str, np.ndarray]
Examples = Callable[[Batch], Batch]
ELSEWHERE = 0x9E3779B97F4A7C15  # so that example 0 is no special case of the hash
GROUP = 16  # batches that tf.data hands over at once, at most: an element costs 0.3 ms however small it is
GROUP_BYTES = 2**22  # and about how large they are together: larger ones have little to gain


def identity(batch: Batch) -> Batch:
    return batch


class HostRows:
    """The rows of a global batch that this process's devices hold, and the way back to global arrays.

    sharding: its first dimension is the batch; the others are not split, whatever arrays the objective makes.
    """

    def __init__(self, sharding: jax.sharding.NamedSharding, batch_size: int):
        if any(axis is not None for axis in sharding.spec[1:]):
            raise UserError(f"sharding: expected one that splits rows only, got {sharding.spec}; the step may reshard")
        self.batch_size = batch_size
        self.sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
        try:
            placed = self.sharding.addressable_devices_indices_map((batch_size,))
        except ValueError:
            raise UserError(
                f"batch_size: expected a multiple of the {self._parts()} devices that {sharding.spec} splits it over, "
                f"got {batch_size}"
            ) from None
        ranges = sorted({index[0].indices(batch_size)[:2] for index in placed.values() if index})
        self.rows = np.concatenate([np.arange(*r, dtype=np.int64) for r in ranges])
        sizes = [stop - start for start, stop in ranges]
        self._at = {start: int(at) for (start, _), at in zip(ranges, np.cumsum(sizes) - sizes, strict=True)}

    def _parts(self) -> int:
        axes = self.sharding.spec[0]
        return int(np.prod([self.sharding.mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes)]))

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """Arrays of this process's rows [n, ...] -> global arrays [batch_size, ...], on the devices of the sharding."""
        return {name: self._put(x) for name, x in batch.items()}

    def _put(self, x: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(self.batch_size)
            return x[self._at[start] : self._at[start] + stop - start]

        return jax.make_array_from_callback((self.batch_size, *x.shape[1:]), self.sharding, part)


class HostReader:
    """The same rows of one global batch after another, as numpy. Stateless: any step can be read at any time.

    batch_size: in examples, each of which is cut into `pieces` rows (`lm.data.ramp`). rows: their numbers among the
    batch_size * pieces of a global batch.
    """

    def __init__(
        self,
        stream: Stream,
        rows: np.ndarray,
        *,
        batch_size: int,
        start: int,
        examples: Examples,
        extra_rows: int = 0,
        pieces: int = 1,
    ):
        _check_extra(extra_rows)
        self._stream, self._examples, self._extra = stream, examples, extra_rows
        self._batch_size, self._start = batch_size, start
        self._pieces, self._piece = pieces, rows % pieces
        self._rows, of = np.unique(rows // pieces, return_inverse=True)
        self._take = of * pieces + self._piece  # of the pieces of all examples that are read here
        self._check_stores = Watch(store.check_unchanged for store in stream.stores)

    def __call__(self, step: int) -> Batch:
        """Batch `step` counted from `start`: what `examples` makes of tokens int32 [n, T+1] and id int64 [n], and of
        other int32 [n, T+1] if it needs rows from elsewhere. T is seq_len / pieces."""
        return next(self.batches(step, 1))

    def batches(self, step: int, n: int) -> Iterator[Batch]:
        """n batches from `step` on: they are planned and read as one, and made into examples in turn."""
        self._check_stores()
        steps = int(step) + np.arange(n, dtype=np.int64)
        plan = self._stream.plan((self._start + steps[:, None] * self._batch_size + self._rows).reshape(-1))
        read = {"tokens": self._stream.read(plan), "id": plan.example}
        if self._extra:
            read["other"] = self._stream.read(_elsewhere(self._stream, plan))
        for at in range(0, len(plan.example), len(self._rows)):
            batch = {name: x[at : at + len(self._rows)] for name, x in read.items()}
            if self._extra:
                _check_pairs(self._stream, plan.source[at : at + len(self._rows)])
            if self._pieces > 1:
                ids = np.repeat(batch.pop("id"), self._pieces)[self._take]
                batch = {name: cut(x, self._pieces)[self._take] for name, x in batch.items()}
                batch["id"] = piece_ids(ids, self._piece)
            batch = self._examples(batch)
            yield {name: x for name, x in batch.items() if name != "id"}


def _elsewhere(stream: Stream, plan: Plan) -> Plan:
    """Another row of the same source and epoch for each, all others equally likely, by the id of the example alone."""
    return plan._replace(window=_another(plan.window, np.array(stream.n_rows)[plan.source], plan.example))


def _check_pairs(stream: Stream, source: np.ndarray) -> None:
    """UserError where one of these sources has no row but the one to pair."""
    n = np.array(stream.n_rows)[source]
    if (n < 2).any():
        name = stream.names[source[n.argmin()]]
        raise UserError(
            f"data.sources[{name!r}]: expected at least 2 rows, to pair one with text from elsewhere, got 1; shorten "
            "data.seq_len or add text"
        )


def _another(i: np.ndarray, n: np.ndarray | int, ids: np.ndarray) -> np.ndarray:
    """i int64 [m] in [0, n) -> another place in it, by a hash of ids [m]; where n is 1 there is only i."""
    further = mix(ids.astype(np.uint64) + np.uint64(ELSEWHERE)) % np.asarray(np.maximum(n - 1, 1), np.uint64)
    return (i + 1 + further.astype(np.int64)) % n


def _check_extra(extra_rows: int) -> None:
    if extra_rows not in (0, 1):
        raise UserError(f"extra_rows: expected 0 or 1 rows from elsewhere for each of a batch, got {extra_rows}")


def host_batches(reader: HostReader, *, prefetch: int) -> Generator[Batch, None, None]:
    """The reader's batches 0, 1, ... without end, by tf.data; `close` of the iterator ends its thread. prefetch: groups
    of batches read ahead of the one that is handed out.

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
    pieces: int = 1,
    prefetch: int = 2,
) -> Loader:
    """Batches {"tokens": int32 [batch_size * pieces, seq_len / pieces + 1], ...} from example `start` on.

    examples: from tokens int32 [n, seq_len+1] and id int64 [n] of some rows to the arrays [n, ...] of a batch; runs in
        the reading thread, must keep shapes, and must draw randomness from `id` only. "id" itself stays on the host.
    extra_rows: 1 gives `examples` "other" too, int32 [n, seq_len+1]: for each row one of its source from elsewhere.
    pieces: rows that each example is cut into (`lm.data.ramp`).
    prefetch: groups of host batches read ahead of the two batches that are on the devices; see `host_batches`.
    """
    if batch_size < 1 or start < 0:
        raise UserError(f"loader: expected batch_size >= 1 and start >= 0, got {batch_size} and {start}")
    host = HostRows(sharding, batch_size * pieces)
    reader = HostReader(
        stream,
        host.rows,
        batch_size=batch_size,
        start=start,
        examples=examples,
        extra_rows=extra_rows,
        pieces=pieces,
    )
    return Loader(reader, host, start=start, batch_size=batch_size, prefetch=prefetch)


def eval_batches(
    store: Store,
    *,
    seq_len: int,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
    examples: Examples = identity,
    extra_rows: int = 0,
    max_batches: int | None = None,
    pad_id: int = PAD_ID,
) -> Iterator[dict[str, jax.Array]]:
    """The store in order, {"tokens": int32 [batch_size, seq_len+1]}: each token but the first is a target once.

    Rows overlap by one token. The end of the last row and the rows after it are `pad_id`, which a loss must skip. An
    `examples` sees the number of the row as its id. extra_rows: as in `make_loader`; "other" is padding where the store
    is a single row, and for the rows after the last.
    """
    _check_extra(extra_rows)
    host = HostRows(sharding, batch_size)
    n_windows = -(-(store.n_tokens - 1) // seq_len)
    n_batches = -(-n_windows // batch_size)

    def windows(ids):
        tokens = np.full((len(ids), seq_len + 1), pad_id, np.int32)
        starts = ids * seq_len
        whole = np.flatnonzero(starts + seq_len < store.n_tokens)
        store.read_windows(starts[whole], tokens, whole)
        for row in np.flatnonzero((starts + seq_len >= store.n_tokens) & (starts + 1 < store.n_tokens)):
            rest = store.read(int(starts[row]), store.n_tokens)
            tokens[row, : len(rest)] = rest
        return tokens

    def read(step):
        ids = host.rows + step * batch_size
        batch = {"tokens": windows(ids), "id": ids}
        if extra_rows:
            after = ids + n_windows  # of the last row: padding
            here = (ids < n_windows) & (n_windows > 1)
            batch["other"] = windows(np.where(here, _another(ids, max(n_windows, 2), ids), after))
        batch = examples(batch)
        return host.put({name: x for name, x in batch.items() if name != "id"})

    for step in range(n_batches if max_batches is None else min(n_batches, max_batches)):
        yield read(step)
