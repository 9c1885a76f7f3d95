"""Randomness of a row, drawn from (seed, purpose, example id, place in the row) and nothing else.

So a row has the same noise in any batch, on any host and after any restart, and other noise in the next epoch, where
its window has another id. Each row is a SplitMix64 generator (Steele, Lea and Flood, 2014, "Fast splittable
pseudorandom number generators"), whose number p is computed without those before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the step of SplitMix64
MAX = np.uint64(2**64 - 1)
# More of them leave more keys to sort; fewer fall short more often, and a row is then packed in full.
SLACK = 5.0  # standard deviations
FEW = 2**14  # keys that are faster put in order than sorted out before


def splitmix64(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 bijection: the output function of SplitMix64 (Stafford's variant 13 of MurmurHash3's)."""
    shifted = x >> np.uint64(30)
    x = x ^ shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


def draw(seed: int, purpose: str, ids: np.ndarray, n: int) -> np.ndarray:
    """ids int64 [m] -> uint64 [m,n]: random bits of the places 0 .. n-1 of each row.

    A longer draw begins with the shorter one. Draws for two purposes have nothing to do with each other.
    """
    return _number(seed, purpose, ids, np.arange(n)[None])


def draw_at(seed: int, purpose: str, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """ids int64 [m], places int64 [m,k] -> uint64 [m,k]: of a draw long enough, the bits of those places alone."""
    return _number(seed, purpose, ids, places)


def _number(seed: int, purpose: str, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    name = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    state = splitmix64(ids.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(int.from_bytes(name, "little")))
    steps = places.astype(np.uint64)
    steps += np.uint64(1)
    steps *= np.uint64(GOLDEN)
    return splitmix64(state[:, None] + steps)


def uniform(bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), from the upper 53 bits."""
    return (bits >> np.uint64(11)) * 2.0**-53


def below(bits: np.ndarray, n: int) -> np.ndarray:
    """uint64 -> int64 in [0, n), n < 2^31, from the lower 32 bits: what `uniform` gives for the same bits is all but
    independent of it."""
    return (((bits & np.uint64(2**32 - 1)) * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def choose(keys: np.ndarray, count: int | np.ndarray, width: int, eligible: np.ndarray | None = None) -> np.ndarray:
    """The `count` places of each row with the smallest keys, ascending: uint64 [m,n] -> int64 [m,width].

    Random keys make it a uniform choice without replacement; places of equal keys follow each other from left to right.
    count: one number, which is `width`, or [m], each at most `width` and the number of `eligible` places (bool [m,n],
    None: all). Columns from `count` on hold n.
    """
    m, n = keys.shape
    assert 0 <= width <= n
    assert not isinstance(count, int) or count == width
    if m == 0 or width == 0:
        return np.full((m, width), n)
    place = np.uint64((1 << (n - 1).bit_length()) - 1)  # the lower bits of a key give way to its place: no ties
    if 3 * width < n and keys.size >= FEW:  # with more of the row chosen, little is left out
        packed = _pack_nearest(keys, count, eligible, place)
    else:
        packed = keys >> np.uint64(1)  # below any key that is not eligible
        packed &= ~place
        packed |= np.arange(n, dtype=np.uint64)
        if eligible is not None:
            packed[~eligible] = MAX
    if isinstance(count, int):
        last = np.partition(packed, width - 1, axis=1)[:, width - 1]
        return (packed[packed <= last[:, None]] & place).astype(np.int64).reshape(m, width)  # in order already
    nth = np.maximum(count, 1) - 1
    last = np.partition(packed, np.unique(nth), axis=1)[np.arange(m), nth]
    chosen = packed <= last[:, None]
    chosen[count == 0] = False
    out = np.full((m, width), n)
    out[np.arange(width) < count[:, None]] = packed[chosen] & place
    return out


def _pack_nearest(
    keys: np.ndarray, count: int | np.ndarray, eligible: np.ndarray | None, place: np.uint64
) -> np.ndarray:
    """Packs only the keys near the smallest, `count` of a row or more, in the order of their places, then MAX: a
    fraction of the row, which `choose` is faster with."""
    m, n = keys.shape
    bound = _bound(count, np.full(m, n) if eligible is None else np.count_nonzero(eligible, axis=1))
    near = keys <= (bound | (place << np.uint64(1)) | np.uint64(1))[:, None]  # all that differ in the lower bits alone
    if eligible is not None:
        near &= eligible
    n_near = np.count_nonzero(near, axis=1)
    short = n_near < count  # the bound was too low
    if short.any():
        near[short] = True if eligible is None else eligible[short]
        n_near = np.count_nonzero(near, axis=1)
    at = np.flatnonzero(near)
    column = (at - np.repeat(np.arange(m) * n, n_near)).astype(np.uint64)
    packed = np.full((m, max(1, n_near.max())), MAX)
    packed[np.arange(packed.shape[1]) < n_near[:, None]] = (keys.reshape(-1)[at] >> np.uint64(1)) & ~place | column
    return packed


def _bound(count: int | np.ndarray, n: np.ndarray) -> np.ndarray:
    """n [m] -> uint64 [m]: what `count` of n random keys are all but surely not above, and few others are."""
    share = (count + SLACK * np.sqrt(count) + SLACK) / np.maximum(n, 1)
    bound = (np.minimum(share, 1.0 - 2.0**-53) * 2.0**64).astype(np.uint64)  # 2^64 itself is no uint64
    bound[share >= 1.0] = MAX
    return bound


def composition(keys: np.ndarray, parts: int) -> np.ndarray:
    """keys uint64 [m,n-1] -> int64 [m,parts]: positive lengths that add to n, all ways equally likely."""
    m, n = keys.shape[0], keys.shape[1] + 1
    cuts = np.empty((m, parts + 1), np.int64)
    cuts[:, 0], cuts[:, -1] = 0, n
    cuts[:, 1:-1] = choose(keys, parts - 1, parts - 1) + 1
    return np.diff(cuts, axis=1)


def closed(tokens: np.ndarray, pad_id: int, start_id: int) -> np.ndarray:
    """Rows [n,W] with their text moved left over the padding in it, so that padding is only at their ends: what an
    objective that rearranges text works on. `tokens` itself where no row has any.

    A document that was left out (`lm.data.stream.exclude`) stands as padding between the separator before it and its
    own, which opens the next. Of the two the first stays: the row is what it would be had the store never had the
    document. Where padding is spelt as the separator is, it cannot be told from ends of documents, and rows stay as
    they are.
    """
    real = tokens != pad_id
    if pad_id == start_id or real.all():  # full rows are the usual case, and are not copied
        return tokens
    goes_on = real[:, 1:] > real[:, :-1]  # text after padding
    which = np.flatnonzero(goes_on.any(axis=1))
    if not len(which):
        return tokens
    rows, kept, index = tokens[which], real[which], np.arange(tokens.shape[1])
    is_separator = rows == start_id
    last = np.maximum.accumulate(np.where(kept, index, -1), axis=1)[:, :-1]  # the text before each column but the first
    follows_one = (last >= 0) & np.take_along_axis(is_separator, np.maximum(last, 0), axis=1)
    kept[:, 1:] &= ~(goes_on[which] & is_separator[:, 1:] & follows_one)
    moved = np.full_like(rows, pad_id)
    moved[index < kept.sum(axis=1, keepdims=True)] = rows[kept]
    out = tokens.copy()
    out[which] = moved
    return out


def by_length(tokens: np.ndarray, pad_id: int) -> Iterator[tuple[int, slice | np.ndarray]]:
    """(length without the padding at the end, which rows) for each length among the rows [m,n], which are `closed`: one
    where rows are full."""
    if (tokens[:, -1] != pad_id).all():
        yield tokens.shape[1], slice(None)
        return
    real = (tokens != pad_id)[:, ::-1]
    lengths = np.where(real.any(axis=1), tokens.shape[1] - real.argmax(axis=1), 0)
    for length in np.unique(lengths):
        yield int(length), np.flatnonzero(lengths == length)
