"""Which row of which source is example g: pure integer arithmetic, no state, O(1) from any position.

`permute` shuffles a range without a table, `Mixture` deals examples to sources in exact proportion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from lm.errors import UserError

VERSION = 2  # of the order: raise it when the same seed would give other rows
MIN_BITS = 6  # over fewer bits six rounds favour some orders: pairs of rows fail chi-square at 100,000 epochs
ROUNDS = 6  # lag correlations of 6 rounds are those of random order (|r| < 3/sqrt(n)); 4 rounds were ten times above
MAX_EXAMPLES = 2**48  # of a run: more than anybody reads, and what a larger number says is a slip of the finger
BLOCK = 2**16  # examples a mixture quota is exact over; the smallest weight is one in BLOCK


def fmix64(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 bijection that flips half of the bits for any change (the finaliser of MurmurHash3)."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x


def permute(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """i int64 [m] in [0, n), key uint64 [m] or [1] -> int64 [m]: position i of a shuffle of range(n), one per key.

    A Feistel network over the least power of two that holds n, walked until it lands below n (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): a bijection whatever the round function.
    """
    bits = max(MIN_BITS, int(n - 1).bit_length())
    low = bits // 2
    masks = np.array([(1 << (bits - low)) - 1, (1 << low) - 1], np.uint64)  # halves differ by a bit and trade places
    keys = [fmix64(key + np.uint64((r + 1) * 0x9E3779B97F4A7C15 % 2**64)) for r in range(ROUNDS)]

    def network(x, keys):
        left, right = x >> np.uint64(low), x & masks[1]
        for r, k in enumerate(keys):
            left, right = right, left ^ (fmix64(right ^ k) & masks[r % 2])
        return (left << np.uint64(low)) | right

    x = network(i.astype(np.uint64), keys)
    outside = np.flatnonzero(x >= np.uint64(n))
    while len(outside):
        x[outside] = network(x[outside], [k if len(k) == 1 else k[outside] for k in keys])
        outside = outside[x[outside] >= np.uint64(n)]
    return x.astype(np.int64)


def order_version(sizes: Sequence[int]) -> int:
    """The first version that shuffles sources of these numbers of rows as this one does: 1 had MIN_BITS = 2."""
    return VERSION if any(n <= 2 ** (MIN_BITS - 1) for n in sizes) else 1


def epoch_key(seed: int, source: str, epoch: np.ndarray) -> np.ndarray:
    """epoch int64 [m] -> uint64 [m]. Named by the source, so that adding another leaves its order alone."""
    name = hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=8).digest()
    return fmix64(epoch.astype(np.uint64) + np.uint64(int.from_bytes(name, "little")))


class Mixture:
    """Deals example g to a source: of each BLOCK examples source s gets round(weight[s] * BLOCK), evenly spread, so
    that any run of examples is within one or two of its share."""

    def __init__(self, weights: Mapping[str, float]):
        bad = {name: w for name, w in weights.items() if not 0 < w < float("inf")}
        if bad or not weights:
            raise UserError(f"weights: expected positive numbers, got {bad or weights}; leave out a source to skip it")
        if sum(weights.values()) == float("inf"):
            raise UserError(f"weights: expected numbers with a finite sum, got {dict(weights)}; divide them all by one")
        share = np.array(list(weights.values())) / sum(weights.values()) * BLOCK
        quota = np.floor(share).astype(np.int64)
        quota[np.argsort(quota - share, kind="stable")[: BLOCK - quota.sum()]] += 1  # largest remainders
        for name, q in zip(weights, quota, strict=True):
            if q == 0:
                raise UserError(
                    f"weights[{name!r}]: expected at least 1/{BLOCK} of the total, got {weights[name]:g} of "
                    f"{sum(weights.values()):g}; raise it or leave the source out"
                )
        self.quota = quota
        # The middle of each q-th part, so that sources interleave.
        place = np.concatenate([(np.arange(q) + 0.5) / q for q in quota])
        source = np.repeat(np.arange(len(quota)), quota)
        self._source = source[np.lexsort((source, place))]
        self._rank = np.empty(BLOCK, np.int64)
        for s, q in enumerate(quota):
            self._rank[self._source == s] = np.arange(q)

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 [m] -> (source [m], how many examples of that source came before [m])."""
        block, within = np.divmod(ids, BLOCK)
        source = self._source[within]
        return source, block * self.quota[source] + self._rank[within]

    def count(self, n: int) -> np.ndarray:
        """Counts how many of the first n examples are of each source: int64 [sources]."""
        blocks, within = divmod(n, BLOCK)
        return blocks * self.quota + np.bincount(self._source[:within], minlength=len(self.quota))

    def nth(self, source: int, k: int) -> int:
        """The example that is number k, from 0, of a source."""
        block, rank = divmod(k, int(self.quota[source]))
        return block * BLOCK + int(np.flatnonzero(self._source == source)[rank])
