"""Which source gives example g when weights change during a run and sources end: `Mixture` after `Mixture`.

The order stays a function of the example's number: a segment has a start, a mixture, and how many examples each source
gave before it, so that a source goes on where it was. A look-up costs O(log segments).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm.data.stream.index import MAX_EXAMPLES, Mixture
from lm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Weights of a part of a run. until_examples: the first example that is no more in it; None: the rest. Examples
    that are excluded count. weights: by source, in proportion; a source left out is not read in this phase."""

    until_examples: int | None = None
    weights: dict[str, float]


Weights = Mapping[str, float] | Sequence[Phase]


def as_phases(weights: Weights, names: Iterable[str], where: str = "weights") -> tuple[Phase, ...]:
    """Returns phases: one set of weights is the only one. UserError unless they follow each other, the last without
    end, and each of `names` has a weight: throughout without phases, else in one of them."""
    names = sorted(names)
    for of in [weights] if isinstance(weights, Mapping) else [p.weights for p in weights]:
        if not of or not all(0 < w < math.inf for w in of.values()):
            raise UserError(f"{where}: expected positive numbers, got {dict(of)}; leave out a source to skip it")
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise UserError(
                f"{where}: expected one for each of {names}, got {sorted(weights)}; name them all, or set {where}=None "
                "to end all epochs together"
            )
        return (Phase(weights=dict(weights)),)
    phases = tuple(weights)
    ends = [p.until_examples for p in phases]
    bounds = [0, *(e or 0 for e in ends[:-1])]
    too_far = any(e is not None and e > MAX_EXAMPLES for e in ends)
    if not phases or too_far or ends[-1] is not None or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise UserError(
            f"{where}: expected phases of rising until_examples from 1 to 2^48, the last without, got {ends}; put them "
            "in order and leave out the last one's until_examples"
        )
    used = {name for p in phases for name in p.weights}
    if used != set(names):
        raise UserError(f"{where}: expected each of {names} in one phase or more, got {sorted(used)}; name the sources")
    return phases


def mean_weight(phases: Sequence[Phase], name: str) -> float:
    """The mean weight of a source over phases, each counted alike: how long the last one is depends on the run."""
    if len(phases) == 1:
        return phases[0].weights[name]
    return sum(p.weights.get(name, 0.0) / sum(p.weights.values()) for p in phases) / len(phases)


class MixtureSegment(NamedTuple):
    """Examples from `start` on, dealt by one mixture. weights: its own. sources: number of each among all names.
    before: int64 [names], examples that each source gave before."""

    start: int
    weights: dict[str, float]
    mixture: Mixture
    sources: np.ndarray
    before: np.ndarray


class MixtureSchedule:
    """Deals examples to `names`, phase after phase. limits: how many examples a source may give, where that is limited.

    hand_over: a source at its limit leaves, and the others share its part in proportion to their weights; the last one
    of a phase stays. Without, sources go on beyond their limits. Either way every example has a row, since readers read
    ahead; a run that goes to `end` or beyond it is the caller's to refuse.
    out: the example at which a source would go beyond its limit, where it comes to that; `end`: the first such that is
    not handed over, None if there is none, and `ends` its source: it may have handed over in a phase before.
    """

    def __init__(self, names: Sequence[str], phases: Sequence[Phase], limits: Mapping[str, int], *, hand_over: bool):
        self._names, self._limits = list(names), dict(limits)
        self.segments: list[MixtureSegment] = []
        self.out: dict[str, int] = {}
        self.end: int | None = None
        self.ends: str | None = None
        start, before = 0, np.zeros(len(names), np.int64)
        for phase in phases:
            weights = {name: phase.weights[name] for name in names if name in phase.weights}
            while True:
                segment = self._segment(start, weights, before)
                out = {n: at for n, at in self._outs(segment) if _before(at, phase.until_examples)}
                first = min(out, key=out.__getitem__, default=None)
                if first is None or not hand_over or len(weights) == 1:
                    break
                self.out.setdefault(first, out[first])
                weights = {n: w for n, w in weights.items() if n != first}
                if out[first] > start:  # else it gives nothing here: no segment of no examples
                    before = self._append(segment, out[first])
                    start = out[first]
            for name, at in out.items():
                self.out.setdefault(name, at)
                if self.end is None or at < self.end:
                    self.end, self.ends = at, name
            before = self._append(segment, phase.until_examples)
            start = phase.until_examples or 0
        self._starts = np.array([s.start for s in self.segments])

    def __call__(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """examples int64 [m] -> (number of the source [m], how many examples it gave before [m])."""
        which = np.searchsorted(self._starts, examples, "right") - 1
        source, drawn = np.empty_like(examples), np.empty_like(examples)
        for i in np.unique(which):
            segment, mine = self.segments[i], which == i
            local, rank = segment.mixture(examples[mine] - segment.start)
            source[mine] = segment.sources[local]
            drawn[mine] = segment.before[source[mine]] + rank
        return source, drawn

    def _segment(self, start: int, weights: dict[str, float], before: np.ndarray) -> MixtureSegment:
        return MixtureSegment(
            start, weights, Mixture(weights), np.array([self._names.index(n) for n in weights]), before
        )

    def _outs(self, segment: MixtureSegment) -> Iterable[tuple[str, int]]:
        for i, (name, source) in enumerate(zip(segment.weights, segment.sources, strict=True)):
            if name in self._limits:
                left = max(0, self._limits[name] - int(segment.before[source]))
                yield name, segment.start + segment.mixture.nth(i, left)

    def _append(self, segment: MixtureSegment, end: int | None) -> np.ndarray:
        """Keeps a segment and returns what each source has given at its end."""
        self.segments.append(segment)
        before = segment.before.copy()
        if end is not None:
            before[segment.sources] += segment.mixture.count(end - segment.start)
        return before


def _before(example: int, until: int | None) -> bool:
    return until is None or example < until
