"""Raw files of text, opened: unpacked by what they hold and not by their names, and decoded by their marks.

What stands in them is the business of the sources. What is refused here is refused in words for whoever owns the file.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from lm.data.sources.files import Layer
from lm.data.sources.kinds import HEAD_BYTES, SUFFIXES, Kind, encoding, is_text, not_text, packing
from lm.data.sources.zstd import WINDOW_BYTES, WideWindow, Zstd
from lm.system_errors import system_error

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a file that is cut, damaged or not ours raises
MOST_PACKINGS = 3  # one inside another, as of a server that packs what is packed
KEPT = "files_kept_that_are_no_text"
UNPACKED = "files_named_as_packed_that_are_not"


class NotText(Exception):
    """A file that is no text. kind: what it is instead."""

    def __init__(self, kind: Kind):
        super().__init__(kind.name)
        self.kind = kind


class Opened(NamedTuple):
    """A file of bytes that are hopefully UTF-8. notes: what was done to come by them, as a report counts it."""

    file: IO[bytes]
    notes: tuple[str, ...] = ()


def open_plain(path: str) -> IO[bytes]:
    """The bytes of a file as they are. OSError where it cannot be opened."""
    return open(path, "rb", buffering=HEAD_BYTES)


def open_text(path: str, window_bytes: int = WINDOW_BYTES, keep: bool = False) -> Opened:
    """The text of a file: unpacked, and in UTF-8 where its mark says that it is UTF-16 or UTF-32.

    window_bytes: the most that unpacking may remember of the text. keep: also the bytes of a file that is no text.
    Raises UNREADABLE, here or when it is read, and NotText.
    """
    file, packings = _unpacked(open_plain(path), window_bytes)
    try:
        head = file.peek(HEAD_BYTES)
        notes: tuple[str, ...] = ()
        named = SUFFIXES.get(os.path.splitext(path)[1])
        if named is not None and not packings:
            if not head:
                raise EOFError("an empty one")
            if not is_text(head) and encoding(head) is None and not_text(head) is None:
                raise OSError(f"bytes that are neither {named} nor text")
            notes += (UNPACKED,)
        if (found := encoding(head)) is not None:
            name, n = found
            file.read(n)
            decoded = io.BufferedReader(_Decoded(file, name), HEAD_BYTES)
            return Opened(decoded, (*notes, f"files_decoded_from_{name[:6].replace('-', '_')}"))
        if (kind := not_text(head)) is not None:
            if not keep:
                raise NotText(kind.within(packings))
            notes += (KEPT,)
        return Opened(file, notes)
    except BaseException:
        file.close()
        raise


def is_plain(path: str) -> bool:
    """Whether a file is text as it stands on the disk, so that it can be read from any place on."""
    try:
        with open_plain(path) as f:
            head = f.peek(HEAD_BYTES)  # type: ignore[attr-defined]
    except OSError:
        return False  # whoever reads it meets the error, which may be skipped
    return packing(head) is None and encoding(head) is None and not_text(head) is None


def kind_of(path: str) -> Kind | None:
    """What a file is by its first bytes, also where it is packed or text; None where nothing says so, or it cannot be
    read."""
    try:
        with open_plain(path) as f:
            head = f.peek(HEAD_BYTES)  # type: ignore[attr-defined]
    except OSError:
        return None
    if packed := packing(head):
        return Kind(f"a file packed by {packed}", "unpack it")
    if head and (is_text(head) or encoding(head)) and not not_text(head):
        return Kind("text", "use the Jsonl or the Text source")
    return not_text(head)


def unreadable(path: str | os.PathLike[str], error: BaseException) -> str:
    """Says in a line what is wrong with a raw file that could not be read, and the way out."""
    if isinstance(error, WideWindow):
        return (
            f"{path}: expected a file that is unpacked within window_bytes of its source, got one that needs a window "
            f"of {error.n_bytes} bytes, memory for each worker; set window_bytes={error.n_bytes}, or pack it again "
            "without --long"
        )
    if isinstance(error, OSError) and (said := system_error(path, error)):
        return said
    kind = _packed_as(str(path))
    return f"{path}: expected a whole {kind}file, got {error}; fetch it again"


def _packed_as(path: str) -> str:
    try:
        with open_plain(path) as f:
            kind = packing(f.peek(HEAD_BYTES))  # type: ignore[attr-defined]
    except OSError:
        kind = None
    kind = kind or SUFFIXES.get(os.path.splitext(path)[1])
    return f"{kind} " if kind else ""


def _unpacked(file: Any, window_bytes: int) -> tuple[Any, tuple[str, ...]]:
    """(what is in a file that may be packed, how it is packed, outermost first)."""
    packings: tuple[str, ...] = ()
    try:
        while len(packings) < MOST_PACKINGS and (kind := packing(file.peek(HEAD_BYTES))) is not None:
            file = io.BufferedReader(_UNPACK[kind](file, window_bytes), HEAD_BYTES)
            packings += (kind,)
    except BaseException:
        file.close()
        raise
    return file, packings


class _Streams(Layer):
    """Unpacks streams one after another, and zeros between and behind them, as tapes and xz pad. OSError for other
    bytes there: what they were would be missed by nobody. new: makes a decompressor of bz2 or lzma."""

    def __init__(self, file: IO[bytes], new: Callable[[bytes], Any]):
        super().__init__(file)
        self._new = new
        self._decoder: Any = None
        self._rest = b""

    def readinto(self, buffer: Any) -> int:
        piece = b""
        while not piece:
            if self._decoder is None and not self._begin():
                return 0
            if self._decoder.needs_input and not self._rest:
                self._rest = self._file.read(HEAD_BYTES)
                if not self._rest:
                    raise EOFError("the end of the file within a stream")
            given, self._rest = self._rest, b""
            piece = self._decoder.decompress(given, len(buffer))
            if self._decoder.eof:
                self._rest, self._decoder = self._decoder.unused_data, None
        buffer[: len(piece)] = piece
        return len(piece)

    def _begin(self) -> bool:
        while not (rest := self._rest.lstrip(b"\0")):
            self._rest = self._file.read(HEAD_BYTES)
            if not self._rest:
                return False
        if len(rest) < 32:  # enough for any header
            rest += self._file.read(HEAD_BYTES)
        if packing(rest) is None:
            raise OSError(f"{rest[:8]!r} where a stream should begin or the file end")
        self._rest, self._decoder = rest, self._new(rest)
        return True


class _Gzip(gzip.GzipFile):
    """GzipFile closes no file that it was given."""

    def __init__(self, file: IO[bytes]):
        super().__init__(fileobj=file, mode="rb")
        self._given = file

    def close(self) -> None:
        super().close()
        self._given.close()


def _lzma(window_bytes: int) -> Callable[[bytes], Any]:
    """Makes decompressors of xz and lzma within a limit of memory: theirs is the size of a dictionary, and some."""

    def new(head: bytes) -> Any:
        needs = _dictionary_bytes(head)
        if needs > window_bytes:
            raise WideWindow(needs)
        return lzma.LZMADecompressor()

    return new


def _dictionary_bytes(head: bytes) -> int:
    """The size of the dictionary that a stream of xz or lzma needs, 0 where it is not where it usually is."""
    if head[:1] == b"]":
        return int.from_bytes(head[1:5], "little")
    # The header of the first block (section 3.1 of the xz format): its size, flags, perhaps two sizes, then filters.
    at, flags = 14, head[13] if len(head) > 13 else 0xFF
    for flag in (0x40, 0x80):
        if flags & flag:
            while at < len(head) and head[at] & 0x80:
                at += 1
            at += 1
    for _ in range((flags & 3) + 1):
        if len(head) < at + 3:
            return 0
        if head[at] == 0x21:  # LZMA2
            bits = head[at + 2] & 0x3F
            return 0xFFFFFFFF if bits >= 40 else (2 | bits & 1) << (bits // 2 + 11)
        at += 2 + head[at + 1]
    return 0


_UNPACK: dict[str, Callable[[IO[bytes], int], Any]] = {
    "gzip": lambda file, window_bytes: _Gzip(file),
    "bzip2": lambda file, window_bytes: _Streams(file, lambda head: bz2.BZ2Decompressor()),
    "xz": lambda file, window_bytes: _Streams(file, _lzma(window_bytes)),
    "lzma": lambda file, window_bytes: _Streams(file, _lzma(window_bytes)),
    "zstd": Zstd,
}


class _Decoded(Layer):
    """UTF-16 or UTF-32 as UTF-8. Halves of characters pass as bytes that are no UTF-8: what to do about them is not for
    this class to say. EOFError where the file ends within a character."""

    def __init__(self, file: IO[bytes], name: str):
        super().__init__(file)
        self._name = name
        self._decoder = codecs.getincrementaldecoder(name)("surrogatepass")
        self._ready = b""

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._file.read(HEAD_BYTES)
            try:
                text = self._decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                if not chunk:
                    raise EOFError(f"the end of the file within a character of {self._name}") from None
                raise OSError(f"bytes that are no {self._name}: {e.object[e.start : e.end]!r}") from None
            if not chunk:
                return 0
            self._ready = text.encode("utf-8", "surrogatepass")
        piece, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)
