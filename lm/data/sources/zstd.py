"""Zstandard files, frame after frame, with bounded memory (RFC 8878).

Frames are told apart here, by their headers and the sizes of their blocks, and unpacked by pyarrow, which takes windows
of up to 128 MiB, or by the system's libzstd, which takes those of `zstd --long=31` too.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import io
import struct
from typing import IO, Any, NamedTuple, Protocol

from lm.data.sources.arrow import pyarrow
from lm.data.sources.files import Layer

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE = b"\x2a\x4d\x18"  # behind 0x50 to 0x5f
WINDOW_BYTES = 1 << 27  # the most that decoders of zstd take unasked
LIBRARY_WINDOW_BYTES = 1 << 31
SIZE_BYTES = (0, 2, 4, 8)  # of the content's size, by its flag
ID_BYTES = (0, 1, 2, 4)  # of a dictionary's name, by its flag
READ_BYTES = 1 << 16
WINDOW_LOG_MAX = 100  # ZSTD_d_windowLogMax of zstd.h


class WideWindow(OSError):
    """A file that needs a larger window than is allowed. n_bytes: as large as it needs."""

    def __init__(self, n_bytes: int):
        super().__init__(f"a window of {n_bytes} bytes")
        self.n_bytes = n_bytes


class Header(NamedTuple):
    """The header of a frame. raw: its bytes. window: bytes of text that the decoder has to remember. at: where in `raw`
    the window is written, -1 where it is the size of the content. content: that size, -1 where it is not said."""

    raw: bytes
    window: int
    at: int
    content: int
    has_checksum: bool


class Decoder(Protocol):
    def read(self, n: int) -> bytes: ...


class Zstd(Layer):
    """Unpacks the frames of a file. window_bytes: the most that may be remembered of the text.

    A frame with a larger window is read as long as it holds less than that, since it can then refer to no more: a pipe
    into `zstd --long=31` has a window of 2 GiB whatever its size. WideWindow where it holds more; EOFError for one that
    is cut, OSError for other bytes.
    """

    def __init__(self, file: IO[bytes], window_bytes: int = WINDOW_BYTES):
        super().__init__(file)
        self._window_bytes = max(window_bytes, WINDOW_BYTES)
        self._frame: Frame | None = None
        self._decoder: Decoder | None = None
        self._left: int | None = None  # bytes that the frame may still hold
        self._needs = 0

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder is None and not self._begin():
                return 0
            assert self._decoder is not None and self._frame is not None
            piece = self._decoder.read(len(buffer))
            if self._frame.cut:
                raise EOFError("the end of the file within a frame")
            if piece:
                break
            while self._frame.read(READ_BYTES):  # whatever a decoder has left
                pass
            self._decoder = None
        if self._left is not None:
            self._left -= len(piece)
            if self._left < 0:
                raise WideWindow(self._needs)
        buffer[: len(piece)] = piece
        return len(piece)

    def _begin(self) -> bool:
        """Goes to the next frame. False at the end of the file."""
        header = read_header(self._file)
        if header is None:
            return False
        self._left, self._needs = None, header.window
        if header.window <= WINDOW_BYTES:
            self._frame = Frame(self._file, header)
            self._decoder = pyarrow().CompressedInputStream(self._frame, "zstd")
        elif header.window <= self._window_bytes:
            self._frame = Frame(self._file, header)
            self._decoder = Library(self._frame)
        else:
            if header.at < 0 or header.content > WINDOW_BYTES:
                raise WideWindow(header.window)
            raw = bytearray(header.raw)
            raw[header.at] = (WINDOW_BYTES.bit_length() - 1 - 10) << 3
            self._frame, self._left = Frame(self._file, header._replace(raw=bytes(raw))), WINDOW_BYTES
            self._decoder = pyarrow().CompressedInputStream(self._frame, "zstd")
        return True


def read_header(file: IO[bytes]) -> Header | None:
    """The header of the next frame, None at the end of the file; skippable frames are passed over."""
    while True:
        magic = file.read(4)
        if not magic:
            return None
        if len(magic) == 4 and magic[1:] == SKIPPABLE and magic[0] >> 4 == 5:
            left = struct.unpack("<I", _exactly(file, 4))[0]
            while left:
                left -= len(_exactly(file, min(left, READ_BYTES)))
            continue
        if magic != MAGIC:
            if MAGIC.startswith(magic):
                raise EOFError("the end of the file within a frame")
            raise OSError(f"{magic!r} where a frame should begin")
        break
    flags = _exactly(file, 1)[0]
    single, size_flag = bool(flags & 0x20), flags >> 6
    described = b"" if single else _exactly(file, 1)
    named = _exactly(file, ID_BYTES[flags & 3])
    sized = _exactly(file, 1 if single and not size_flag else SIZE_BYTES[size_flag])
    if int.from_bytes(named, "little"):
        raise OSError(f"one that needs the dictionary {int.from_bytes(named, 'little')}")
    content = int.from_bytes(sized, "little") + (256 if len(sized) == 2 else 0) if sized else -1
    window = content
    if not single:
        window = 1 << (10 + (described[0] >> 3))
        window += window // 8 * (described[0] & 7)
    raw = magic + bytes([flags]) + described + named + sized
    return Header(raw, window, -1 if single else 5, content, bool(flags & 4))


def _exactly(file: IO[bytes], n: int) -> bytes:
    got = file.read(n) if n else b""
    if len(got) < n:
        raise EOFError("the end of the file within a frame")
    return got


class Frame(io.RawIOBase):
    """The bytes of one frame: it ends where the frame does. cut: whether the file ended before."""

    def __init__(self, file: IO[bytes], header: Header):
        self._file, self._ready, self._tail = file, header.raw, 4 * header.has_checksum
        self._left, self._is_last, self.cut = 0, False, False

    def readable(self) -> bool:
        return True

    def read(self, n: int = -1) -> bytes:
        """Some bytes, up to n; b"" at the end of the frame."""
        pieces, wanted = [], READ_BYTES if n < 0 else n
        while wanted > 0 and (piece := self._next(wanted)):
            pieces.append(piece)
            wanted -= len(piece)
        return b"".join(pieces)

    def _next(self, n: int) -> bytes:
        if self._ready:
            piece, self._ready = self._ready[:n], self._ready[n:]
            return piece
        if not self._left:
            if not self._is_last:
                return self._next_block(n)
            self._left, self._tail = self._tail, 0
        piece = self._file.read(min(n, self._left))
        self.cut = self.cut or len(piece) < min(n, self._left)
        self._left -= len(piece)
        return piece

    def _next_block(self, n: int) -> bytes:
        head = self._file.read(3)
        if len(head) < 3:
            self.cut = True
            return b""
        word = int.from_bytes(head, "little")
        self._is_last = bool(word & 1)
        self._left = 1 if word >> 1 & 3 == 1 else word >> 3  # one that repeats a byte holds it once
        self._ready = head
        return self._next(n)


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer of zstd.h."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("at", ctypes.c_size_t)]


class Library:
    """Unpacks a frame by the system's libzstd. OSError where there is none, and for what it cannot unpack."""

    def __init__(self, file: Frame):
        self._file, self._lib = file, _library()
        self._context = ctypes.c_void_p(self._lib.ZSTD_createDCtx())
        self._held, self._input, self._is_done = b"", _Buffer(), False
        self._call("DCtx_setParameter", self._context, WINDOW_LOG_MAX, LIBRARY_WINDOW_BYTES.bit_length() - 1)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._lib.ZSTD_freeDCtx(self._context)

    def read(self, n: int) -> bytes:
        room = ctypes.create_string_buffer(n)
        output = _Buffer(ctypes.cast(room, ctypes.c_void_p), n, 0)
        while not output.at and not self._is_done:
            if self._input.at == self._input.size:
                self._held = self._file.read(READ_BYTES)
                self._input = _Buffer(ctypes.cast(ctypes.c_char_p(self._held), ctypes.c_void_p), len(self._held), 0)
            left = self._call("decompressStream", self._context, ctypes.byref(output), ctypes.byref(self._input))
            self._is_done = left == 0
            if not self._held and not output.at:
                break  # the file is cut, as whoever gave the frame knows
        return room.raw[: output.at]

    def _call(self, name: str, *args: Any) -> int:
        found = getattr(self._lib, f"ZSTD_{name}")(*args)
        if self._lib.ZSTD_isError(found):
            raise OSError(self._lib.ZSTD_getErrorName(found).decode())
        return found


@functools.cache
def _library() -> Any:
    try:
        lib = ctypes.CDLL(ctypes.util.find_library("zstd") or "libzstd.so.1")
    except OSError:
        raise OSError("no libzstd on this machine, which such a window needs (apt install libzstd1)") from None
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for name, result, arguments in (
        ("createDCtx", pointer, []),
        ("freeDCtx", size, [pointer]),
        ("DCtx_setParameter", size, [pointer, ctypes.c_int, ctypes.c_int]),
        ("decompressStream", size, [pointer, pointer, pointer]),
        ("isError", ctypes.c_uint, [size]),
        ("getErrorName", ctypes.c_char_p, [size]),
    ):
        function = getattr(lib, f"ZSTD_{name}")
        function.restype, function.argtypes = result, arguments
    return lib
