"""Observers of a run, each with a verdict on every step: losses that are not finite, spikes among those before them,
steps without any; and the documents of a batch for whoever looks.

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
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from etils import epath

from lm import distributed
from lm.checkpoint import Checkpoints
from lm.data import Exclude, Stream
from lm.data.inspect.provenance import passing_over
from lm.data.stream.batches import BatchShape
from lm.errors import UserError
from lm.training.log import Log
from lm.training.state import Position
from lm.workdir import write

EMPTY_STEPS = 16  # in a row without a target, after which a run stops
WINDOW = 128  # losses to compare with: more of them lag behind a falling loss, fewer have a noisy spread
AT_LEAST = 32  # of them, or there is no spread to speak of
NORMAL = 1.4826  # standard deviation of a normal distribution by its median absolute deviation
RELATIVE_SPREAD = 1e-3  # of the median, below which no spread is believed: a run that has memorised its text


class Spike(NamedTuple):
    """A loss so many standard deviations above the median of those before it."""

    loss: float
    median: float
    sigmas: float


def write_provenance(path: epath.Path, stream: Stream, first: int, stop: int, **what: Any) -> None:
    """A JSON file of `what` and of the rows of ids `first` to `stop` - 1: source, documents, offsets."""
    rows = [row._asdict() | {"spans": [p._asdict() for p in row.spans]} for row in stream.where(np.arange(first, stop))]
    write(path, json.dumps(what | {"examples": [first, stop], "rows": rows}, indent=1))


class NonFiniteLoss(UserError):
    """The loss or the gradient became NaN or infinite."""


class Done(NamedTuple):
    """A step that was begun. at: the position before it; metrics: may still be on the device."""

    at: Position
    shape: BatchShape
    metrics: dict[str, Any]

    @property
    def step(self) -> int:
        """Its number, which counts from 1."""
        return self.at.step + 1

    @property
    def first(self) -> int:
        """The id of its first example."""
        return self.at.examples_seen

    @property
    def stop(self) -> int:
        """One more than the id of its last example."""
        return self.at.examples_seen + self.shape.examples


class Verdict(NamedTuple):
    """What an observer has to say of a step. The run goes on unless it has an `error`.

    text: for the log, or for the error; `{report}` and `{kept}` in it become the file of the report and the last good
    checkpoint. report: what kind of report of the step's documents to write, with the numbers `more`; None: none.
    """

    text: str
    error: type[UserError] | None = None
    report: str | None = None
    more: dict[str, float] = {}  # noqa: RUF012, nobody changes it


class Observer(Protocol):
    """Looks at every step of a run, in order, once its metrics are on the host: at the latest when they are logged or
    the state is saved. None: nothing to say."""

    def look(self, done: Done) -> Verdict | None: ...


class Finite:
    """Stops a run at its first step that is not finite: before that is saved."""

    def look(self, done: Done) -> Verdict | None:
        loss, norm = done.metrics["loss"], done.metrics["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        text = (
            f"step {done.step}: loss {loss}, grad_norm {norm}; examples {done.first}..{done.stop - 1} (documents in "
            "{report}, which says how to pass them over); last good checkpoint: {kept}; try a lower optim.lr, a longer "
            "warm-up, optim.clip_norm, or train.precision=float32"
        )
        return Verdict(text, error=NonFiniteLoss, report="nonfinite")


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
        # 1e-12: all losses may be 0.
        sigmas = (loss - median) / max(spread, RELATIVE_SPREAD * abs(median), 1e-12)
        high = sigmas > self._sigmas
        if high and not self._high:
            found = Spike(loss, median, sigmas)
        self._high = high
        return found

    def look(self, done: Done) -> Verdict | None:
        spike = self(float(done.metrics["loss"]))
        if spike is None:
            return None
        text = (
            f"step {done.step}: loss {spike.loss:.4f} is {spike.sigmas:.0f} standard deviations above the median "
            f"{spike.median:.4f} of the steps before it; its documents, and how to train without them, are in "
            "{report}"
        )
        return Verdict(text, report="spike", more={"median": spike.median, "sigmas": spike.sigmas})


class Targets:
    """Stops a run that learns nothing: an objective may leave out whole batches, but not one after another."""

    def __init__(self) -> None:
        self._empty = 0  # steps in a row without a target

    def look(self, done: Done) -> Verdict | None:
        self._empty = 0 if done.metrics["tokens"] else self._empty + 1
        if self._empty < EMPTY_STEPS:
            return None
        text = (
            f"step {done.step}: expected something to predict, got no target in {self._empty} steps; `lm data preview` "
            "shows what the objective makes of the data: set an objective that fits it, or its limits"
        )
        return Verdict(text, error=UserError)


@dataclasses.dataclass
class Watch:
    """Shows steps to observers and does what they say. exclude: what the run leaves out already."""

    observers: Sequence[Observer]
    stream: Stream
    exclude: Sequence[Exclude]
    checkpoints: Checkpoints
    log: Log

    def look(self, begun: Sequence[Done]) -> list[Done]:
        """The steps with their metrics on the host, which it waits for. Raises the error of the first verdict that has
        one."""
        done = [d._replace(metrics=m) for d, m in zip(begun, jax.device_get([d.metrics for d in begun]), strict=True)]
        for d in done:
            for observer in self.observers:
                if verdict := observer.look(d):
                    self._act(d, verdict)
        return done

    def _act(self, done: Done, verdict: Verdict) -> None:
        self.checkpoints.wait()  # what is told of them must be true
        report = "" if verdict.report is None else self.report(verdict.report, done, **verdict.more)
        kept = self.checkpoints.latest()
        text = verdict.text.format(report=report, kept="none" if kept is None else f"step {kept}")
        if verdict.error is not None:
            raise verdict.error(text)
        self.log.print(text)

    def report(self, kind: str, done: Done, **more: float) -> epath.Path:
        """Writes the documents of a batch to the run's folder."""
        path = self.checkpoints.workdir.report(kind, done.step)
        if distributed.is_main():
            passed = passing_over(self.stream, self.exclude, done.first, done.stop)
            read = {name: float(done.metrics[name]) for name in ("loss", "grad_norm", "lr")}
            what: dict[str, Any] = {
                "step": done.step,
                **{name: x if math.isfinite(x) else str(x) for name, x in read.items()},  # JSON has no NaN
                **more,
                "go_back_to_step": max((s for s in self.checkpoints.steps() if s < done.step), default=0),
                "by_removing": "the later folders of checkpoints/",
                "pass_over_with": passed.strip('"'),  # JSON puts it in the quotes that a shell needs
            }
            write_provenance(path, self.stream, done.first, done.stop, **what)
        return path
