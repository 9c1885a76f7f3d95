"""The token store: flat shards of token ids on disk, read as one space.

    <path>/meta.json           StoreMeta, written last: a folder without it is unfinished
    <path>/tokens-00000.bin    little-endian uint16, or uint32 where the vocabulary needs it
    <path>/docs-00000.u64      little-endian offsets: where each document of the shard starts in it, then where it ends

The first token of the store is an eos and every document ends in one, so each document lies between two. Shards never
split a document. Every file gets its name when it is complete.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.data.store.unchanged import FileState, check_files
from lm.data.tokenizer.base import EOS_ID
from lm.errors import UserError
from lm.files import temporary_name, write_atomic
from lm.system_errors import system_errors

VERSION = 1
META = "meta.json"
ASK_BYTES = 2**17  # the kernel may leave out what a request has beyond its read-ahead, which is 128 kB or more
SPARE_FILES = 512  # that may be open beside the shards: checkpoints, logs, sockets


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Counts and checksums of one `tokens`/`docs` pair. n_bytes: of original text, in UTF-8."""

    n_tokens: int
    n_documents: int
    n_bytes: int
    tokens_sha256: str
    docs_sha256: str


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """`meta.json`. tokenizer, corpus: fingerprints. made_from: the settings that decide the content. raw: hash of the
    raw files' names, sizes and checksums, where there are any; in older ones of their names, sizes and times. counts:
    what was left out or mended, in the whole source."""

    version: int = VERSION
    dtype: str
    tokenizer: str
    corpus: str
    made_from: dict[str, Any]
    raw: str | None
    counts: dict[str, int]
    shards: tuple[Shard, ...]


def dtype_for(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def tokens_name(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def docs_name(shard: int) -> str:
    return f"docs-{shard:05d}.u64"


class ShardWriter:
    """Streams documents into shard `number` of `folder`; memory does not grow with the shard but for its offsets.

    with ShardWriter(folder, 0, dtype) as w: w.add(ids, n_bytes); shard = w.finish()
    Without `finish`, the files keep their temporary names and go. eos_id: of the tokenizer.
    """

    def __init__(self, folder: Path, number: int, dtype: str, eos_id: int = EOS_ID):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._number, self._dtype = folder, number, dtype
        self._temporary = temporary_name(folder / tokens_name(number))
        self._file = open(self._temporary, "wb")
        self._hash = hashlib.sha256()
        self._starts: list[int] = []
        self._n_tokens = self._n_bytes = 0
        self._eos_id, self._eos = eos_id, np.array(eos_id, dtype).tobytes()
        if number == 0:
            self._write([])  # the eos that opens the store

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, ids: list[int], n_bytes: int) -> None:
        """Writes the ids of one document, without its eos. UserError where it has one: it would be two."""
        self._starts.append(self._n_tokens)
        self._write(ids)
        self._n_bytes += n_bytes

    def finish(self) -> Shard:
        docs = np.array(self._starts + [self._n_tokens], "<u8").tobytes()
        self._file.flush()
        os.fsync(self._file.fileno())
        write_atomic(self._folder / docs_name(self._number), docs)
        # After the offsets: whoever sees tokens finds them.
        os.replace(self._temporary, self._folder / tokens_name(self._number))
        return Shard(
            n_tokens=self._n_tokens,
            n_documents=len(self._starts),
            n_bytes=self._n_bytes,
            tokens_sha256=self._hash.hexdigest(),
            docs_sha256=hashlib.sha256(docs).hexdigest(),
        )

    def _write(self, ids):
        tokens = np.fromiter(ids, self._dtype, len(ids))  # np.array takes twice as long
        if (tokens == self._eos_id).any():
            raise UserError(
                f"{self._folder}: expected documents without token {self._eos_id}, which ends them, got one that the "
                "tokenizer made of text; name another eos_token in its tokenizer_config.json"
            )
        raw = tokens.tobytes() + self._eos
        self._file.write(raw)
        self._hash.update(raw)  # as it is written: no second pass over the shard
        self._n_tokens += len(ids) + 1


class ShardFile(NamedTuple):
    name: str
    size: int
    sha256: str


def shard_files(number: int, shard: Shard, dtype: str) -> tuple[ShardFile, ShardFile]:
    """Names the files that a shard consists of."""
    return (
        ShardFile(tokens_name(number), shard.n_tokens * np.dtype(dtype).itemsize, shard.tokens_sha256),
        ShardFile(docs_name(number), (shard.n_documents + 1) * 8, shard.docs_sha256),
    )


def check_shard_files(folder: Path, number: int, shard: Shard, dtype: str) -> None:
    """Raises UserError for a missing or cut file. Sizes only: `Store.verify` reads the content."""
    for name, size, _ in shard_files(number, shard, dtype):
        path = folder / name
        got = path.stat().st_size if path.is_file() else None
        if got != size:
            found = "nothing there" if got is None else f"{got}"
            raise UserError(f"{path}: expected {size} bytes, got {found}; copy it again or run `lm prepare --force`")


class Store:
    """One prepared split, memory-mapped. Opening it checks version and file sizes, and reads no tokens."""

    @system_errors()
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = meta = _read_meta(self.path)
        for i, shard in enumerate(meta.shards):
            check_shard_files(self.path, i, shard, meta.dtype)
        self.n_tokens = sum(s.n_tokens for s in meta.shards)
        self.n_documents = sum(s.n_documents for s in meta.shards)
        self.n_bytes = sum(s.n_bytes for s in meta.shards)
        # No path and no date: a copy has the same.
        content = [meta.version, meta.dtype, meta.tokenizer, [dataclasses.astuple(s) for s in meta.shards]]
        self.fingerprint: str = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        _allow_files(self.path, 2 * len(meta.shards))
        self._files: dict[Path, FileState] = {}  # of those that are mapped, not of what has their names by now
        mapped = [(self._map(tokens_name(i)), self._map(docs_name(i))) for i in range(len(meta.shards))]
        full = [(tokens, docs) for tokens, docs in mapped if tokens is not None and docs is not None]
        self._maps = [tokens for tokens, _ in full]
        for tokens in self._maps:
            tokens.madvise(mmap.MADV_RANDOM)  # see `_will_read`
        self._tokens = [np.frombuffer(tokens, meta.dtype) for tokens, _ in full]
        self._docs = [np.frombuffer(docs, "<u8") for _, docs in full]
        self._itemsize = np.dtype(meta.dtype).itemsize
        self._token_base = np.cumsum([0] + [len(t) for t in self._tokens])
        self._doc_base = np.cumsum([0] + [len(d) - 1 for d in self._docs])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the one flat space, int32."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise UserError(f"{self.path}: expected a range within its {self.n_tokens} tokens, got {start}:{stop}")
        out = np.empty(stop - start, np.int32)
        if len(out):
            self._will_read(np.array([start]), np.array([len(out)]))
            self._read_across(start, out)
        return out

    def read_windows(self, starts: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> None:
        """starts int64 [n]: fills out int32 [m, length] at rows [n] (None: all) with the tokens from each start on.

        Reads in the order of the disk, whatever the order of `starts`.
        """
        order = np.argsort(starts, kind="stable")
        self._will_read(starts, np.full(len(starts), out.shape[1]))
        ordered, rows = starts[order], order if rows is None else rows[order]
        length, bases = out.shape[1], self._token_base
        begun = np.searchsorted(ordered, bases[1:])  # starts in the shards up to this one
        whole = np.searchsorted(ordered, bases[1:] - (length - 1))  # and ends there too
        at = 0
        for shard, end, next_at in zip(range(len(self._tokens)), whole.tolist(), begun.tolist(), strict=True):
            if at < end:
                out[rows[at:end]] = _windows(self._tokens[shard], length)[ordered[at:end] - bases[shard]]
            for i in range(max(at, end), next_at):
                self._read_across(int(ordered[i]), out[rows[i]])
            at = next_at

    def read_pieces(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """starts, lengths, at int64 [n]: fills out int32 [m] from each `at` on with the tokens from each start on."""
        self._will_read(starts, lengths)
        shards = np.searchsorted(self._token_base, starts, "right") - 1
        within = starts - self._token_base[shards]
        for shard, start, n, to in zip(shards.tolist(), within.tolist(), lengths.tolist(), at.tolist(), strict=True):
            part = self._tokens[shard][start : start + n]
            if len(part) == n:
                out[to : to + n] = part
            else:
                self._read_across(int(self._token_base[shard]) + start, out[to : to + n])

    def document_starts(self) -> np.ndarray:
        """int64 [n_documents + 1]: token offset of the first token of each document, then the end. Reads them all."""
        parts = [d[:-1].astype(np.int64) + base for d, base in zip(self._docs, self._token_base, strict=False)]
        return np.concatenate([*parts, np.array([self.n_tokens], np.int64)])

    def document_at(self, offset: int) -> int:
        """Number of the document that holds a token offset; the opening eos counts to the first document."""
        offset = max(offset, 1)
        shard = bisect.bisect_right(self._token_base, offset) - 1
        within = np.searchsorted(self._docs[shard], offset - self._token_base[shard], "right")
        return int(self._doc_base[shard]) + int(within) - 1

    def document_start(self, document: int) -> int:
        """Token offset of the first token of a document."""
        if not 0 <= document < self.n_documents:
            raise UserError(f"{self.path}: expected a document below {self.n_documents}, got {document}")
        shard = bisect.bisect_right(self._doc_base, document) - 1
        return int(self._token_base[shard]) + int(self._docs[shard][document - self._doc_base[shard]])

    def document(self, document: int) -> np.ndarray:
        """int32 tokens of a document, with its eos."""
        start = self.document_start(document)
        end = self.n_tokens if document + 1 == self.n_documents else self.document_start(document + 1)
        return self.read(start, end)

    @system_errors()
    def verify(self) -> None:
        """Reads every file and compares checksums; UserError names the first that differs."""
        for i, shard in enumerate(self.meta.shards):
            for name, _, expected in shard_files(i, shard, self.meta.dtype):
                with open(self.path / name, "rb") as f:
                    got = hashlib.file_digest(f, "sha256").hexdigest()
                if got != expected:
                    raise UserError(
                        f"{self.path / name}: expected sha256 {expected[:12]}, got {got[:12]}; the file is damaged: "
                        "copy it again or run `lm prepare --force`"
                    )

    def check_unchanged(self) -> None:
        """Raises UserError when a file is not the one that was opened: replaced, written to, cut, or gone. A stat each.

        What is read of a file that was replaced is still the old text, of one that was written to the new, and of one
        that was cut nothing: the process dies of SIGBUS.
        """
        check_files(self._files)

    def _map(self, name: str) -> mmap.mmap | None:
        with open(self.path / name, "rb") as f:
            stat = os.fstat(f.fileno())
            self._files[self.path / name] = FileState.of(stat)
            # An empty file cannot be mapped.
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if stat.st_size else None

    def _will_read(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Asks the disk for what is not in memory, all of it at once.

        Left to itself, the kernel reads from 128 kB to some MB around each place that is touched, one place after
        another, which takes a hundred times as long for random rows.
        """
        shards = np.searchsorted(self._token_base, starts, "right") - 1
        begin = (starts - self._token_base[shards]) * self._itemsize
        end = begin + lengths * self._itemsize
        begin -= begin % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # advice that a file system does not take costs time alone
            for shard, at, n in zip(shards.tolist(), begin.tolist(), (end - begin).tolist(), strict=True):
                for chunk in range(at, at + n, ASK_BYTES):
                    self._maps[shard].madvise(mmap.MADV_WILLNEED, chunk, min(ASK_BYTES, at + n - chunk))
        over = starts + lengths - self._token_base[shards + 1]
        if len(across := np.flatnonzero(over > 0)):
            self._will_read(self._token_base[shards[across] + 1], over[across])

    def _read_across(self, start, out):
        shard = bisect.bisect_right(self._token_base, start) - 1
        done = 0
        while done < len(out):
            part = self._tokens[shard][start + done - self._token_base[shard] :][: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1


def _allow_files(path: Path, n: int) -> None:
    """Raises the process's soft limit where n more open files may be above it: a map keeps its file open. UserError
    where the hard limit is below them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = len(os.listdir("/dev/fd"))
    if soft == resource.RLIM_INFINITY or now + n + SPARE_FILES <= soft:
        return
    limit = now + n + SPARE_FILES if hard == resource.RLIM_INFINITY else min(now + n + SPARE_FILES, hard)
    try:
        if now + n > limit:
            raise ValueError
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (ValueError, OSError):  # some systems have another limit below an infinite one
        raise UserError(
            f"{path}: expected to map its {n} files, got a limit of {hard} open files, {now} of them in use; raise it: "
            f"`ulimit -Hn {now + n + SPARE_FILES}` as root"
        ) from None


def _windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """[n - length + 1, length] view of tokens [n]: row i starts at token i. As sliding_window_view, in a tenth of the
    time; gathering rows from it takes half as long as a loop."""
    shape = (len(tokens) - length + 1, length)
    # The tuple twice: both axes step by a token.
    return np.ndarray(shape, tokens.dtype, buffer=tokens, strides=2 * tokens.strides)


def write_meta(folder: Path, meta: StoreMeta) -> None:
    write_atomic(folder / META, json.dumps(dataclasses.asdict(meta), indent=1).encode())


def _read_meta(folder: Path) -> StoreMeta:
    path = folder / META
    if not path.is_file():
        raise UserError(f"{folder}: expected a prepared store with meta.json, got none; run `lm prepare`")
    return parse_meta(path.read_bytes(), str(path))


def parse_meta(content: bytes, path: str) -> StoreMeta:
    """UserError, which names the path, for what is no meta.json of this version."""
    try:
        raw = json.loads(content)
        version = raw["version"]
        if version == VERSION:
            return StoreMeta(**raw | {"shards": tuple(Shard(**s) for s in raw["shards"])})
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path}: expected the meta.json of a store, got {e!r}; run `lm prepare --force`") from None
    raise UserError(f"{path}: expected store version {VERSION}, got {version}; run `lm prepare --force`")
