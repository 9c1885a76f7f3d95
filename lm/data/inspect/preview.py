"""Rows as people read them: what an objective makes of a step's rows, decoded, with every special token visible.

Marks: <pad>*7 is seven paddings; <mask:word> is a masked place and its target, <mask:word|shown:other> one that shows
another token and <mask:word|kept> one that shows the target itself; <prefix>...</prefix> is where a boolean array of
that name is true. Text that spells a mark looks the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.inspect.provenance import heading, origin
from lm.data.loader.reader import HostReader
from lm.data.stream.batches import MAX_STEP, BatchSchedule
from lm.data.stream.stream import Row, Stream
from lm.data.tokenizer.base import Tokenizer
from lm.errors import UserError

OF_TOKENS = ("tokens", "inputs", "targets")
# A corpus may hold control characters, which a terminal would obey.
VISIBLE = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
IN_A_MARK = VISIBLE | {ord("\n"): "\\n", ord("\t"): "\\t"}


class Batch(NamedTuple):
    """The first rows of a step: where each is from, and the arrays [n, ...] that the objective makes of them."""

    rows: list[Row]
    arrays: dict[str, np.ndarray]


def read_batch(
    stream: Stream,
    *,
    first: int,
    rows: int,
    examples: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    extra_rows: int = 0,
    rows_per_example: int = 1,
) -> Batch:
    """The `rows` rows from example id `first` on, as training reads them. examples, extra_rows, rows_per_example: see
    `make_loader`."""
    reader = HostReader(
        stream,
        np.arange(rows, dtype=np.int64),
        batch_size=-(-rows // rows_per_example),
        start=first,
        examples=examples,
        extra_rows=extra_rows,
        rows_per_example=rows_per_example,
    )
    return Batch(stream.where(first + np.arange(rows) // rows_per_example), reader(0))


def preview(
    stream: Stream,
    tokenizer: Tokenizer,
    objective: Any,
    *,
    step: int,
    ramp: BatchSchedule,
    rows: int,
) -> str:
    """Text of the first `rows` rows of the batch that follows `step` steps; fewer if it has no more.

    objective: an `lm.objectives.Objective`.
    """
    if not 0 <= step <= MAX_STEP:
        raise UserError(f"--step: expected 0 to {MAX_STEP}, got {step}")
    if rows < 1:
        raise UserError(f"--rows: expected at least 1, got {rows}")
    first = ramp.after(0, step)
    shape = ramp.shape(first)
    n = min(rows, shape.rows)
    batch = read_batch(
        stream,
        first=first,
        rows=n,
        examples=objective.examples_for(tokenizer),
        extra_rows=objective.extra_rows,
        rows_per_example=shape.rows_per_example,
    )
    reading = Reading(tokenizer, names_of_ids(objective))
    lines = [heading(step, first, shape, n)]
    for i, row in enumerate(batch.rows):
        part = (
            f"part {i % shape.rows_per_example} of {shape.rows_per_example} of " if shape.rows_per_example > 1 else ""
        )
        lines += ["", f"--- row {i}: {part}{origin(row)}"]
        lines += reading.arrays({name: x[i] for name, x in batch.arrays.items()})
    return "\n".join(lines)


def names_of_ids(objective: Any) -> dict[int, str]:
    """Id -> what the objective's fields call it: mask, cls, and T5's extra_id_0 for the first sentinel."""
    names: dict[int, str] = {}
    for token in objective.special_tokens():
        names = token.labels() | names  # where two fields name an id, the first one does
    return names


class Reading:
    """Arrays of one row as text. names: of ids that the tokenizer does not have."""

    def __init__(self, tokenizer: Tokenizer, names: Mapping[int, str]):
        self._tokenizer, self._names = tokenizer, names
        self._silent = tokenizer.token_bytes() == 0

    def arrays(self, row: Mapping[str, np.ndarray]) -> list[str]:
        """Writes lines: token arrays decoded, boolean arrays as marks in them, the others as runs of equal numbers."""
        masked = {"tokens", "positions", "targets", "weights"} <= row.keys()
        shown = {"positions", "targets", "weights"} if masked else set()
        lines = []
        for name in sorted(row, key=lambda n: (n not in OF_TOKENS, OF_TOKENS.index(n) if n in OF_TOKENS else 0, n)):
            x = row[name]
            if name in shown or (x.dtype == bool and x.ndim):
                continue
            if name in OF_TOKENS:
                marks = self._masks(row) if masked else {}
                bounds = _bounds({k: v for k, v in row.items() if v.dtype == bool and v.ndim and name == "tokens"})
                text = self.text(x, marks, bounds)
                lines += [f"{name} ({len(x)}):", *(f"  | {line}" for line in text.split("\n"))]
            else:
                lines.append(f"{name}: {_runs(x.reshape(-1).tolist())}")
        return lines

    def text(
        self, ids: np.ndarray, marks: Mapping[int, str] | None = None, bounds: Mapping[int, str] | None = None
    ) -> str:
        """Writes ids int [S] as text. marks: what stands for the token at a place. bounds: what is put before a
        place."""
        marks, bounds = marks or {}, bounds or {}
        out: list[tuple[str, int]] = []  # a piece, and how often it stands there
        run: list[int] = []
        last, repeated = "", 0

        def flush() -> None:
            nonlocal last, repeated
            if run:
                out.append((self._tokenizer.decode(run).translate(VISIBLE), 1))
                run.clear()
            if last:
                out.append((last, repeated))
                last, repeated = "", 0

        for place, i in enumerate(ids.tolist()):
            special = marks.get(place) or self.special(i)
            if place in bounds or special != last or place in marks:
                flush()
            out += [(bounds[place], 1)] if place in bounds else []
            if special:
                last, repeated = special, repeated + 1
            else:
                run.append(i)
        flush()
        out += [(bounds[len(ids)], 1)] if len(ids) in bounds else []
        followers = [piece for piece, _ in out[1:]] + [""]
        return "".join(_repeated(*piece, before=follower) for piece, follower in zip(out, followers, strict=True))

    def special(self, i: int) -> str:
        """How an id that stands for no text is written, "" for one that does."""
        if 0 <= i < len(self._silent):
            return self._tokenizer.pieces([i])[0] if self._silent[i] else ""
        return f"<{self._names.get(i, f'id:{i}')}>"

    def token(self, i: int) -> str:
        """One token inside of a mark: its text, or its spelling where that is a part of a character."""
        if special := self.special(i):
            return special
        text = self._tokenizer.decode([i])
        return (self._tokenizer.pieces([i])[0] if "\ufffd" in text else text).translate(IN_A_MARK)

    def _masks(self, row: Mapping[str, np.ndarray]) -> dict[int, str]:
        marks = {}
        for place, target, weight in zip(*(row[n].tolist() for n in ("positions", "targets", "weights")), strict=True):
            if weight > 0:
                seen = int(row["tokens"][place])
                how = "|kept" if seen == target else f"|shown:{self.token(seen)}"
                marks[place] = f"<mask:{self.token(target)}{'' if self._names.get(seen) == 'mask' else how}>"
        return marks


def _bounds(flags: Mapping[str, np.ndarray]) -> dict[int, str]:
    """Maps each place where one of boolean arrays [S] begins or ends to be true to the mark that stands before it."""
    bounds: dict[int, str] = {}
    for name, x in sorted(flags.items()):
        edges = np.diff(np.concatenate([[0], x.astype(np.int8), [0]]))
        for place in np.flatnonzero(edges).tolist():
            mark = f"<{name}>" if edges[place] > 0 else f"</{name}>"
            bounds[place] = bounds.get(place, "") + mark
    return bounds


def _runs(values: Sequence[Any]) -> str:
    """Writes runs of equal values, as `0*14 1*20 0*3`."""

    def parts() -> Iterator[str]:
        for value, same in itertools.groupby(values):
            n = len(list(same))
            yield f"{value}*{n}" if n > 1 else f"{value}"

    return " ".join(parts())


def _repeated(piece: str, n: int, before: str) -> str:
    """Writes piece*n, so that what comes after cannot be taken for a part of the count."""
    if before[:1].isdecimal():
        return piece * n
    looks_like_count = piece.endswith(">") and before[:1] == "*" and before[1:2].isdecimal()
    return f"{piece}*{n}" if n > 1 or looks_like_count else piece
