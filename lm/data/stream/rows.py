"""Rows as runs of a store's tokens: windows, and the documents in a run. `lm.data.stream.packing` has the other
rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.data.store.tokens import Store
from lm.data.stream.exclude import BlankedDocuments
from lm.errors import UserError


class Segments(NamedTuple):
    """Runs of a store's tokens that make up rows, int64 [k] each: which of the rows asked for, the first token, how
    many, and the column of the first."""

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    column: np.ndarray


class Span(NamedTuple):
    """A run of one document in a row: its tokens offset to offset+length-1, its eos included. excluded: as padding."""

    document: int
    offset: int
    length: int
    excluded: bool = False


class Windows:
    """Rows of `seq_len + 1` tokens of a store: row w starts at token w * seq_len, and neighbours share one token, so
    that each is a target once."""

    def __init__(self, store: Store, seq_len: int):
        self._store, self._seq_len = store, seq_len
        self.n_rows = (store.n_tokens - 1) // seq_len  # what is left at the end of the store makes no row
        self.n_targets = self.n_rows * seq_len
        self.padding = 0.0
        if self.n_rows < 1:
            raise UserError(
                f"{store.path}: expected more than seq_len={seq_len} tokens, got {store.n_tokens}; lower seq_len "
                "or add text"
            )

    def segments(self, rows: np.ndarray) -> Segments:
        n = len(rows)
        return Segments(np.arange(n), rows * self._seq_len, np.full(n, self._seq_len + 1), np.zeros(n, np.int64))

    def read(self, rows: np.ndarray, out: np.ndarray, at: np.ndarray, pad_id: int) -> None:
        self._store.read_windows(rows * self._seq_len, out, at)


def spans_of(store: Store, holes: BlankedDocuments, start: int, length: int) -> list[Span]:
    """The documents in `length` tokens of a store from `start` on."""
    spans, at, end = [], start, start + length
    while at < end:
        if at == 0:  # the opening eos is of no document
            at = 1
            continue
        document = store.document_at(at)
        first = store.document_start(document)
        last = store.n_tokens if document + 1 == store.n_documents else store.document_start(document + 1)
        excluded = bool(holes) and bool(holes.hold(np.array([at]))[0])
        spans.append(Span(document, at - first, min(last, end) - at, excluded))
        at = min(last, end)
    return spans
