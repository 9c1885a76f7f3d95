"""The splits of a source, and which documents are in them."""

from __future__ import annotations

from typing import Any

import numpy as np

DROP, TRAIN, VALIDATION = 0, 1, 2  # labels of documents
SPLITS = {"train": TRAIN, "validation": VALIDATION}


def in_validation(hashes: Any, fraction: float) -> Any:
    """uint64 hash or array of hashes of contents -> bool. The same text is in the same split, in whatever corpus."""
    # Just below 1, a fraction gives 2^64, which is no uint64.
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
