"""Where rows come from: source, epoch and documents of a batch, and the override that passes over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.data.stream.batches import BatchShape
from lm.data.stream.exclude import Exclude, ExcludeExamples
from lm.data.stream.stream import Row, Stream
from lm.errors import UserError


def where(
    stream: Stream,
    *,
    step: int,
    first: int,
    shape: BatchShape,
    rows: int | None = None,
    exclude: Sequence[Exclude] = (),
) -> str:
    """A line for each of the first `rows` examples (None: all) of the batch after `step` steps, which begins at id
    `first`: source, epoch, row of the source, and documents as number[token:token] in the order of the row. Last, the
    override that passes over the batch. exclude: what the run excludes already."""
    if rows is not None and rows < 1:
        raise UserError(f"--rows: expected at least 1, got {rows}")
    n = shape.examples if rows is None else min(rows, shape.examples)
    found = stream.where(np.arange(first, first + n))
    lines = [f"row {i}: {origin(row)}" for i, row in enumerate(found)]
    passed = passing_over(stream, exclude, first, first + shape.examples)
    return "\n".join([heading(step, first, shape, n), *lines, f"to pass over this batch: {passed}"])


def heading(step: int, first: int, shape: BatchShape, shown: int) -> str:
    """Says which batch it is: logs name a step when it is done, so the batch after `step` of them is that of the
    next."""
    rows = f"; rows 0 to {shown - 1}" if shown < shape.examples else ""
    cut = f", each cut into {shape.rows_per_example} rows of {shape.seq_len}" if shape.rows_per_example > 1 else ""
    ids = f"ids {first} to {first + shape.examples - 1}"
    return f"batch after {step} steps (step {step + 1} of the log), {ids}{cut}{rows}"


def passing_over(stream: Stream, exclude: Sequence[Exclude], first: int, stop: int) -> str:
    """The override under which a run reads no more the examples that ids `first` to `stop` - 1 were."""
    ranges: list[list[int]] = []
    for example in stream.locate(np.arange(first, stop)).example.tolist():
        if ranges and ranges[-1][1] == example:
            ranges[-1][1] += 1
        else:
            ranges.append([example, example + 1])
    more = ExcludeExamples(ranges=tuple((a, b) for a, b in ranges))
    return f'"data.exclude={(*exclude, more)!r}"'.replace(" ", "")


def origin(row: Row) -> str:
    """One line: source, epoch, row and documents as number[first token:last token + 1]."""
    documents = " ".join(
        f"{p.document}[{p.offset}:{p.offset + p.length}]{' (excluded)' if p.excluded else ''}" for p in row.spans
    )
    example = "" if row.example == row.id else f", example {row.example}"
    return f"id {row.id}{example}, source {row.source}, epoch {row.epoch}, row {row.row}, documents {documents}"
