"""Batches that grow in training, in examples or in the length of their rows, without touching the order of the data.

The order is of examples, rows of `data.seq_len` tokens, whatever the shape of the batch they come in. A shorter phase
cuts each of them into rows of its length, so that a batch of as many examples has as many tokens in more and shorter
rows, and no token is lost or seen twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lm.data.stream.index import MAX_EXAMPLES
from lm.errors import UserError
from lm.renamed import formerly

MAX_STEP = 2**31  # that is asked for
ROW_BIT = MAX_EXAMPLES.bit_length() - 1  # of an id: which row of its example it is


@formerly("Stage")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPhase:
    """A part of a run with batches of its own. What is None is that of `data`.

    until_examples: the phase ends with the batch that reaches it, by examples seen. batch_size: in examples. seq_len:
    of the rows, a divisor of `data.seq_len`; a batch has batch_size * data.seq_len / seq_len of them.
    """

    until_examples: int
    batch_size: int | None = None
    seq_len: int | None = None


class Batches(Protocol):
    """How rows are batched, as `Data` says it."""

    @property
    def ramp(self) -> Sequence[BatchPhase]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seq_len(self) -> int: ...


class BatchShape(NamedTuple):
    """The shape of a batch: examples, and rows of seq_len targets that they are cut into."""

    examples: int
    rows: int
    seq_len: int

    @property
    def rows_per_example(self) -> int:
        """Rows of each example."""
        return self.rows // self.examples

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


class BatchSchedule:
    """The shape of the next batch as a function of `examples_seen`; of `data` from the end of the last phase on."""

    def __init__(self, phases: Sequence[BatchPhase], *, batch_size: int, seq_len: int):
        ends = [s.until_examples for s in phases]
        if any(a >= b for a, b in zip([0, *ends], ends, strict=False)) or max(ends, default=0) > MAX_EXAMPLES:
            raise UserError(
                f"data.ramp: expected phases of rising until_examples from 1 to 2^48, got {ends}; put them in order"
            )
        for s in phases:
            for name, value in (("batch_size", s.batch_size), ("seq_len", s.seq_len)):
                if value is not None and value < 1:
                    raise UserError(f"data.ramp: expected {name} of at least 1, got {value}")
            if s.seq_len is not None and seq_len % s.seq_len:
                raise UserError(
                    f"data.ramp: expected phases whose seq_len divides data.seq_len {seq_len}, since its rows are cut "
                    f"into them, got {s.seq_len}"
                )
        self._ends = np.array(ends, np.int64)
        self._shapes = [_shape(s.batch_size or batch_size, seq_len, s.seq_len or seq_len) for s in phases] + [
            _shape(batch_size, seq_len, seq_len)
        ]

    @classmethod
    def of(cls, data: Batches) -> BatchSchedule:
        return cls(data.ramp, batch_size=data.batch_size, seq_len=data.seq_len)

    @property
    def shapes(self) -> list[BatchShape]:
        """Lists each shape that occurs, once, in order."""
        return list(dict.fromkeys(self._shapes))

    def shape(self, examples_seen: int) -> BatchShape:
        """The shape of the batch that begins there."""
        return self._shapes[self._phase(examples_seen)]

    def following(self, examples_seen: int) -> BatchShape | None:
        """The first shape that is another than the one there, None when there is none to come."""
        here = self.shape(examples_seen)
        return next((s for s in self._shapes[self._phase(examples_seen) :] if s != here), None)

    def end(self, examples_seen: int) -> int | None:
        """How many examples are seen when the phase is over: the batch that reaches them is its last; None: no end."""
        phase = self._phase(examples_seen)
        return int(self._ends[phase]) if phase < len(self._ends) else None

    def after(self, examples_seen: int, steps: int) -> int:
        """Counts the examples seen after so many more batches."""
        while steps:
            n, end = self.shape(examples_seen).examples, self.end(examples_seen)
            now = steps if end is None else min(steps, -(-(end - examples_seen) // n))
            examples_seen, steps = examples_seen + now * n, steps - now
        return examples_seen

    def steps_before(self, examples_seen: int, example: int) -> int:
        """Counts the batches that end at or before an example."""
        steps = 0
        while True:
            n, end = self.shape(examples_seen).examples, self.end(examples_seen)
            fit = max(0, example - examples_seen) // n
            now = fit if end is None else min(fit, -(-(end - examples_seen) // n))
            examples_seen, steps = examples_seen + now * n, steps + now
            if now == 0:
                return steps

    def _phase(self, examples_seen: int) -> int:
        # Right: who has seen until_examples is in the next phase.
        return int(np.searchsorted(self._ends, examples_seen, "right"))


def _shape(examples: int, full: int, seq_len: int) -> BatchShape:
    return BatchShape(examples, examples * (full // seq_len), seq_len)


def cut(tokens: np.ndarray, rows_per_example: int) -> np.ndarray:
    """[n, T+1] -> [n * N, T/N + 1] for N rows per example: neighbours share a token, so that each is a target once."""
    if rows_per_example == 1:
        return tokens
    length = (tokens.shape[1] - 1) // rows_per_example
    return np.stack([tokens[:, i * length : (i + 1) * length + 1] for i in range(rows_per_example)], 1).reshape(
        -1, length + 1
    )


def row_ids(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """ids of examples, numbers of their rows -> int64 ids that no other example or row has; the first keeps its
    example's, so that an uncut row has the noise it would have without a ramp."""
    return ids + (rows.astype(np.int64) << ROW_BIT)
