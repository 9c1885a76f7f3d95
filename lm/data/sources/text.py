"""Text files and JSON lines."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lm.data.sources.base import Document, Fielded, Files, Part, Problem, too_long
from lm.data.sources.files import COMPRESSED, UNREADABLE, chunks, open_raw, read_line, skip_line, unreadable
from lm.errors import UserError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Text(Files):
    """Text files. separator: what stands between the documents of a file; None: a file is one document. A document has
    to fit in memory."""

    separator: str | None = None

    def __post_init__(self):
        if self.separator == "":
            raise UserError("separator: expected None or some characters, got ''; None makes each file one document")

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        n, held, long = 1, bytearray(), False

        def finish(end: int | None = None) -> Document | Problem:
            if long or len(held[:end]) > max_bytes:
                return too_long(f"{part.path}: document {n}", max_bytes)
            return Document(f"document {n}", bytes(held[:end]))

        separator = None if self.separator is None else self.separator.encode()
        try:
            with open_raw(part.path) as f:
                for chunk in chunks(f, CHUNK_BYTES):
                    held += chunk
                    while separator is not None and (end := held.find(separator)) >= 0:
                        yield finish(end)
                        del held[: end + len(separator)]
                        n, long = n + 1, False
                    if len(held) > max_bytes + len(separator or b""):
                        long = True
                        del held[: len(held) - len(separator or b"")]  # a separator may have begun
                yield finish()
        except UNREADABLE as e:
            yield Problem("unreadable", unreadable(part.path, e))


@dataclass(frozen=True, kw_only=True)
class Jsonl(Fielded, Files):
    """JSON objects, one a line; blank lines are skipped."""

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        if path.suffix in COMPRESSED or n_bytes <= part_bytes:
            return super()._cut(path, n_bytes, part_bytes)
        cuts = [0]
        with open(path, "rb") as f:
            while cuts[-1] < n_bytes:
                f.seek(min(cuts[-1] + part_bytes, n_bytes) - 1)  # one back: a cut right behind a line's end stays
                skip_line(f)
                cuts.append(f.tell())
        return [Part(str(path), start, stop, stop - start) for start, stop in itertools.pairwise(cuts)]

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        at, n = part.start, 0
        try:
            with open_raw(part.path) as f:
                if at:
                    f.seek(at)
                while part.stop < 0 or at < part.stop:
                    line, size = read_line(f, max_bytes)
                    if not size:
                        return
                    at, n = at + size, n + 1
                    if not line:
                        yield too_long(_place(part, n), max_bytes)
                    elif not line.isspace():
                        yield self._line(part, n, line, max_bytes)
        except UNREADABLE as e:
            yield Problem("unreadable", unreadable(part.path, e))

    def _line(self, part: Part, n: int, line: bytes, max_bytes: int) -> Document | Problem:
        # Invalid UTF-8 passes through as escapes: what to do about it is not this class's to say.
        try:
            record = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as e:
            return Problem("bad_json", f"{_place(part, n)}: expected one JSON object on the line, got {e}; mend it")
        if not isinstance(record, dict):
            at = f"{_place(part, n)}: expected a string in field {self._template().fields[0]!r}"
            return Problem("bad_json", f"{at}, got {type(record).__name__}; set Jsonl(field=...)")
        return self._entry(record, f"line {n}", lambda: _place(part, n), max_bytes)


def _place(part: Part, n: int) -> str:
    """Writes the place of line n of a part, as file:line."""
    return f"{part.path}:{n + _lines_before(part.path, part.start)}"


@functools.lru_cache(maxsize=4)
def _lines_before(path: str, offset: int) -> int:
    n = 0
    with open(path, "rb") as f:
        while f.tell() < offset:
            n += f.read(min(CHUNK_BYTES, offset - f.tell())).count(b"\n")
    return n
