"""Losses that need a look: spikes among those before them, and the documents of a batch for whoever looks.

A spike is measured against the median of the last losses, in units of their spread (the median absolute deviation, as
a standard deviation): neither moves much by the spike itself. Only its first step is reported. After a restart it takes
AT_LEAST steps until there is something to compare with.
"""

from __future__ import annotations

import collections
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.data import Stream

WINDOW = 128
AT_LEAST = 32
NORMAL = 1.4826  # standard deviation of a normal distribution by its median absolute deviation
RELATIVE_SPREAD = 1e-3  # of the median, below which no spread is believed: a run that has memorised its text


class Spike(NamedTuple):
    """A loss so many standard deviations above the median of those before it."""

    loss: float
    median: float
    sigmas: float


class Spikes:
    """Call it with the loss of each step, in order: a `Spike` where one begins, else None. sigmas: how far is too far;
    None: never."""

    def __init__(self, sigmas: float | None):
        self._sigmas = sigmas
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._high = False

    def __call__(self, loss: float) -> Spike | None:
        if self._sigmas is None:
            return None
        before, found = list(self._losses), None
        self._losses.append(loss)
        if len(before) < AT_LEAST:
            return None
        median = statistics.median(before)
        spread = NORMAL * statistics.median(abs(x - median) for x in before)
        sigmas = (loss - median) / max(spread, RELATIVE_SPREAD * abs(median), 1e-12)
        high = sigmas > self._sigmas
        if high and not self._high:
            found = Spike(loss, median, sigmas)
        self._high = high
        return found


def write_provenance(path: Path, stream: Stream, first: int, stop: int, **what: Any) -> None:
    """A JSON file of `what` and of the rows of ids `first` to `stop` - 1: source, documents, offsets."""
    rows = [
        row._asdict() | {"pieces": [p._asdict() for p in row.pieces]} for row in stream.where(np.arange(first, stop))
    ]
    path.write_text(json.dumps(what | {"examples": [first, stop], "rows": rows}, indent=1))
