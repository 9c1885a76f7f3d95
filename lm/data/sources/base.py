"""Where raw text comes from. A new kind of source is one subclass of `Source`.

A source lists parts, which are read independently by worker processes, and yields the raw bytes of documents in an
order that never depends on how many processes there are. Decoding, deduplication and splitting happen in `prepare`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from lm.data.sources.files import download, find, found
from lm.data.sources.templates import Missing, Template, one_field, parse_template
from lm.errors import UserError
from lm.files import is_remote
from lm.system_errors import refuse

MAX_DOCUMENT_BYTES = 64 << 20  # SentencePiece needs some 20 bytes for each of a text
# What a corpus says of a field that it is made from (`lm.data.made_from`): only where it is set, since older ones do
# not know it; or nothing, since it decides how the text is read and not what it is.
WHEN_SET, NEVER = {"described": "when set"}, {"described": "never"}


def stretch_bytes(total: int) -> int:
    """How much one shard takes of `total` bytes: enough shards for the processes of a host, not too many to map."""
    return min(max(total // 64, 4 << 20), 256 << 20)


class Part(NamedTuple):
    """A file, or the stretch [start, stop) of one in units of the source's own; stop -1: to the end.
    n_bytes: its size on disk, a guess at the work."""

    path: str
    start: int
    stop: int
    n_bytes: int


class Document(NamedTuple):
    """A document as it was read. place: line or record in the part's file, for messages. raw: hopefully UTF-8. notes:
    what was done to it or its file that a report should count, as words."""

    place: str
    raw: bytes
    notes: tuple[str, ...] = ()


class Problem(NamedTuple):
    """What stands where a document should be. reason: a word to count it under. message: of the UserError it is when
    problems are refused; it begins with the file and place."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Base of all sources. A new one has `parts` and `read`; with `entries` in place of `read` it can also be read past
    what is wrong in it.

    not_text: a file that is no text (an archive, an image, one with NUL in its first megabyte), and a source of whose
    documents more than 1% are no UTF-8, are refused; or kept, as if they were text. `escapes_nul`: its format can spell
    NUL, so that one that is there was meant.
    """

    escapes_nul: ClassVar[bool] = False

    not_text: Literal["refuse", "keep"] = field(default="refuse", metadata=WHEN_SET)

    def fetch(self, cache: Path, log: Callable[[str], None]) -> None:
        """Brings raw data that is far away into `cache`, where `parts` finds it; what is there already is kept."""

    def parts(self, cache: Path) -> list[Part]:
        """Lists all there is to read, in order, in stretches of about `stretch_bytes` where the format can be cut.

        cache: a folder of this source's own for what it has to download or build. UserError when there is nothing.
        """
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order, one at a time. UserError with file and line for what cannot be read."""
        raise NotImplementedError

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        """Reads as `read` does, with a Problem in the place of each document that cannot be read. max_bytes: of a
        document, or of the line that holds it; a longer one is a Problem too, and is not held in memory where the
        format allows."""
        for document in self.read(part):
            yield document if len(document.raw) <= max_bytes else too_long(f"{part.path}: {document.place}", max_bytes)

    def files(self) -> list[Path] | None:
        """The files that the text is read from; None where it is from none, or they are not here."""
        return None

    def identity(self) -> list | None:
        """What changes when the raw data does, or None if that cannot be told cheaply or the raw data is not here. Of a
        source with `files` their names, sizes and times, by which older corpora know them."""
        files = self.files()
        return None if files is None else [[str(p), s.st_size, s.st_mtime_ns] for p in files for s in [stat_of(p)]]


class Checked(Source):
    """Base of the sources that define `entries`: `read` refuses the first problem."""

    def read(self, part: Part) -> Iterator[Document]:
        for entry in self.entries(part, MAX_DOCUMENT_BYTES):
            if isinstance(entry, Problem):
                raise UserError(entry.message)
            yield entry

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Files(Checked):
    """Base of sources of files. glob: their pattern, with `**`, `{a,b}` and `~`, or the path of one; they are read in
    the order of their names. One with a scheme (`gs://bucket/x/*.gz`, without `**`) is copied to the corpus folder
    first."""

    glob: str

    def fetch(self, cache: Path, log: Callable[[str], None]) -> None:
        if is_remote(self.glob):
            download(self.glob, cache, log)

    def files(self) -> list[Path] | None:
        try:
            return find(self.glob, None) or None
        except UserError:  # what may not be looked at here is compared where it may
            return None

    def parts(self, cache: Path) -> list[Part]:
        sized = [(path, stat_of(path).st_size) for path in found(self.glob, cache)]
        part_bytes = stretch_bytes(sum(size for _, size in sized))
        return [part for path, size in sized for part in self._cut(path, size, part_bytes)]

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        return [Part(str(path), 0, -1, n_bytes)]


@dataclass(frozen=True, kw_only=True)
class Fielded:
    """Takes the text from records. field: the name of the text in each, `outer.inner` for a nested one. template: the
    text made of several fields in place of it, `"{question}\\n{answer}"`."""

    field: str = "text"
    template: str | None = None

    def __post_init__(self):
        self._template()

    def _template(self) -> Template:
        return one_field(self.field) if self.template is None else parse_template(self.template, type(self).__name__)

    def _entry(self, record: dict, place: str, at: Callable[[], str], max_bytes: int) -> Document | Problem:
        """Makes a document of a record. at: gives the place with its file, asked for where there is a problem."""
        text = self._template().fill(record)
        if isinstance(text, Missing):
            way_out = f"set {type(self).__name__}(field=...)" if self.template is None else "change the template"
            return Problem(
                "missing_field", f"{at()}: expected a string in field {text.field!r}, got {text.got}; {way_out}"
            )
        try:
            raw = text.encode("utf-8", errors="surrogateescape")  # bytes that are no UTF-8 come out as they were
        except UnicodeEncodeError:  # an escape such as "\ud800", which is no character
            raw = text.encode("utf-8", errors="surrogatepass")
        return Document(place, raw) if len(raw) <= max_bytes else too_long(at(), max_bytes)


def stat_of(path: Path) -> os.stat_result:
    """The state of a raw file. UserError where that may not be known."""
    try:
        return path.stat()
    except OSError as e:
        raise refuse(path, e) from None


def too_long(at: str, max_bytes: int) -> Problem:
    got = f"{at}: expected a document of at most {max_bytes} bytes, got a longer one; cut it, raise"
    return Problem("too_long", f"{got} data.max_document_bytes, or set data.on_error='skip'")
