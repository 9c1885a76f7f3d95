"""Zstandard: frames of any window, one after another, with bounded memory."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from lm.data import Text
from lm.data.sources import zstd
from lm.data.sources.base import Document, Problem

TEXT = b"".join(b"%d bottles of text\n" % i for i in range(20_000))
WIDE = 1 << 31


def pack(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as f:
        f.write(content)
    return sink.getvalue().to_pybytes()


def with_window(frame: bytes, window_log: int) -> bytes:
    """The frame as if it had been packed with a window so large, as into a pipe: its size is not said."""
    assert not frame[4] & 0x20, "a single segment"
    return frame[:5] + bytes([window_log - 10 << 3]) + frame[6:]


def skippable(content: bytes, number: int = 0) -> bytes:
    return bytes([0x50 + number]) + zstd.SKIPPABLE + struct.pack("<I", len(content)) + content


def read(tmp_path: Path, content: bytes, **kw) -> bytes | str:
    path = tmp_path / "a.zst"
    path.write_bytes(content)
    source = Text(glob=str(path), **kw)
    *_, last = [e for part in source.parts(tmp_path) for e in source.entries(part, 1 << 30)]
    assert isinstance(last, Document) or (isinstance(last, Problem) and "\n" not in last.message)
    return last.raw if isinstance(last, Document) else last.message


def test_a_frame_with_a_wide_window_is_read_while_it_holds_less(tmp_path):
    for window_log in (27, 28, 30, 31, 40):
        assert read(tmp_path, with_window(pack(TEXT), window_log)) == TEXT


def test_frames_of_different_windows_and_skippable_ones_are_one_text(tmp_path):
    frames = [
        pack(TEXT),
        skippable(b"index"),
        with_window(pack(b"more"), 31),
        skippable(b"", 15),
        pack(b""),
        pack(b"!"),
    ]
    assert read(tmp_path, b"".join(frames)) == TEXT + b"more!"
    assert read(tmp_path, skippable(b"x" * 100_000) + pack(TEXT)) == TEXT
    assert read(tmp_path, skippable(b"only")) == b""


def test_a_frame_that_holds_more_than_is_allowed_says_its_window_and_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(zstd, "WINDOW_BYTES", 1 << 17)
    said = read(tmp_path, with_window(pack(TEXT), 31))
    assert f"got one that needs a window of {WIDE} bytes, memory for each worker; set window_bytes={WIDE}" in said
    assert "fetch" not in said


def test_it_is_read_with_the_option_by_the_systems_library(tmp_path, monkeypatch):
    try:
        zstd._library()
    except OSError as e:
        pytest.skip(str(e))
    monkeypatch.setattr(zstd, "WINDOW_BYTES", 1 << 17)
    frames = [with_window(pack(TEXT), 31), pack(b"more"), with_window(pack(b"!"), 30)]
    assert read(tmp_path, b"".join(frames), window_bytes=WIDE) == TEXT + b"more!"
    cut = frames[0][:-20]
    assert "expected a whole zstd file, got the end of the file within a frame" in read(
        tmp_path, cut, window_bytes=WIDE
    )
    damaged = frames[0][:40] + bytes(40) + frames[0][80:]
    assert "expected a whole zstd file, got" in read(tmp_path, damaged, window_bytes=WIDE)


def test_without_the_library_the_way_to_it_is_said(tmp_path, monkeypatch):
    def fail(name):
        raise OSError("not there")

    zstd._library.cache_clear()
    monkeypatch.setattr(zstd.ctypes, "CDLL", fail)
    try:
        assert "no libzstd on this machine" in read(tmp_path, with_window(pack(TEXT), 31), window_bytes=WIDE)
    finally:
        zstd._library.cache_clear()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_791, 65_792, 300_000])
def test_every_size_of_a_header_is_understood(tmp_path, size):
    """One that says how much it holds: of 0 to 8 bytes, with and without a window."""
    content = (b"some text " * 40_000)[:size]
    assert read(tmp_path, pa.compress(content, codec="zstd", asbytes=True) + pack(b"end")) == content + b"end"


def test_what_is_cut_or_no_frame_is_one_line(tmp_path):
    whole = pack(TEXT)
    for content in (whole[:-3], whole[:7], whole + whole[:2], whole + whole[:30], skippable(b"x")[:-1]):
        assert "expected a whole zstd file, got " in read(tmp_path, content)
    assert "got b'garb' where a frame should begin" in read(tmp_path, whole + b"garbage")
    named = bytes([whole[4] | 1]) + whole[5:6] + b"\7"
    assert "got one that needs the dictionary 7" in read(tmp_path, whole[:4] + named + whole[6:])


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
@pytest.mark.parametrize(
    "options", [["--long=31"], ["--long=31", "-19"], ["--long=27"], ["-T2", "-B1MiB"], ["--no-check"]]
)
def test_what_the_tool_writes_is_read(tmp_path, options):
    packed = subprocess.run(["zstd", "-c", *options], input=TEXT, capture_output=True, check=True).stdout
    assert read(tmp_path, packed) == TEXT
    assert "expected a whole zstd file" in read(tmp_path, packed[:-5])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_a_window_that_is_needed_is_never_done_without(tmp_path):
    """A text that repeats itself 160 MB later: a smaller window would make another text of it."""
    once = b"".join(b"%d\n" % (i * 2654435761 % 2**32) for i in range(1 << 20))
    text = once + bytes(b"-" * 79 + b"\n") * (2 << 20) + once
    packed = subprocess.run(["zstd", "-1", "-c", "--long=31"], input=text, capture_output=True, check=True).stdout
    said = read(tmp_path, packed)
    assert isinstance(said, str) and f"set window_bytes={WIDE}" in said
    assert read(tmp_path, packed, window_bytes=WIDE) == text
