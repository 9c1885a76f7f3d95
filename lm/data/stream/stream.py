"""The training stream: rows of tokens as a pure function of example ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from lm.data.corpus import Corpus
from lm.data.store.tokens import Store
from lm.data.stream.batches import BatchSchedule
from lm.data.stream.exclude import BlankedDocuments, Exclude, ExcludeDocuments, ExcludeExamples, SkippedExamples
from lm.data.stream.index import VERSION, epoch_key, order_version, permute
from lm.data.stream.mixture import MixtureSchedule, Weights, as_phases
from lm.data.stream.packing import VERSION as PACKING_VERSION
from lm.data.stream.packing import Packing
from lm.data.stream.rows import Span, Windows, spans_of
from lm.data.tokenizer.base import PAD_ID
from lm.errors import UserError

SETTINGS = {"plan": "packing"}  # entry of a fingerprint -> the setting, where that is called otherwise now


class Order(Protocol):
    """What the order of rows follows from, as `Data` says it."""

    @property
    def weights(self) -> Weights | None: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def packing(self) -> Literal["split", "best_fit"]: ...
    @property
    def weigh(self) -> Literal["examples", "tokens"]: ...
    @property
    def epochs(self) -> Mapping[str, float] | None: ...
    @property
    def when_exhausted(self) -> Literal["refuse", "hand_over"]: ...
    @property
    def exclude(self) -> Sequence[Exclude]: ...


class Located(NamedTuple):
    """Where rows come from: example in the order (the id and what is passed over before it), source number, epoch and
    row of the source, int64 [n]."""

    example: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray


class Row(NamedTuple):
    """Provenance of one example. id: as it is read; example: its number in the order, which `ExcludeExamples` names and
    randomness is drawn from; row: its number in its source."""

    id: int
    example: int
    source: str
    epoch: int
    row: int
    spans: list[Span]


class Stream:
    """Rows of `seq_len + 1` tokens, by example id. Each source is shuffled anew every epoch. Ids have no end.

    weights: of the mixture, by source or in phases; None: all epochs end together. weigh: whether weights are shares of
        the rows or of the targets in them, which is one where rows are full.
    packing: rows are windows of the text, or whole documents packed (`lm.data.stream.packing`), padded with `pad_id`.
    epochs: how often the rows of a source may be read; what comes after: see `MixtureSchedule`, and `check_epochs`.
    exclude: see `lm.data.stream.exclude`.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        *,
        weights: Weights | None,
        seq_len: int,
        seed: int,
        packing: Literal["split", "best_fit"] = "split",
        weigh: Literal["examples", "tokens"] = "examples",
        epochs: Mapping[str, float] | None = None,
        when_exhausted: Literal["refuse", "hand_over"] = "refuse",
        exclude: Sequence[Exclude] = (),
        pad_id: int = PAD_ID,
    ):
        if seq_len < 1:
            raise UserError(f"seq_len: expected at least 1, got {seq_len}")
        self.seq_len, self.seed, self.pad_id = seq_len, seed, pad_id
        self.names = sorted(stores)  # the order of a config's sources does not count
        self.stores = [stores[name] for name in self.names]
        phases = as_phases(weights, self.names) if weights is not None else None
        tokenizers = {s.meta.tokenizer for s in self.stores}
        if len(tokenizers) > 1:
            raise UserError(f"stores: expected one tokenizer, got {len(tokenizers)}; run `lm prepare --force`")
        kind = Packing if packing == "best_fit" else Windows
        self._rows: list[Packing | Windows] = [kind(s, seq_len) for s in self.stores]
        self.n_rows = [r.n_rows for r in self._rows]
        if phases is None:
            sizes = [s.n_tokens for s in self.stores] if packing == "split" else self.n_rows
            phases = as_phases({n: float(size) for n, size in zip(self.names, sizes, strict=True)}, self.names)
        elif weigh == "tokens" and packing != "split":
            density = {n: r.n_targets / r.n_rows for n, r in zip(self.names, self._rows, strict=True)}
            scaled = [{n: w / density[n] for n, w in p.weights.items()} for p in phases]
            phases = tuple(dataclasses.replace(p, weights=w) for p, w in zip(phases, scaled, strict=True))
        self._epochs = dict(epochs or {})
        self._hand_over = when_exhausted == "hand_over"
        self._schedule = MixtureSchedule(self.names, phases, self._limits(), hand_over=self._hand_over)
        self._skips = SkippedExamples(r for e in exclude if isinstance(e, ExcludeExamples) for r in e.ranges)
        self._holes = self._excluded([e for e in exclude if isinstance(e, ExcludeDocuments)])
        self.fingerprint: dict[str, Any] = {
            "order_version": order_version(self.n_rows),
            "seed": seed,
            "seq_len": seq_len,
            "tokenizer": self.stores[0].meta.tokenizer,
            "weights": self._weights(),
            "stores": {n: s.fingerprint for n, s in zip(self.names, self.stores, strict=True)},
        }
        if packing != "split":  # only then: older checkpoints lack the entry and still match
            self.fingerprint["plan"] = f"{packing} {PACKING_VERSION}"  # as stored runs call it
        if len(self._skips.ranges):
            self.fingerprint["skipped"] = self._skips.below(None)
        if any(self._holes):
            named = zip(self.names, self._holes, strict=True)
            self.fingerprint["excluded"] = {n: h.documents.tolist() for n, h in named if h}

    @classmethod
    def of(cls, data: Order, corpus: Corpus) -> Stream:
        """The stream that a run with these settings trains on."""
        return cls(
            corpus.train,
            weights=data.weights,
            seq_len=data.seq_len,
            seed=data.seed,
            packing=data.packing,
            weigh=data.weigh,
            epochs=data.epochs,
            when_exhausted=data.when_exhausted,
            exclude=data.exclude,
            pad_id=corpus.tokenizer.pad_id,
        )

    @property
    def padding(self) -> dict[str, float]:
        """Share of the targets of each source's rows that are padding; excluded documents are not counted."""
        return {n: r.padding for n, r in zip(self.names, self._rows, strict=True)}

    def check(self, saved: Mapping[str, Any], examples_seen: int | None = None) -> None:
        """Raises UserError when a checkpoint's fingerprint is not of this stream: going on would repeat and skip text.

        With `examples_seen`, what has no part in those examples may differ: weights and sources of later phases, limits
        that were not met, ranges passed over later. Which documents are excluded may differ in any case.
        """
        for name in {**self.fingerprint, **saved}:
            then, now = saved.get(name), self.fingerprint.get(name)
            if examples_seen is not None and name == "order_version":
                now = order_version([self.n_rows[self.names.index(n)] for n in self._read_by(examples_seen)])
                if then is not None and now <= then <= VERSION:  # what needs more than `now` was not read yet
                    continue
            if examples_seen is not None and name in ("weights", "stores", "skipped"):
                then, now = _seen(saved, name, examples_seen), _seen(self.fingerprint, name, examples_seen)
            if name == "skipped" and then != now:
                raise UserError(
                    f"data.exclude: expected to pass over {then or 'none'} of the examples that were read, as when the "
                    f"checkpoint was written, got {now or 'none'}; go back to a checkpoint before them by removing the "
                    "later folders of checkpoints/, or exclude later examples"
                )
            if then != now and name != "excluded":
                raise UserError(
                    f"data.{SETTINGS.get(name, name)}: expected {then!r} as when the checkpoint was written, "
                    f"got {now!r}; restore that setting or corpus, or start a new run from these weights"
                )

    def exhausted(self, examples: int) -> dict[str, int]:
        """Source -> the first example id, below `examples`, that it would need more than its epochs for."""
        out = {name: self._skips.reads_before(at) for name, at in self._schedule.out.items()}
        return {name: at for name, at in sorted(out.items(), key=lambda item: item[1]) if at < examples}

    def check_epochs(self, *, step: int, examples_seen: int, steps: int, ramp: BatchSchedule) -> None:
        """Raises UserError when a run at `step`, of `steps`, needs more of the sources than their epochs."""
        end, name = self._schedule.end, self._schedule.ends
        if end is None or name is None or step >= steps:
            return
        first = self._skips.reads_before(end)
        if first >= ramp.after(examples_seen, steps - step):
            return
        ended = f"end in step {step + ramp.steps_before(examples_seen, first) + 1}"
        if first < examples_seen:
            ended = f"ended {examples_seen - first} examples before step {step}"
        others = "; no other source has more" if self._hand_over else ", or set data.when_exhausted=hand_over"
        raise UserError(
            f"data.epochs[{name!r}]: expected text for {steps} steps, got {self._epochs[name]:g} epochs, which {ended}"
            f"; raise it, lower its weight or train.steps{others}"
        )

    def locate(self, ids: np.ndarray) -> Located:
        """ids int64 [n] -> where each row is. Costs some 20 numpy calls per source, so ask for many at once."""
        example = self._skips.example(np.asarray(ids, np.int64))
        source, drawn = self._schedule(example)
        epoch, row = np.empty_like(drawn), np.empty_like(drawn)
        for s, (name, n) in enumerate(zip(self.names, self.n_rows, strict=True)):
            mine = np.flatnonzero(source == s)
            if len(mine):
                e, position = np.divmod(drawn[mine], n)
                # The usual case, one epoch: one key is cheaper than many.
                same = e[:1] if e[0] == e[-1] and (e == e[0]).all() else e
                epoch[mine], row[mine] = e, permute(position, n, epoch_key(self.seed, name, same))
        return Located(example, source, epoch, row)

    def read(self, located: Located) -> np.ndarray:
        """Reads located rows: int32 [n, seq_len + 1]."""
        out = np.empty((len(located.source), self.seq_len + 1), np.int32)
        for s, (rows, holes) in enumerate(zip(self._rows, self._holes, strict=True)):
            mine = np.flatnonzero(located.source == s)
            if len(mine):
                rows.read(located.row[mine], out, mine, self.pad_id)
                if holes:
                    self._blank(rows, holes, located.row[mine], out, mine)
        return out

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """ids int64 [n] -> int32 [n, seq_len + 1]."""
        return self.read(self.locate(ids))

    def where(self, ids: np.ndarray) -> list[Row]:
        """The documents in each row, as numbers in the source's store and offsets in the document."""
        rows = []
        for i, example, s, e, w in zip(np.asarray(ids).tolist(), *(x.tolist() for x in self.locate(ids)), strict=True):
            segments = self._rows[s].segments(np.array([w]))
            spans = [
                span
                for start, length in zip(segments.start.tolist(), segments.length.tolist(), strict=True)
                for span in spans_of(self.stores[s], self._holes[s], start, length)
            ]
            rows.append(Row(i, example, self.names[s], e, w, spans))
        return rows

    def _blank(
        self, rows: Packing | Windows, holes: BlankedDocuments, windows: np.ndarray, out: np.ndarray, at: np.ndarray
    ):
        segments = rows.segments(windows)
        met = np.unique(segments.row[holes.meet(segments.start, segments.length)])
        if not len(met):
            return
        offsets = np.full((len(met), out.shape[1]), -1, np.int64)
        place = {row: i for i, row in enumerate(met.tolist())}
        for row, start, length, column in zip(*(x.tolist() for x in segments), strict=True):
            if row in place:
                offsets[place[row], column : column + length] = np.arange(start, start + length)
        out[at[met]] = holes.blank(out[at[met]], offsets, self.pad_id)

    def _read_by(self, examples_seen: int) -> list[str]:
        """The sources of the segments of the mixture that these examples are of."""
        return list(_seen(self.fingerprint, "stores", examples_seen))

    def _limits(self) -> dict[str, int]:
        limits = {}
        for name, epochs in self._epochs.items():
            if name not in self.names or not 0 < epochs < math.inf:
                raise UserError(
                    f"data.epochs: expected positive numbers for some of {self.names}, got {name!r}: {epochs}"
                )
            # of the number as it is written: 100 rows are read 1.15 times by 115 examples, not by the 114 of floats
            limits[name] = math.floor(Fraction(str(epochs)) * self.n_rows[self.names.index(name)])
        return limits

    def _excluded(self, exclude: Sequence[ExcludeDocuments]) -> list[BlankedDocuments]:
        for e in exclude:
            if e.source not in self.names:
                raise UserError(f"ExcludeDocuments: expected a source of {self.names}, got {e.source!r}")
        return [
            BlankedDocuments(store, [r for e in exclude if e.source == name for r in e.all])
            for name, store in zip(self.names, self.stores, strict=True)
        ]

    def _weights(self) -> Any:
        """The weights as JSON; where there is more than one segment, those of each with its first example."""
        segments = self._schedule.segments
        if len(segments) == 1:
            return segments[0].weights
        return [{"from_example": s.start, "weights": s.weights} for s in segments]


def _seen(fingerprint: Mapping[str, Any], name: str, examples_seen: int) -> Any:
    """The part of an entry that has to do with the first `examples_seen` examples."""
    skips = SkippedExamples(fingerprint.get("skipped", []))
    passed = skips.passed(examples_seen)
    if name == "skipped":
        return skips.below(passed)
    weights = fingerprint.get("weights", {})
    segments = weights if isinstance(weights, list) else [{"from_example": 0, "weights": weights}]
    segments = [s for s in segments if s["from_example"] < passed]
    if name == "weights":
        return segments
    used = {source for s in segments for source in s["weights"]}
    return {source: store for source, store in fingerprint.get("stores", {}).items() if source in used}
