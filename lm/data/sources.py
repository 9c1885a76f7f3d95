"""Where raw text comes from. A new kind of source is one subclass of `Source`.

A source lists parts, which are read independently by worker processes, and yields the raw bytes of documents in an
order that never depends on how many processes there are. Decoding, deduplication and splitting happen in `prepare`.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lm.data.records import bytes_feature, read_records
from lm.errors import UserError

CHUNK_BYTES = 1 << 20


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


@dataclass(frozen=True, kw_only=True)
class Source:
    """Base of all sources."""

    def parts(self, cache: Path) -> list[Part]:
        """All there is to read, in order, in stretches of about `stretch_bytes` where the format can be cut.

        cache: a folder of this source's own for what it has to download or build. UserError when there is nothing.
        """
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order, one at a time. UserError with file and line for what cannot be read."""
        raise NotImplementedError

    def identity(self) -> list | None:
        """What changes when the raw data does, or None if that cannot be told cheaply or the raw data is not here."""
        return None


@dataclass(frozen=True, kw_only=True)
class _Files(Source):
    """glob: pattern of files, `**` included, read in the order of their names; gunzipped where they end in .gz."""

    glob: str

    def _paths(self) -> list[Path]:
        return sorted(p for p in map(Path, glob.glob(self.glob, recursive=True)) if p.is_file())

    def identity(self) -> list | None:
        return [[str(p), s.st_size, s.st_mtime_ns] for p in self._paths() for s in [p.stat()]] or None

    def parts(self, cache: Path) -> list[Part]:
        paths = self._paths()
        if not paths:
            raise UserError(f"{self.glob}: expected files, got no match in {Path.cwd()}; check the glob")
        sizes = [path.stat().st_size for path in paths]
        part_bytes = stretch_bytes(sum(sizes))
        return [part for path, size in zip(paths, sizes, strict=True) for part in self._cut(path, size, part_bytes)]

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        return [Part(str(path), 0, -1, n_bytes)]


@dataclass(frozen=True, kw_only=True)
class Text(_Files):
    """Text files. separator: what stands between the documents of a file; None: a file is one document. A document has
    to fit in memory."""

    separator: str | None = None

    def __post_init__(self):
        if self.separator == "":
            raise UserError("separator: expected None or some characters, got ''; None makes each file one document")

    def read(self, part: Part) -> Iterator[Document]:
        with _open(part.path) as f:
            if self.separator is None:
                yield Document("document 1", b"".join(_chunks(f, part.path)))
                return
            separator, rest, n = self.separator.encode(), b"", 0
            for chunk in _chunks(f, part.path):
                *whole, rest = (rest + chunk).split(separator)
                for raw in whole:
                    n += 1
                    yield Document(f"document {n}", raw)
            yield Document(f"document {n + 1}", rest)


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Files):
    """JSON objects, one a line; blank lines are skipped. field: the name of the text in each."""

    field: str = "text"

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        if path.suffix == ".gz" or n_bytes <= part_bytes:
            return super()._cut(path, n_bytes, part_bytes)
        cuts = [0]
        with open(path, "rb") as f:
            while cuts[-1] < n_bytes:
                f.seek(min(cuts[-1] + part_bytes, n_bytes) - 1)
                f.readline()
                cuts.append(f.tell())
        return [Part(str(path), start, stop, stop - start) for start, stop in itertools.pairwise(cuts)]

    def read(self, part: Part) -> Iterator[Document]:
        with _open(part.path) as f:
            f.seek(part.start)
            at, n = part.start, 0
            while part.stop < 0 or at < part.stop:
                try:
                    line = f.readline()
                except (OSError, EOFError, zlib.error) as e:
                    raise _unreadable(part.path, e) from None
                if not line:
                    return
                at, n = at + len(line), n + 1
                if not line.isspace():
                    yield self._document(part, n, line)

    def _document(self, part: Part, n: int, line: bytes) -> Document:
        # Invalid UTF-8 passes through as escapes: what to do about it is not this class's to say.
        try:
            record = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except ValueError as e:
            raise UserError(f"{self._place(part, n)}: expected one JSON object on the line, got {e}; mend it") from None
        if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
            got = sorted(record) if isinstance(record, dict) else type(record).__name__
            if isinstance(record, dict) and self.field in record:
                got = f"a {type(record[self.field]).__name__} in it"
            raise UserError(
                f"{self._place(part, n)}: expected a string in field {self.field!r}, got {got}; set Jsonl(field=...)"
            )
        text = record[self.field]
        try:
            return Document(f"line {n}", text.encode("utf-8", errors="surrogateescape"))
        except UnicodeEncodeError:  # an escape such as "\ud800", which is no character
            return Document(f"line {n}", text.encode("utf-8", errors="surrogatepass"))

    def _place(self, part: Part, n: int) -> str:
        if part.start:
            with open(part.path, "rb") as f:
                while f.tell() < part.start:
                    n += f.read(min(CHUNK_BYTES, part.start - f.tell())).count(b"\n")
        return f"{part.path}:{n}"


class _Records(Source):
    """Reads text features of TFRecord files, whoever wrote them. Units of a part: records."""

    def _feature(self) -> str:
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Document]:
        name = self._feature()
        for i, record in enumerate(read_records(part.path, part.start, part.stop), part.start):
            raw = bytes_feature(record, name)
            if raw is None:
                raise UserError(
                    f"{part.path}: record {i}: expected bytes in feature {name!r}, got none; build it again"
                )
            yield Document(f"record {i}", raw)


@dataclass(frozen=True, kw_only=True)
class Tfds(_Records):
    """A TensorFlow dataset by name, downloaded and built if it is not there.

    split: with slicing, "train[:10%]". field: the text feature; a nested one as "answer/text". data_dir: None is TFDS's
    own, ~/tensorflow_datasets.
    """

    name: str
    split: str = "train"
    field: str = "text"
    data_dir: str | None = None

    def _feature(self) -> str:
        return self.field

    def parts(self, cache: Path) -> list[Part]:
        from lm.data import corpus

        builder = corpus.find(self.name, self.data_dir)
        return corpus.record_parts(builder, self.split, self.field)


@dataclass(frozen=True, kw_only=True)
class Stdlib(_Records):
    """Source code of the running interpreter's standard library, and the topics of `help()`: about 12 MB that are
    always there. Differs between Python versions. include_tests: also its test suites, where installed (+19 MB)."""

    include_tests: bool = False

    def _feature(self) -> str:
        return "text"

    def parts(self, cache: Path) -> list[Part]:
        from lm.data import corpus

        builder = corpus.build(corpus.StdlibConfig.of(self.include_tests), cache)
        return corpus.record_parts(builder, "train", "text")


@dataclass(frozen=True, kw_only=True)
class Docstrings(_Records):
    """Docstrings of installed packages, a document per module: the most English that a Python environment holds.

    packages: top-level import names; empty: all of site-packages. Sources are parsed, nothing is imported.
    """

    packages: tuple[str, ...] = ()

    def _feature(self) -> str:
        return "text"

    def parts(self, cache: Path) -> list[Part]:
        from lm.data import corpus

        builder = corpus.build(corpus.DocstringsConfig.of(self.packages), cache)
        return corpus.record_parts(builder, "train", "text")


def _open(path: str):
    try:
        return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
    except OSError as e:
        raise _unreadable(path, e) from None


def _chunks(f, path):
    try:
        while chunk := f.read(CHUNK_BYTES):
            yield chunk
    except (OSError, EOFError, zlib.error) as e:
        raise _unreadable(path, e) from None


def _unreadable(path, e):
    return UserError(f"{path}: expected a whole {'gzip ' if path.endswith('.gz') else ''}file, got {e}; fetch it again")
