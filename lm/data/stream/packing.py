"""Rows of whole documents: best-fit packing (Ding et al., 2024, "Fewer Truncations Improve Language Modeling").

A row is an opening separator and then documents, each with its closing one, which opens the next; what is left is
padding. Its targets are all its tokens but the first. A document of more than seq_len tokens, its closing separator
included, is cut into chunks of seq_len, of which only the last shares a row. A chunk that does not begin its document
reads the token before it where it begins a row, and a separator where it follows another document.

The rows of a store are planned once for a seq_len, and kept beside it:

    <store>/pack-<seq_len>-<fingerprint>.bin    little-endian int64: HEADER, first chunk of each row and the end
                                                [rows + 1], first token of each chunk [chunks]; then uint32: how many
                                                tokens each has [chunks]
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from lm.data.store.tokens import Store
from lm.data.stream.rows import Segments
from lm.errors import UserError
from lm.files import open_atomic

VERSION = 1  # of the rows and their file
MAGIC = int.from_bytes(b"lm-pack\0", "little")
HEADER = 6  # MAGIC, VERSION, seq_len, rows, chunks, targets


class Chunks(NamedTuple):
    """Documents, none longer than a row: first token and number of tokens of each; `rest`: not the begin of one."""

    start: np.ndarray
    length: np.ndarray
    rest: np.ndarray


def cut(starts: np.ndarray, seq_len: int) -> Chunks:
    """starts int64 [n+1] of documents, then the end -> int64 [m] each, in the order of the text."""
    lengths = np.diff(starts)
    n_chunks = -(-lengths // seq_len)
    first = np.cumsum(n_chunks) - n_chunks
    offset = (np.arange(n_chunks.sum()) - np.repeat(first, n_chunks)) * seq_len
    left = np.repeat(lengths, n_chunks) - offset
    return Chunks(np.repeat(starts[:-1], n_chunks) + offset, np.minimum(left, seq_len), offset > 0)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """lengths int64 [n] from 1 to `capacity` -> int64 [n]: the bin of each, from 0, by best-fit decreasing.

    The longest first, each into the fullest bin that holds it. Items of one length are placed together: they go on
    filling a bin while it holds them, since no other can be as full. Steps: O(capacity) of numpy and as many more as
    there are bins of different room at once; the bins themselves are never searched.
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    rooms: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # the bins with that room left
    has = 0  # bit r: there are bins with room r
    placed, n_bins = [], 0

    def keep(room: int, bins: np.ndarray) -> None:
        nonlocal has
        if room and len(bins):
            rooms[room].append(bins)
            has |= 1 << room

    for length in range(capacity, 0, -1):
        left = int(counts[length])
        while left:
            fits = has >> length
            if fits:
                room = length + (fits & -fits).bit_length() - 1
                bins = rooms[room].pop()
                if not rooms[room]:
                    has &= ~(1 << room)
            else:
                room, each = capacity, capacity // length
                bins = np.arange(n_bins, n_bins - (-left // each))
                n_bins += len(bins)
            each = room // length
            full, some = min(left // each, len(bins)), 0
            if full < len(bins):
                some = left - full * each
            placed += [np.repeat(bins[:full], each), np.repeat(bins[full : full + 1], some)]
            keep(room - each * length, bins[:full])
            keep(room - some * length, bins[full : full + 1])
            keep(room, bins[full + 1 :])
            left -= full * each + some
    out = np.empty(len(lengths), np.int64)
    out[order] = np.concatenate([np.empty(0, np.int64), *placed])
    return out


class Packing:
    """The packed rows of a store, memory-mapped; planned at the first use. UserError where that cannot be written."""

    def __init__(self, store: Store, seq_len: int):
        self._store, self.seq_len = store, seq_len
        # A plan is of one text: by its fingerprint another has its own.
        self.path = store.path / f"pack-{seq_len}-{store.fingerprint[:16]}.bin"
        if not self._is_whole():
            self._plan()
        header = np.fromfile(self.path, "<i8", HEADER)
        _, _, _, self.n_rows, n_chunks, self.n_targets = header.tolist()
        words = np.asarray(np.memmap(self.path, "<i8", "r", HEADER * 8, (self.n_rows + 1 + n_chunks,)))
        self._first, self._start = words[: self.n_rows + 1], words[self.n_rows + 1 :]
        self._length = np.asarray(np.memmap(self.path, "<u4", "r", HEADER * 8 + words.nbytes, (n_chunks,)))

    @property
    def padding(self) -> float:
        """Share of the rows' targets that are none."""
        return 1 - self.n_targets / (self.n_rows * self.seq_len)

    def segments(self, rows: np.ndarray) -> Segments:
        """rows int64 [n] -> their chunks, the token before the first included."""
        first, end = self._first[rows], self._first[rows + 1]
        count = end - first
        begin = np.cumsum(count) - count
        row = np.repeat(np.arange(len(rows)), count)
        chunk = np.arange(len(row)) + np.repeat(first - begin, count)
        start, length = self._start[chunk], self._length[chunk].astype(np.int64)
        before = np.cumsum(length) - length
        column = before - np.repeat(before[begin], count) + 1
        opening = np.zeros(len(row), np.int64)
        opening[begin] = 1
        return Segments(row, start - opening, length + opening, column - opening)

    def read(self, rows: np.ndarray, out: np.ndarray, at: np.ndarray, pad_id: int) -> None:
        """rows int64 [n]: fills out int32 [m, seq_len + 1] at `at` int64 [n]."""
        assert out.flags.c_contiguous  # reshape would copy, and the copy be filled
        out[at] = pad_id
        s = self.segments(rows)
        self._store.read_pieces(s.start, s.length, out.reshape(-1), at[s.row] * out.shape[1] + s.column)

    def _is_whole(self) -> bool:
        if not self.path.is_file():
            return False
        header = np.fromfile(self.path, "<i8", HEADER).tolist()
        if len(header) < HEADER or header[:3] != [MAGIC, VERSION, self.seq_len]:
            return False
        n_rows, n_chunks = header[3:5]
        return self.path.stat().st_size == (HEADER + n_rows + 1 + n_chunks) * 8 + n_chunks * 4

    def _plan(self) -> None:
        if not self._store.n_documents:
            raise UserError(f"{self._store.path}: expected documents to pack, got none; add text")
        chunks = cut(self._store.document_starts(), self.seq_len)
        bins = best_fit(chunks.length, self.seq_len)
        # What goes on with a document comes first; the others as in the text, so that no length has its place in a row.
        order = np.lexsort((~chunks.rest, bins))
        n_rows = int(bins.max()) + 1
        first = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=n_rows))])
        n_targets = int(chunks.length.sum())
        header = np.array([MAGIC, VERSION, self.seq_len, n_rows, len(order), n_targets])
        words = [a.astype("<i8") for a in (header, first, chunks.start[order])]
        self._write([*words, chunks.length[order].astype("<u4")])

    def _write(self, parts: list[np.ndarray]) -> None:
        try:
            with open_atomic(self.path) as f:
                for part in parts:
                    f.write(part.data)
        except OSError as e:
            raise UserError(
                f"{self.path}: expected to write the packed rows beside the store, got {e.strerror}; make the "
                "folder writable, or copy the file from where it was made"
            ) from None
