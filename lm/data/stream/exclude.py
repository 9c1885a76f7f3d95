"""What a run leaves out without moving anything else: documents become padding, and examples are passed over.

Neither changes which row an example is. So both may change between two parts of a run, as long as no example is passed
over, or no more passed over, that was read already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lm.data.store.tokens import Store
from lm.data.stream.index import MAX_EXAMPLES
from lm.errors import UserError

Range = tuple[int, int]  # from the first to before the second


@dataclass(frozen=True, kw_only=True)
class Exclude:
    """Base of what can be excluded."""


@dataclass(frozen=True, kw_only=True)
class ExcludeDocuments(Exclude):
    """Documents of a source's training store, by number, as `Stream.where` and the reports of a run give them.

    Their text becomes padding. Of their closing separators those stay that open a document that is not excluded: it
    would be read as part of the one before. An excluded document then looks empty, and no objective predicts its end.
    """

    source: str
    numbers: tuple[int, ...] = ()
    ranges: tuple[Range, ...] = ()

    def __post_init__(self):
        if not self.numbers and not self.ranges:
            raise UserError(f"ExcludeDocuments({self.source!r}): expected numbers or ranges, got none; name some")
        _check(f"ExcludeDocuments({self.source!r})", self.all)

    @property
    def all(self) -> tuple[Range, ...]:
        return (*self.ranges, *((n, n + 1) for n in self.numbers))


@dataclass(frozen=True, kw_only=True)
class ExcludeExamples(Exclude):
    """Examples of the run's order that are passed over; steps a to b of a run with a constant batch_size, from 0, are
    (a * batch_size, b * batch_size)."""

    ranges: tuple[Range, ...]

    def __post_init__(self):
        _check("ExcludeExamples", self.ranges)


def _check(where: str, ranges: Iterable[Range]) -> None:
    for start, stop in ranges:
        if not 0 <= start < stop <= MAX_EXAMPLES:
            raise UserError(
                f"{where}: expected ranges (start, stop) with 0 <= start < stop <= 2^48, got {(start, stop)}"
            )


def merge(ranges: Iterable[Sequence[int]]) -> np.ndarray:
    """Merges ranges: int64 [n,2], the same numbers in order, as ranges that do not touch."""
    merged: list[list[int]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in ranges):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return np.array(merged, np.int64).reshape(-1, 2)


class SkippedExamples:
    """Numbers of the examples that are read: read i is the example that has i others before it outside of `ranges`."""

    def __init__(self, ranges: Iterable[Sequence[int]]):
        self.ranges = merge(ranges)
        self._skipped = np.concatenate([[0], np.cumsum(self.ranges[:, 1] - self.ranges[:, 0])])
        self._at = self.ranges[:, 0] - self._skipped[:-1]  # the reads that jump

    def example(self, reads: np.ndarray) -> np.ndarray:
        """int64 -> int64, rising."""
        if not len(self._at):
            return reads
        # A search and no table: the order is long, the ranges are few.
        return reads + self._skipped[np.searchsorted(self._at, reads, "right")]

    def passed(self, n_reads: int) -> int:
        """The example after the last of n reads: 0 before the first."""
        return int(self.example(np.array([n_reads - 1]))[0]) + 1 if n_reads else 0

    def reads_before(self, example: int) -> int:
        """Counts the reads that come before an example."""
        within = np.minimum(self.ranges, example)
        return example - int((within[:, 1] - within[:, 0]).sum())

    def below(self, example: int | None) -> list[list[int]]:
        """The ranges, as far as they lie below an example."""
        within = self.ranges if example is None else np.minimum(self.ranges, example)
        return within[within[:, 0] < within[:, 1]].tolist()


class BlankedDocuments:
    """The excluded documents of a store, as runs of its tokens."""

    def __init__(self, store: Store, documents: Iterable[Sequence[int]]):
        self.documents = merge(documents)
        if len(self.documents) and self.documents[-1, 1] > store.n_documents:
            raise UserError(
                f"ExcludeDocuments: expected numbers below the {store.n_documents} documents of {store.path}, got "
                f"{self.documents[-1, 1] - 1}; take the numbers of its training store"
            )
        bounds = [(_start(store, a), _start(store, b)) for a, b in self.documents.tolist()]
        self._starts, self._ends = np.array(bounds, np.int64).reshape(-1, 2).T
        self._separator = int(store.read(0, 1)[0])  # with which a store opens

    def __bool__(self) -> bool:
        return len(self.documents) > 0

    def hold(self, offsets: np.ndarray) -> np.ndarray:
        """Says which token offsets, -1 for padding, are of excluded documents: bool."""
        run = np.searchsorted(self._starts, offsets, "right") - 1
        return (run >= 0) & (offsets < self._ends[run])

    def meet(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Says whether the `lengths` tokens from each of `starts` on have one of a hole among them: bool."""
        run = np.searchsorted(self._ends, starts, "right")
        return np.append(self._starts, np.iinfo(np.int64).max)[run] < starts + lengths

    def blank(self, tokens: np.ndarray, offsets: np.ndarray, pad_id: int) -> np.ndarray:
        """tokens int32 [n,W], offsets int64 [n,W] of each in the store (-1: padding) -> int32 [n,W]."""
        excluded = self.hold(offsets)
        opens = np.zeros_like(excluded)
        opens[:, :-1] = (offsets[:, 1:] >= 0) & ~excluded[:, 1:] & (tokens[:, :-1] == self._separator)
        return np.where(excluded & ~opens, pad_id, tokens)


def _start(store: Store, document: int) -> int:
    return store.n_tokens if document == store.n_documents else store.document_start(document)
