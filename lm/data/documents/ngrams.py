"""Words of a text, and hashes of its word n-grams: what near-duplicates and overlap are told by.

A word is a run of letters, digits and underscores, in lower case, so layout and punctuation do not count. Scripts that
write no spaces (Chinese, Japanese, Thai) give one word for each run between punctuation marks: there, only n-grams that
agree over whole clauses are found.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Any

import numpy as np

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def word_hashes(text: str) -> np.ndarray:
    """uint64 [n] of the n words of a text. The same in every process and on every machine."""
    return np.fromiter(map(_hash, WORD.findall(text.lower())), np.uint64)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len - n + 1], of each n words in a row; empty for fewer than n words. Different n-grams of a corpus of
    2^32 agree with a chance of about one half for one pair of them."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    out = np.zeros(count, np.uint64)
    for i in range(n):
        # A polynomial, so that the order of words counts.
        out = out * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
    return splitmix64(out)


def splitmix64(x: Any) -> Any:
    """uint64 -> uint64, one to one; each bit of the result hangs on each of `x` (Steele et al. 2014, SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1 << 18)  # words repeat: 260 k of them hold nearly all of a text, in some 40 MB
def _hash(word: str) -> int:
    raw = word.encode("utf-8", errors="surrogatepass")  # JSON may spell lone surrogates
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
