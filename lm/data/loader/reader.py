"""Rows of a `Stream` for one process, as numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lm.data.store.unchanged import Watch
from lm.data.stream.batches import cut, row_ids
from lm.data.stream.index import fmix64
from lm.data.stream.stream import Located, Stream
from lm.errors import UserError

Batch = dict[str, np.ndarray]
Examples = Callable[[Batch], Batch]
ELSEWHERE = 0x9E3779B97F4A7C15  # so that example 0 is no special case of the hash


def identity(batch: Batch) -> Batch:
    return batch


class HostReader:
    """The same rows of one global batch after another, as numpy. Stateless: any step can be read at any time.

    batch_size: in examples, each of which is cut into `rows_per_example` (`lm.data.stream.batches`). rows: their
    numbers among the batch_size * rows_per_example of a global batch.
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
        rows_per_example: int = 1,
    ):
        check_extra(extra_rows)
        self._stream, self._examples, self._extra = stream, examples, extra_rows
        self._batch_size, self._start = batch_size, start
        self._rows_per_example, self._place = rows_per_example, rows % rows_per_example
        # An example is read once, though several of its rows may be of this process.
        self._rows, of = np.unique(rows // rows_per_example, return_inverse=True)
        self._take = of * rows_per_example + self._place  # of the rows of all examples that are read here
        self._check_stores = Watch(store.check_unchanged for store in stream.stores)

    def __call__(self, step: int) -> Batch:
        """Batch `step` counted from `start`: what `examples` makes of tokens int32 [n, T+1] and id int64 [n], and of
        other int32 [n, T+1] if it needs rows from elsewhere. T is seq_len / rows_per_example."""
        return next(self.batches(step, 1))

    def batches(self, step: int, n: int) -> Iterator[Batch]:
        """Yields n batches from `step` on: they are planned and read as one, and made into examples in turn."""
        self._check_stores()
        steps = int(step) + np.arange(n, dtype=np.int64)
        located = self._stream.locate((self._start + steps[:, None] * self._batch_size + self._rows).reshape(-1))
        read = {"tokens": self._stream.read(located), "id": located.example}
        if self._extra:
            read["other"] = self._stream.read(_elsewhere(self._stream, located))
        for at in range(0, len(located.example), len(self._rows)):
            batch = {name: x[at : at + len(self._rows)] for name, x in read.items()}
            if self._extra:
                _check_pairs(self._stream, located.source[at : at + len(self._rows)])
            if self._rows_per_example > 1:
                ids = np.repeat(batch.pop("id"), self._rows_per_example)[self._take]
                batch = {name: cut(x, self._rows_per_example)[self._take] for name, x in batch.items()}
                batch["id"] = row_ids(ids, self._place)
            batch = self._examples(batch)
            yield {name: x for name, x in batch.items() if name != "id"}


def _elsewhere(stream: Stream, located: Located) -> Located:
    """Another row of the same source and epoch for each, all others equally likely, by the id of the example alone."""
    return located._replace(row=another(located.row, np.array(stream.n_rows)[located.source], located.example))


def _check_pairs(stream: Stream, source: np.ndarray) -> None:
    """Raises UserError where one of these sources has no row but the one to pair."""
    n = np.array(stream.n_rows)[source]
    if (n < 2).any():
        name = stream.names[source[n.argmin()]]
        raise UserError(
            f"data.sources[{name!r}]: expected at least 2 rows, to pair one with text from elsewhere, got 1; shorten "
            "data.seq_len or add text"
        )


def another(i: np.ndarray, n: np.ndarray | int, ids: np.ndarray) -> np.ndarray:
    """i int64 [m] in [0, n) -> another place in it, by a hash of ids [m]; where n is 1 there is only i."""
    further = fmix64(ids.astype(np.uint64) + np.uint64(ELSEWHERE)) % np.asarray(np.maximum(n - 1, 1), np.uint64)
    return (i + 1 + further.astype(np.int64)) % n


def check_extra(extra_rows: int) -> None:
    if extra_rows not in (0, 1):
        raise UserError(f"extra_rows: expected 0 or 1 rows from elsewhere for each of a batch, got {extra_rows}")
