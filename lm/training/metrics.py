"""How fast a run is: the time spent training, and model FLOPs utilisation."""

from __future__ import annotations

import time
from typing import NamedTuple

from lm.hardware import PEAK_FLOPS
from lm.models.cost import FlopsPerToken


class Utilisation(NamedTuple):
    """Model FLOPs utilisation by both conventions, None on a device whose peak is not known."""

    full: float | None  # attention counted over the whole square (PaLM)
    causal: float | None  # its lower triangle


def utilisation(flops: FlopsPerToken, tokens_per_s: float, device_kind: str, n_devices: int) -> Utilisation:
    """Achieved over peak FLOP/s. More than 1 cannot be: the table or the timing is wrong, and it says so."""
    peak = PEAK_FLOPS.get(device_kind)
    if peak is None:
        return Utilisation(None, None)
    full, causal = (f * tokens_per_s / (peak * n_devices) for f in flops)
    assert causal <= 1.0, f"MFU {causal:.2f} > 1 on {n_devices} x {device_kind}: peak or timing is wrong"
    return Utilisation(full, causal)


class Timer:
    """Seconds of an interval that were spent training: what is within `paused()` does not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def paused(self) -> _Pause:
        return _Pause(self)


class _Pause:
    def __init__(self, timer: Timer):
        self._timer = timer

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._timer._start += time.perf_counter() - self._began
