"""Text files and JSON lines."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from lm.data.sources.base import NEVER, Document, Fielded, Files, Part, Problem, too_long
from lm.data.sources.files import chunks, read_line, skip_line
from lm.data.sources.kinds import BOM, HEAD_BYTES, Kind
from lm.data.sources.opening import KEPT, UNREADABLE, NotText, Opened, is_plain, open_plain, open_text, unreadable
from lm.data.sources.zstd import WINDOW_BYTES
from lm.errors import UserError

CHUNK_BYTES = 1 << 20
FIRST_BYTES = 1 << 20  # of a file, in which a NUL says that it is no text
MARK_DROPPED = "byte_order_marks_dropped"
CR_ALONE = "files_whose_lines_end_in_cr"

Find = Callable[[bytearray, int], tuple[int, int] | None]  # (text, where to begin) -> a separator's [start, end)


@dataclass(frozen=True, kw_only=True)
class TextFiles(Files):
    """Base of sources of files of characters. They are unpacked by what they hold, whatever their names say: gzip,
    bzip2, xz, lzma and zstd (this one needs the extra `arrow`). UTF-16 and UTF-32 are decoded where a byte order mark
    says so, and marks go.

    window_bytes: of memory that unpacking may take to remember the text, in each worker: `zstd --long=31` needs 2 GiB.
    """

    window_bytes: int = field(default=WINDOW_BYTES, metadata=NEVER)

    def _check_window(self) -> None:
        if self.window_bytes < WINDOW_BYTES:
            name = type(self).__name__
            raise UserError(f"{name}.window_bytes: expected at least {WINDOW_BYTES}, got {self.window_bytes}")

    def _open(self, part: Part) -> Opened:
        if not part.start:
            return open_text(part.path, self.window_bytes, self.not_text == "keep")
        file = open_plain(part.path)  # it was cut, so it is plain
        file.seek(part.start)
        return Opened(file)

    def _problem(self, part: Part, error: BaseException) -> Problem:
        """What an error while a part is read stands for."""
        if not isinstance(error, NotText):
            return Problem("unreadable", unreadable(part.path, error))
        got, way_out = error.kind
        keep = f"set {type(self).__name__}(not_text='keep') to read it as it is"
        return Problem("not_text", f"{part.path}: expected text, got {got}; {way_out}, or {keep}")


@dataclass(frozen=True, kw_only=True)
class Text(TextFiles):
    """Text files. separator: what stands between the documents of a file, in which a line end also means "\\r\\n", and
    "\\r" in a file that has no other; None: a file is one document. A document has to fit in memory."""

    separator: str | None = None

    def __post_init__(self):
        self._check_window()
        if self.separator == "":
            raise UserError("separator: expected None or some characters, got ''; None makes each file one document")

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        try:
            opened = self._open(part)
            with opened.file:
                yield from self._documents(part, opened, max_bytes)
        except (NotText, *UNREADABLE) as e:
            yield self._problem(part, e)

    def _documents(self, part: Part, opened: Opened, max_bytes: int) -> Iterator[Document | Problem]:
        head = opened.file.read(HEAD_BYTES)  # most files have no more, for which a megabyte would be asked for in vain
        if len(head) == HEAD_BYTES:
            head += opened.file.read(FIRST_BYTES - HEAD_BYTES)
        notes = tuple(dict.fromkeys((*opened.notes, *self._check_nul(head))))
        find, longest = _separator(self.separator, head)
        if "\n" in (self.separator or "") and _ends_in_cr(head):
            notes += (CR_ALONE,)
        n, held, long, sought = 1, bytearray(), False, 0

        def finish(end: int) -> Document | Problem:
            nonlocal notes
            if long or end > max_bytes:
                return too_long(f"{part.path}: document {n}", max_bytes)
            raw, said, notes = bytes(held[:end]), notes, ()
            if raw.startswith(BOM):
                raw, said = _without_marks(raw), (*said, MARK_DROPPED)
            return Document(f"document {n}", raw, said)

        for chunk in _chunks(head, opened.file):
            held += chunk
            while find is not None and (place := find(held, sought)) is not None:
                yield finish(place[0])
                del held[: place[1]]
                n, long, sought = n + 1, False, 0
            sought = max(0, len(held) - longest)  # a separator may have begun
            if len(held) > max_bytes + longest:
                long, sought = True, 0
                del held[: len(held) - longest]
        yield finish(len(held))

    def _check_nul(self, head: bytes) -> tuple[str, ...]:
        """Raises NotText for a file whose first bytes hold NUL, or says that it is kept."""
        at = head.find(0)
        if at < 0:
            return ()
        if self.not_text == "refuse":
            raise NotText(Kind(f"NUL at byte {at}", "mend or convert it (UTF-16 is read with a byte order mark alone)"))
        return (KEPT,)


@dataclass(frozen=True, kw_only=True)
class Jsonl(Fielded, TextFiles):
    """JSON objects, one a line; blank lines are skipped."""

    escapes_nul: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self._check_window()

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        if n_bytes <= part_bytes or not is_plain(str(path)):
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
            f, notes = self._open(part)
            with f:
                while part.stop < 0 or at < part.stop:
                    line, size = read_line(f, max_bytes)
                    if not size:
                        return
                    at, n = at + size, n + 1
                    if not line:
                        yield too_long(_place(part, n), max_bytes)
                    elif not line.isspace() and (entry := self._line(part, n, line, max_bytes)) is not None:
                        if notes and isinstance(entry, Document):
                            entry, notes = entry._replace(notes=(*notes, *entry.notes)), ()
                        yield entry
        except (NotText, *UNREADABLE) as e:
            yield self._problem(part, e)

    def _line(self, part: Part, n: int, line: bytes, max_bytes: int) -> Document | Problem | None:
        # Invalid UTF-8 passes through as escapes: what to do about it is not this class's to say.
        try:
            record = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as e:
            if line.startswith(BOM):
                return self._marked(part, n, line, max_bytes)
            got, way_out = f"{e}", "mend it"
            if b"\r" in line.rstrip():
                got, way_out = "lines that end in CR alone", "convert them (tr '\\r' '\\n')"
            elif b"\0" in line:
                got, way_out = f"NUL, {e}", "mend it: a file that was not written to its end has such a hole"
            at = f"{_place(part, n)}: expected one JSON object on the line"
            return Problem("bad_json", f"{at}, got {got}; {way_out}")
        if not isinstance(record, dict):
            at = f"{_place(part, n)}: expected a string in field {self._template().fields[0]!r}"
            return Problem("bad_json", f"{at}, got {type(record).__name__}; set Jsonl(field=...)")
        return self._entry(record, f"line {n}", lambda: _place(part, n), max_bytes)

    def _marked(self, part: Part, n: int, line: bytes, max_bytes: int) -> Document | Problem | None:
        """A line that begins with a byte order mark, as the first of each file that was put into this one may."""
        rest = _without_marks(line)
        if not rest.strip():
            return None
        entry = self._line(part, n, rest, max_bytes)
        return entry._replace(notes=(MARK_DROPPED,)) if isinstance(entry, Document) else entry


def _chunks(head: bytes, file: IO[bytes]) -> Iterator[bytes]:
    """A file of which `head` was read, in chunks."""
    if len(head) < min(FIRST_BYTES, CHUNK_BYTES):
        return iter((head,))
    return itertools.chain(chunks(io.BytesIO(head), CHUNK_BYTES), chunks(file, CHUNK_BYTES))


def _without_marks(raw: bytes) -> bytes:
    while raw.startswith(BOM):
        raw = raw[len(BOM) :]
    return raw


def _ends_in_cr(head: bytes) -> bool:
    return b"\r" in head and b"\n" not in head


def _separator(separator: str | None, head: bytes) -> tuple[Find | None, int]:
    """(what finds a separator, None where there is none to find; the most bytes it may have). head: of the file, which
    shows how its lines end."""
    if separator is None:
        return None, 0
    raw = separator.encode()
    if b"\n" not in raw or b"\r" in raw or _ends_in_cr(head):
        exact = raw.replace(b"\n", b"\r") if _ends_in_cr(head) and b"\r" not in raw else raw

        def find(text: bytearray, start: int) -> tuple[int, int] | None:
            at = text.find(exact, start)
            return None if at < 0 else (at, at + len(exact))

        return find, len(exact)
    # The first CR is looked for behind a match: an expression that begins with a line end is found ten times as fast.
    first, *others = [re.escape(piece) for piece in raw.split(b"\n")]
    match = re.compile((first + b"\n" if not first else first + b"\r?\n") + b"\r?\n".join(others)).search

    def find_line_ends(text: bytearray, start: int) -> tuple[int, int] | None:
        found = match(text, start)
        if found is None:
            return None
        begin, end = found.span()
        return begin - (not first and begin > 0 and text[begin - 1] == 13), end

    return find_line_ends, 2 * len(raw)


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
