"""Losses that need a look: those that are not finite, spikes among those before them, steps without any; and the
documents of a batch for whoever looks.

A spike is measured against the median of the last losses, in units of their spread (the median absolute deviation, as
a standard deviation): neither moves much by the spike itself. Only its first step is reported. After a restart it takes
AT_LEAST steps until there is something to compare with.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lm import distributed
from lm.checkpoint import Checkpoints
from lm.data import Exclude, Stream
from lm.data.inspect.provenance import passing_over
from lm.data.stream.batches import Shape
from lm.errors import UserError
from lm.training.log import Log
from lm.workdir import write

EMPTY_STEPS = 16  # in a row without a target, after which a run stops
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


def write_provenance(path: epath.Path, stream: Stream, first: int, stop: int, **what: Any) -> None:
    """A JSON file of `what` and of the rows of ids `first` to `stop` - 1: source, documents, offsets."""
    rows = [
        row._asdict() | {"pieces": [p._asdict() for p in row.pieces]} for row in stream.where(np.arange(first, stop))
    ]
    write(path, json.dumps(what | {"examples": [first, stop], "rows": rows}, indent=1))


class NonFiniteLoss(UserError):
    """The loss or the gradient became NaN or infinite."""


class Done(NamedTuple):
    """A step whose metrics may still be on the device. step: how many came before it; first: its first example."""

    step: int
    first: int
    shape: Shape
    metrics: dict[str, Any]

    @property
    def stop(self) -> int:
        return self.first + self.shape.examples


@dataclasses.dataclass
class LossWatch:
    """Looks at the metrics of steps that are done. exclude: what the run leaves out already; empty: how many steps in a
    row had no target."""

    stream: Stream
    exclude: Sequence[Exclude]
    checkpoints: Checkpoints
    log: Log
    spikes: Spikes
    empty: int = 0

    def check_finite(self, pending: list[Done]) -> list[dict[str, np.ndarray]]:
        """The metrics of the pending steps on the host; stops at the first step that is not finite."""
        metrics = jax.device_get([done.metrics for done in pending])
        for done, m in zip(pending, metrics, strict=True):
            if math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]):
                continue
            report = self.report("nonfinite", done, m)
            kept = self.checkpoints.latest()
            raise NonFiniteLoss(
                f"step {done.step + 1}: loss {m['loss']}, grad_norm {m['grad_norm']}; examples {done.first}.."
                f"{done.stop - 1} (documents in {report}, which says how to pass them over); last good checkpoint: "
                f"{'none' if kept is None else f'step {kept}'}; "
                f"try a lower optim.lr, a longer warm-up, optim.clip_norm, or train.precision=float32"
            )
        return metrics

    def check_spikes(self, pending: list[Done], metrics: list[dict[str, np.ndarray]]) -> None:
        """Reports where a loss leaves those before it."""
        for done, m in zip(pending, metrics, strict=True):
            if spike := self.spikes(float(m["loss"])):
                report = self.report("spike", done, m, median=spike.median, sigmas=spike.sigmas)
                self.log.print(
                    f"step {done.step + 1}: loss {spike.loss:.4f} is {spike.sigmas:.0f} standard deviations above the "
                    f"median {spike.median:.4f} of the steps before it; its documents, and how to train without them, "
                    f"are in {report}"
                )

    def check_targets(self, pending: list[Done], metrics: list[dict[str, np.ndarray]]) -> None:
        """Stops a run that learns nothing: an objective may leave out whole batches, but not one after another."""
        for done, m in zip(pending, metrics, strict=True):
            self.empty = 0 if m["tokens"] else self.empty + 1
            if self.empty >= EMPTY_STEPS:
                raise UserError(
                    f"step {done.step + 1}: expected something to predict, got no target in {self.empty} steps; "
                    "`lm data preview` shows what the objective makes of the data: set an objective that fits it, or "
                    "its limits"
                )

    def report(self, kind: str, done: Done, metrics: dict[str, np.ndarray], **more: float) -> epath.Path:
        """Writes the documents of a batch to the run's folder."""
        path = self.checkpoints.workdir.report(kind, done.step + 1)
        if distributed.is_main():
            passed = passing_over(self.stream, self.exclude, done.first, done.stop)
            read = {name: float(metrics[name]) for name in ("loss", "grad_norm", "lr")}
            what: dict[str, Any] = {
                "step": done.step + 1,
                **{name: x if math.isfinite(x) else str(x) for name, x in read.items()},  # JSON has no NaN
                **more,
                "go_back_to_step": max((s for s in self.checkpoints.steps() if s <= done.step), default=0),
                "by_removing": "the later folders of checkpoints/",
                "pass_over_with": passed.strip('"'),  # JSON puts it in the quotes that a shell needs
            }
            write_provenance(path, self.stream, done.first, done.stop, **what)
        return path
