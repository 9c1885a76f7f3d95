"""How fast a run is: where its time goes, and model FLOPs utilisation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

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
    # `full` also counts what a causal kernel may skip, and can pass 1.
    assert causal <= 1.0, f"MFU {causal:.2f} > 1 on {n_devices} x {device_kind}: peak or timing is wrong"
    return Utilisation(full, causal)


Phase = Literal["data", "step", "log", "eval", "save"]
BESIDE: tuple[Phase, ...] = ("eval", "save")  # phases that are no training


class Clock:
    """Where the seconds of an interval go. `now` says what the run is at and since when, for whoever watches it from
    another thread."""

    def __init__(self) -> None:
        self.now: tuple[Phase | None, float] = None, time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Begins an interval."""
        self._start = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What is within counts as `name`. Phases do not nest."""
        began = time.perf_counter()
        self.now = name, began
        try:
            yield
        finally:
            ended = time.perf_counter()
            self._spent[name] = self._spent.get(name, 0.0) + ended - began
            self.now = None, ended

    def spent(self, name: Phase) -> float:
        """Seconds of the interval in a phase that has ended."""
        return self._spent.get(name, 0.0)

    def training(self) -> float:
        """Seconds of the interval, without those that are no training: what lies between the phases counts."""
        return time.perf_counter() - self._start - sum(map(self.spent, BESIDE))
