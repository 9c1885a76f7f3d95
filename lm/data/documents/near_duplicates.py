"""Near-duplicates by MinHash (Broder 1997), as Lee et al. 2022 (arXiv:2107.06499) use it: signatures, bands, clusters.

A signature is made of one document in a worker. Clusters are found in one process, a band at a time: it holds some 80
bytes a document (80 MB a million), and reads the signatures, 4 bytes x bands x rows a document
(480 MB a million by default), from memory-mapped files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm.data.documents.ngrams import ngram_hashes, splitmix64, word_hashes
from lm.errors import UserError

BLOCK = 4096  # n-grams, and pairs of documents, worked on at once: some MB
MAX_KINDS = 64  # different kinds of documents told apart in one bucket; a bucket of more is boilerplate


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Keeps the first of documents that are nearly the same, in the order of `data.sources`, then of the source.

    ngram: words to a shingle. threshold: Jaccard similarity of the sets of shingles, as the signatures estimate it (of
    120 values: +-0.04 at 0.8), from which two documents are near. bands, rows: of the signature; a pair of similarity s
    meets in a bucket with a chance of 1 - (1 - s^rows)^bands: 0.998 at 0.8 and 0.27 at 0.5 by default. In a bucket each
    document is compared with the first of each kind, and what is near that one with no other: of three, of which the
    first is near the second and the second near the third, the third may stay. Documents of fewer words than `ngram`
    are one shingle; those without words are left alone.
    """

    ngram: int = 5
    bands: int = 20
    rows: int = 6
    threshold: float = 0.8

    def __post_init__(self):
        for name, value in (("ngram", self.ngram), ("bands", self.bands), ("rows", self.rows)):
            if value < 1:
                raise UserError(f"data.near_duplicates.{name}: expected at least 1, got {value}")
        if not 0 < self.threshold <= 1:
            raise UserError(f"data.near_duplicates.threshold: expected 0 < x <= 1, got {self.threshold}")

    @property
    def size(self) -> int:
        """The number of values in a signature."""
        return self.bands * self.rows

    def signature(self, text: str) -> np.ndarray:
        """uint32 [size]: the least hash over the shingles by each of `size` functions; all 2^32 - 1 without words."""
        hashes = word_hashes(text)
        shingles = np.unique(ngram_hashes(hashes, min(self.ngram, max(1, len(hashes)))))
        least = np.full(self.size, 2**32 - 1, np.uint32)
        factors = _factors(self.size)
        for at in range(0, len(shingles), BLOCK):
            values = (shingles[at : at + BLOCK, None] * factors) >> np.uint64(32)  # multiply-shift
            np.minimum(least, values.min(axis=0).astype(np.uint32), out=least)
        return least


class Clusters(NamedTuple):
    """first int64 [n]: for each document the first of its cluster, itself where it is alone or the first. n_cut:
    buckets in which more than MAX_KINDS kinds met, so that not all kinds were compared."""

    first: np.ndarray
    n_cut: int

    @property
    def sizes(self) -> dict[int, int]:
        """First document -> number of documents, of the clusters of two and more, the largest first."""
        near = np.flatnonzero(self.first != np.arange(len(self.first)))
        firsts, counts = np.unique(self.first[near], return_counts=True)
        order = np.lexsort((firsts, -counts))
        return dict(zip(firsts[order].tolist(), (counts[order] + 1).tolist(), strict=True))


def find_clusters(signatures: Sequence[np.ndarray], how: NearDuplicates) -> Clusters:
    """Clusters documents by their signatures, uint32 [n_i, size] each: in the order that decides who is first."""
    base = np.cumsum([0, *map(len, signatures)])
    n, n_cut = int(base[-1]), 0
    parent = np.arange(n)
    for band in range(how.bands):
        columns = slice(band * how.rows, (band + 1) * how.rows)
        # 8 bytes a document, for one band at a time.
        keys = np.concatenate([_keys(s, columns) for s in signatures]) if n else np.empty(0, np.uint64)
        order = np.argsort(keys, kind="stable")  # within a bucket the first document stays first
        keys = keys[order]
        again = np.flatnonzero(keys[1:] == keys[:-1])
        shared = np.zeros(n, bool)
        shared[again] = shared[again + 1] = True
        members, bucket = order[shared], np.unique(keys[shared], return_inverse=True)[1]
        keep = ~_wordless(signatures, base, members)
        members, bucket = members[keep], bucket[keep]
        for _ in range(MAX_KINDS):
            if not len(members):
                break
            start = np.flatnonzero(np.diff(bucket, prepend=-1))
            counts = np.diff(start, append=len(bucket))
            kind = np.repeat(members[start], counts)
            others = np.ones(len(members), bool)
            others[start] = False
            members, bucket, kind = members[others], bucket[others], kind[others]
            near = parent[members] == parent[kind]  # in one cluster by another band: no need to compare
            ask = np.flatnonzero(~near)
            near[ask] = _similarity(signatures, base, members[ask], kind[ask]) >= how.threshold
            for a, b in zip(members[near].tolist(), kind[near].tolist(), strict=True):
                _unite(parent, a, b)
            while (parent != (up := parent[parent])).any():  # flat: roots can then be compared as arrays
                parent = up
            members, bucket = members[~near], bucket[~near]
        n_cut += int((np.unique(bucket, return_counts=True)[1] > 1).sum())
    return Clusters(parent, n_cut)


def _factors(size: int) -> np.ndarray:
    # Odd, as multiply-shift hashing needs (Dietzfelbinger et al., 1997).
    return splitmix64(np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def _keys(signatures: np.ndarray, columns: slice) -> np.ndarray:
    out = np.zeros(len(signatures), np.uint64)
    for at in range(0, len(signatures), 1 << 16):
        block = np.asarray(signatures[at : at + (1 << 16), columns])
        for column in block.T:
            out[at : at + len(block)] = splitmix64(out[at : at + len(block)] + column + np.uint64(0x9E3779B97F4A7C15))
    return out


def _gather(signatures: Sequence[np.ndarray], base: np.ndarray, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), signatures[0].shape[1]), np.uint32)
    which = np.searchsorted(base, rows, "right") - 1
    for i in np.unique(which).tolist():
        mine = which == i
        out[mine] = signatures[i][rows[mine] - base[i]]
    return out


def _wordless(signatures: Sequence[np.ndarray], base: np.ndarray, rows: np.ndarray) -> np.ndarray:
    blocks = [rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK)]
    return np.concatenate([(_gather(signatures, base, b) == 2**32 - 1).all(1) for b in blocks] or [np.zeros(0, bool)])


def _similarity(signatures: Sequence[np.ndarray], base: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Share of the values in which two documents agree, an estimate of their Jaccard similarity (Broder 1997)."""
    out = np.empty(len(a))
    for at in range(0, len(a), BLOCK):
        rows = slice(at, at + BLOCK)
        out[rows] = (_gather(signatures, base, a[rows]) == _gather(signatures, base, b[rows])).mean(1)
    return out


def _unite(parent: np.ndarray, a: int, b: int) -> None:
    """The earlier root becomes the root of both."""
    while parent[a] != a:
        parent[a] = a = parent[parent[a]]
    while parent[b] != b:
        parent[b] = b = parent[parent[b]]
    parent[max(a, b)] = min(a, b)
