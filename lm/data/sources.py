"""Where raw text comes from. A new kind of source is one subclass of `Source`.

A source lists parts, which are read independently by worker processes, and yields the raw bytes of documents in an
order that never depends on how many processes there are. Decoding, deduplication and splitting happen in `prepare`.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lm.data.files import (
    COMPRESSED,
    UNREADABLE,
    chunks,
    find,
    is_remote,
    open_raw,
    read_line,
    skip_line,
    stage,
    unreadable,
)
from lm.data.records import bytes_feature, read_records
from lm.data.templates import Missing, Template, one_field, parse_template
from lm.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 64 << 20  # SentencePiece needs some 20 bytes for each of a text


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
    """place: line or record in the part's file, for messages. raw: hopefully UTF-8."""

    place: str
    raw: bytes


class Problem(NamedTuple):
    """What stands where a document should be. reason: a word to count it under. message: of the UserError it is when
    problems are refused; it begins with the file and place."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Base of all sources. A new one has `parts` and `read`; with `entries` in place of `read` it can also be read past
    what is wrong in it."""

    def fetch(self, cache: Path, log: Callable[[str], None]) -> None:
        """Brings raw data that is far away into `cache`, where `parts` finds it; what is there already is kept."""

    def parts(self, cache: Path) -> list[Part]:
        """All there is to read, in order, in stretches of about `stretch_bytes` where the format can be cut.

        cache: a folder of this source's own for what it has to download or build. UserError when there is nothing.
        """
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order, one at a time. UserError with file and line for what cannot be read."""
        raise NotImplementedError

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        """As `read`, with a Problem in the place of each document that cannot be read. max_bytes: of a document, or of
        the line that holds it; a longer one is a Problem too, and is not held in memory where the format allows."""
        for document in self.read(part):
            yield document if len(document.raw) <= max_bytes else _too_long(f"{part.path}: {document.place}", max_bytes)

    def identity(self) -> list | None:
        """What changes when the raw data does, or None if that cannot be told cheaply or the raw data is not here."""
        return None


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
    """glob: pattern of files, `**` included, read in the order of their names; unpacked where they end in .gz or .zst
    (the extra `arrow`). One with a scheme (`gs://bucket/x/*.gz`, without `**`) is copied to the corpus folder first."""

    glob: str

    def fetch(self, cache: Path, log: Callable[[str], None]) -> None:
        if is_remote(self.glob):
            stage(self.glob, cache, log)

    def identity(self) -> list | None:
        return [[str(p), s.st_size, s.st_mtime_ns] for p in find(self.glob, None) for s in [p.stat()]] or None

    def parts(self, cache: Path) -> list[Part]:
        paths = find(self.glob, cache, refuse_dead_links=True)
        if not paths:
            raise UserError(f"{self.glob}: expected files, got no match in {Path.cwd()}; check the glob")
        sizes = [path.stat().st_size for path in paths]
        part_bytes = stretch_bytes(sum(sizes))
        return [part for path, size in zip(paths, sizes, strict=True) for part in self._cut(path, size, part_bytes)]

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        return [Part(str(path), 0, -1, n_bytes)]


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
                return _too_long(f"{part.path}: document {n}", max_bytes)
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
class Fielded:
    """field: the name of the text in each record, `outer.inner` for a nested one. template: the text made of several
    fields in place of it, `"{question}\\n{answer}"`."""

    field: str = "text"
    template: str | None = None

    def __post_init__(self):
        self._template()

    def _template(self) -> Template:
        return one_field(self.field) if self.template is None else parse_template(self.template, type(self).__name__)

    def _entry(self, record: dict, place: str, at: Callable[[], str], max_bytes: int) -> Document | Problem:
        """at: the place with its file, asked for where there is a problem."""
        text = self._template().fill(record)
        if isinstance(text, Missing):
            way_out = f"set {type(self).__name__}(field=...)" if self.template is None else "change the template"
            return Problem(
                "missing_field", f"{at()}: expected a string in field {text.field!r}, got {text.got}; {way_out}"
            )
        try:
            raw = text.encode("utf-8", errors="surrogateescape")
        except UnicodeEncodeError:  # an escape such as "\ud800", which is no character
            raw = text.encode("utf-8", errors="surrogatepass")
        return Document(place, raw) if len(raw) <= max_bytes else _too_long(at(), max_bytes)


@dataclass(frozen=True, kw_only=True)
class Jsonl(Fielded, Files):
    """JSON objects, one a line; blank lines are skipped."""

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        if path.suffix in COMPRESSED or n_bytes <= part_bytes:
            return super()._cut(path, n_bytes, part_bytes)
        cuts = [0]
        with open(path, "rb") as f:
            while cuts[-1] < n_bytes:
                f.seek(min(cuts[-1] + part_bytes, n_bytes) - 1)
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
                        yield _too_long(_place(part, n), max_bytes)
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
    """file:line of line n of a part."""
    return f"{part.path}:{n + _lines_before(part.path, part.start)}"


@functools.lru_cache(maxsize=4)
def _lines_before(path: str, offset: int) -> int:
    n = 0
    with open(path, "rb") as f:
        while f.tell() < offset:
            n += f.read(min(CHUNK_BYTES, offset - f.tell())).count(b"\n")
    return n


def _too_long(at: str, max_bytes: int) -> Problem:
    got = f"{at}: expected a document of at most {max_bytes} bytes, got a longer one; cut it, raise"
    return Problem("too_long", f"{got} data.max_document_bytes, or set data.on_error='skip'")


class _Records(Checked):
    """Reads text features of TFRecord files, whoever wrote them. Units of a part: records."""

    def _template(self) -> Template:
        return one_field("text")

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        try:
            for i, record in enumerate(read_records(part.path, part.start, part.stop), part.start):
                yield self._document(part, i, record, max_bytes)
        except UserError as e:
            yield Problem("unreadable", str(e))
        except OSError as e:
            yield Problem("unreadable", unreadable(part.path, e))

    def _document(self, part: Part, i: int, record: bytes, max_bytes: int) -> Document | Problem:
        template, at = self._template(), f"{part.path}: record {i}"
        try:
            features = {field: bytes_feature(record, field.replace(".", "/")) for field in template.fields}
        except (UserError, IndexError):
            return Problem("unreadable", f"{at}: expected a tf.train.Example, got other bytes; build it again")
        lacking = [field for field, raw in features.items() if raw is None]
        if lacking:
            what = f"{at}: expected bytes in feature {lacking[0]!r}, got none; build it again"
            return Problem("missing_field", what)
        if len(features) == 1 and len(template.pieces) == 1:
            raw = features[template.fields[0]] or b""
        else:
            raw = str(template.fill(features)).encode("utf-8", errors="surrogateescape")
        return Document(f"record {i}", raw) if len(raw) <= max_bytes else _too_long(at, max_bytes)


@dataclass(frozen=True, kw_only=True)
class Tfds(Fielded, _Records):
    """A TensorFlow dataset by name, downloaded and built if it is not there.

    split: with slicing, "train[:10%]". field, template: text features; a nested one as "answer/text". data_dir: None is
    TFDS's own, ~/tensorflow_datasets.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None

    def parts(self, cache: Path) -> list[Part]:
        from lm.data import python_corpus

        builder = python_corpus.find(self.name, self.data_dir)
        return python_corpus.record_parts(builder, self.split, *self._template().fields)


@dataclass(frozen=True, kw_only=True)
class Stdlib(_Records):
    """Source code of the running interpreter's standard library, and the topics of `help()`: about 12 MB that are
    always there. Differs between Python versions. include_tests: also its test suites, where installed (+19 MB)."""

    include_tests: bool = False

    def parts(self, cache: Path) -> list[Part]:
        from lm.data import python_corpus

        builder = python_corpus.build(python_corpus.StdlibConfig.of(self.include_tests), cache)
        return python_corpus.record_parts(builder, "train", "text")


@dataclass(frozen=True, kw_only=True)
class Docstrings(_Records):
    """Docstrings of installed packages, a document per module: the most English that a Python environment holds.

    packages: top-level import names; empty: all of site-packages. Sources are parsed, nothing is imported.
    """

    packages: tuple[str, ...] = ()

    def parts(self, cache: Path) -> list[Part]:
        from lm.data import python_corpus

        builder = python_corpus.build(python_corpus.DocstringsConfig.of(self.packages), cache)
        return python_corpus.record_parts(builder, "train", "text")
