"""Text comes out of files however they are packed and encoded, and what is no text is refused in a line that says what
it is."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import shutil
import sqlite3
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.data import Arrow, HFDataset, Jsonl, Parquet, Source, Text
from lm.data.sources import kinds, opening
from lm.data.sources.base import Document, Part, Problem
from lm.data.sources.kinds import is_text, not_text, packing
from lm.data.sources.opening import unreadable
from lm.errors import UserError
from tests.data.conftest import sample_texts
from tests.permissions import as_nobody, let_in

TEXT = "\n".join(sample_texts(30)).encode()
LINES = "".join(f'{{"text": "line {i} é"}}\n' for i in range(30)).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as f:
        f.write(content)
    return sink.getvalue().to_pybytes()


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    "zst": zstd,
}


def entries(source: Source) -> list[Document | Problem]:
    return [e for part in source.parts(Path()) for e in source.entries(part, 1 << 26)]


def text_of(path: Path, **kw) -> bytes:
    (document,) = entries(Text(glob=str(path), **kw))
    assert isinstance(document, Document), document
    return document.raw


def problem(source: Source) -> Problem:
    *_, last = entries(source)
    assert isinstance(last, Problem) and "\n" not in last.message
    return last


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_are_read_by_what_they_hold_whatever_their_names_say(tmp_path, suffix):
    for name in (f"a.{suffix}", "a", "a.txt", "a.gz", "a.zst", "a.xz"):
        (tmp_path / name).write_bytes(PACK[suffix](TEXT))
        assert text_of(tmp_path / name) == TEXT, name
    (tmp_path / "lines").write_bytes(PACK[suffix](LINES))
    assert [e.raw.decode() for e in entries(Jsonl(glob=f"{tmp_path}/lines"))] == [f"line {i} é" for i in range(30)]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_streams_one_after_another_are_one_text_and_a_packed_file_may_be_packed_again(tmp_path, suffix):
    (tmp_path / "a").write_bytes(PACK[suffix](TEXT) + PACK[suffix](b"") + PACK[suffix](b"more"))
    assert text_of(tmp_path / "a") == TEXT + b"more"
    (tmp_path / "b").write_bytes(PACK["gz"](PACK[suffix](TEXT)))
    assert text_of(tmp_path / "b") == TEXT


@pytest.mark.parametrize(("suffix", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz"), ("zst", "zstd")])
def test_a_packed_file_that_is_cut_or_goes_on_with_other_bytes_is_one_line(tmp_path, suffix, name):
    whole = PACK[suffix](TEXT)
    damaged = {
        "cut": whole[:-7],
        "cut-early": whole[: len(whole) // 3],
        "second-cut": whole + whole[:-5],
        "garbage": whole + b"garbage behind it",
        "flipped": whole[:200] + bytes(b ^ 255 for b in whole[200:260]) + whole[260:],
        "empty": b"",
        "headless": whole[11:],
    }
    if suffix == "zst":
        del damaged["flipped"]  # Arrow writes no checksums
    for what, content in damaged.items():
        path = tmp_path / f"{what}.{suffix}"
        path.write_bytes(content)
        for source in (Text(glob=str(path)), Jsonl(glob=str(path))):
            last = problem(source)
            assert last.reason == "unreadable", what
            assert last.message.startswith(f"{path}: expected a whole {name} file, got "), what
            assert last.message.endswith("; fetch it again"), what


def test_zeros_behind_a_stream_are_padding(tmp_path):
    for suffix in ("gz", "bz2", "xz"):
        (tmp_path / "a").write_bytes(PACK[suffix](TEXT) + bytes(512))
        assert text_of(tmp_path / "a") == TEXT


def test_text_under_the_name_of_a_packed_file_is_read_and_counted(tmp_path):
    for suffix in PACK:
        (tmp_path / f"a.{suffix}").write_bytes(TEXT)
        (document,) = entries(Text(glob=f"{tmp_path}/a.{suffix}"))
        assert document.raw == TEXT and document.notes == ("files_named_as_packed_that_are_not",)


def test_a_large_dictionary_of_xz_is_refused_with_its_size_or_allowed(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 28}]
    alone = [{"id": lzma.FILTER_LZMA1, "preset": 0, "dict_size": 1 << 28}]
    (tmp_path / "a.xz").write_bytes(lzma.compress(TEXT, filters=filters))
    (tmp_path / "b.lzma").write_bytes(lzma.compress(TEXT, format=lzma.FORMAT_ALONE, filters=alone))
    for name in ("a.xz", "b.lzma"):
        last = problem(Text(glob=f"{tmp_path}/{name}"))
        assert f"a window of {1 << 28} bytes" in last.message and f"set window_bytes={1 << 28}" in last.message
        assert text_of(tmp_path / name, window_bytes=1 << 28) == TEXT
    with pytest.raises(UserError, match="Text.window_bytes: expected at least 134217728, got 5"):
        Text(glob="x", window_bytes=5)
    with pytest.raises(UserError, match="Jsonl.window_bytes: expected at least"):
        Jsonl(glob="x", window_bytes=5)


MARKED = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", MARKED)
def test_a_mark_says_how_a_file_is_decoded(tmp_path, encoding):
    text = "\ufeff" + "grüße 東京 😀\n" * 20_000  # more than a buffer: pairs lie across its end
    for pack in (bytes, gzip.compress, zstd):
        (tmp_path / "a.txt").write_bytes(pack(text.encode(encoding)))
        (document,) = entries(Text(glob=f"{tmp_path}/a.txt"))
        assert document.raw.decode() == text[1:]
        assert document.notes == (f"files_decoded_from_{encoding[:6].replace('-', '_')}",)
    (tmp_path / "a.jsonl").write_bytes(('\ufeff{"text": "ß"}\r\n{"text": "😀"}').encode(encoding))
    assert [e.raw.decode() for e in entries(Jsonl(glob=f"{tmp_path}/a.jsonl"))] == ["ß", "😀"]


def test_marked_files_that_are_not_whole_are_one_line_and_halves_of_pairs_are_no_utf8(tmp_path):
    for encoding in MARKED:
        (tmp_path / "a.txt").write_bytes("\ufeffgrüße".encode(encoding)[:-1])
        last = problem(Text(glob=f"{tmp_path}/a.txt"))
        assert last.reason == "unreadable" and f"the end of the file within a character of {encoding}" in last.message
    (tmp_path / "a.txt").write_bytes("\ufeff".encode("utf-32-le") + b"\xff\xff\xff\xff")
    assert "bytes that are no utf-32-le" in problem(Text(glob=f"{tmp_path}/a.txt")).message
    (tmp_path / "a.txt").write_bytes("\ufeffa\ud800b".encode("utf-16-le", "surrogatepass"))
    with pytest.raises(UnicodeDecodeError):
        text_of(tmp_path / "a.txt").decode()


@pytest.mark.parametrize("encoding", MARKED)
def test_without_a_mark_it_is_refused_with_the_way_to_convert_it(tmp_path, encoding):
    name = encoding.upper().replace("-L", "L").replace("-B", "B")
    for source, text in ((Text, "Grüße aus der Stadt\n" * 50), (Jsonl, '{"text": "short"}\n')):
        (tmp_path / "a").write_bytes(text.encode(encoding))
        last = problem(source(glob=f"{tmp_path}/a"))
        assert last.reason == "not_text"
        assert f"got {name} without a byte order mark; convert it (iconv -f {name} -t UTF-8), or" in last.message


def archives() -> dict[str, tuple[bytes, str]]:
    """Name -> content as tools write it, and what it has to be called."""
    tar, zipped, sqlite, numpy = (io.BytesIO() for _ in range(4))
    member = tarfile.TarInfo("a.txt")
    member.size = len(TEXT)
    with tarfile.open(fileobj=tar, mode="w") as t:
        t.addfile(member, io.BytesIO(TEXT))
    with zipfile.ZipFile(zipped, "w") as z:
        z.writestr("a.txt", TEXT)
    np.savez(numpy, x=np.arange(9))
    old = bytearray(tar.getvalue())
    old[257:265] = bytes(8)
    old[148:156] = b"        "
    old[148:156] = f"{sum(old[:512]):06o}\0 ".encode()
    database = sqlite3.connect(":memory:")
    database.execute("create table t (x text)")
    table = pa.table({"text": ["x"]})
    arrow, stream, parquet = (pa.BufferOutputStream() for _ in range(3))
    pq.write_table(table, parquet)
    with pa.ipc.new_file(arrow, table.schema) as w:
        w.write_table(table)
    with pa.ipc.new_stream(stream, table.schema) as w:
        w.write_table(table)
    del sqlite
    rows = {
        "a.tar": (tar.getvalue(), "a tar archive; unpack it"),
        "old.tar": (bytes(old), "a tar archive; unpack it"),
        "a.tar.gz": (gzip.compress(tar.getvalue()), "a tar archive inside gzip; unpack it"),
        "a.tgz": (gzip.compress(tar.getvalue()), "a tar archive inside gzip"),
        "a.tar.xz": (lzma.compress(tar.getvalue()), "a tar archive inside xz"),
        "a.tar.bz2": (bz2.compress(tar.getvalue()), "a tar archive inside bzip2"),
        "a.tar.zst": (zstd(tar.getvalue()), "a tar archive inside zstd"),
        "a.zip": (zipped.getvalue(), "a zip archive"),
        "a.npz": (numpy.getvalue(), "a zip archive"),
        "a.7z": (b"7z\xbc\xaf\x27\x1c\0\x04" + bytes(range(200)), "a 7z archive; unpack it"),
        "a.rar": (b"Rar!\x1a\x07\x01\0" + bytes(range(200)), "a rar archive"),
        "a.lz4": (b"\x04\x22\x4d\x18" + bytes(range(200)), "a file packed by lz4; unpack it (lz4 -d)"),
        "a.parquet": (parquet.getvalue().to_pybytes(), "a Parquet file; use the Parquet source"),
        "a.arrow": (arrow.getvalue().to_pybytes(), "an Arrow file; use the Arrow source"),
        "b.arrow": (stream.getvalue().to_pybytes(), "an Arrow stream; use the Arrow source"),
        "a.sqlite": (database.serialize(), "an SQLite database"),
        "a.npy": (b"\x93NUMPY\x01\0v\0{}" + bytes(50), "a NumPy array"),
        "a.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image; leave it out of the glob"),
        "a.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "a JPEG image"),
        "a.gif": (b"GIF89a\x01\0\x01\0\x80", "a GIF image"),
        "a.bmp": (b"BM" + struct.pack("<IHHII", 90, 0, 0, 54, 40) + bytes(40), "a BMP image"),
        "a.webp": (b"RIFF\x1a\0\0\0WEBPVP8L", "a WebP image"),
        "a.mp4": (b"\0\0\0\x20ftypisom\0\0\x02\0", "an MP4 video"),
        "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "a PDF document; convert it to text first"),
        "ascii.pdf": (b"%PDF-1.4\n1 0 obj\n<< >>\nendobj\n", "a PDF document"),
        "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90), "a document of old Microsoft Office"),
        "a.pickle": (b"\x80\x04\x95\x05\0\0\0\0\0\0\0K\x01.", "a pickle"),
        "a.pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", "Git LFS"),
        "program": (Path("/proc/self/exe").read_bytes()[:5000], "an ELF program"),
    }
    return rows


ARCHIVES = archives()


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_is_no_text_is_refused_by_its_first_bytes_and_called_what_it_is(tmp_path, name):
    content, called = ARCHIVES[name]
    for path in (tmp_path / name, tmp_path / "disguised.txt"):
        path.write_bytes(content)
        for source in (Text(glob=str(path)), Jsonl(glob=str(path)), Text(glob=str(path), separator="\n\n")):
            last = problem(source)
            assert last.reason == "not_text"
            assert f"{path}: expected text, got " in last.message and called in last.message
            assert f"or set {type(source).__name__}(not_text='keep') to read it as it is" in last.message
    kept = entries(Text(glob=str(tmp_path / name), not_text="keep"))
    assert len(kept) == 1 and isinstance(kept[0], Document) and kept[0].notes == ("files_kept_that_are_no_text",)


def test_tfrecords_are_known_by_their_first_checksum(tmp_path):
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(f"{tmp_path}/a") as w:
        w.write(b"anything at all")
    assert "got a TFRecord file; use the Tfds source" in problem(Text(glob=f"{tmp_path}/a")).message


@pytest.mark.parametrize(
    "text",
    [
        "PAR1 is a gene.",
        "BM is short for a brand.",
        "MZ, ORC, ID3 and GGUF are letters.",
        "Rar!",
        "PK is not an archive",
        "ID3 tags: \x1b[1mbold\x1b[0m\f",
        "\x00"[:0] + "7z a.7z packs it",
        "%PDF is how they begin",
        "version https://git-lfs.github.com is a page",
        "é" * 5000,
        "xa" + "é" * 4000,
        "BZh91AY is no header",
    ],
)
def test_text_that_begins_as_a_format_is_called_stays_text(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert text_of(tmp_path / "a") == text.encode()


def test_latin_1_that_begins_with_the_letters_of_a_format_is_not_taken_for_it():
    for text in ("BM für alle", "ID3 für alle", "MZ für", "ORC für", "PAR1 für", "070701 für", "\x80für", "OggS für"):
        head = text.encode("latin-1")
        assert not is_text(head) and not_text(head) is None and packing(head) is None, text


def test_nul_in_the_first_megabyte_is_no_text_and_behind_it_is_counted_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1_000_000 + b"\0" + b"y" * 100)
    assert "got NUL at byte 1000000; mend or convert it" in problem(Text(glob=f"{tmp_path}/a")).message
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"x" * 500 + b"\0"))
    assert "got NUL at byte 500;" in problem(Text(glob=f"{tmp_path}/b.gz")).message
    (tmp_path / "a").write_bytes(b"x" * (1 << 20) + b"\0")
    assert text_of(tmp_path / "a").endswith(b"\0")
    (tmp_path / "a").write_bytes(b"a\0b")
    (document,) = entries(Text(glob=f"{tmp_path}/a", not_text="keep"))
    assert document.raw == b"a\0b" and document.notes == ("files_kept_that_are_no_text",)


def test_a_hole_in_json_lines_is_one_line_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + bytes(400) + b'\n{"text": "two"}\n')
    one, hole, two = entries(Jsonl(glob=f"{tmp_path}/a.jsonl"))
    assert (one.raw, two.raw) == (b"one", b"two") and hole.reason == "bad_json"
    assert "a.jsonl:2: expected one JSON object on the line, got NUL" in hole.message


def test_columns_say_what_else_they_were_given(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    table = pa.table({"text": ["x"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.gz").write_bytes(gzip.compress(LINES))
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as w:
        w.write_table(table)
    for source, name, got in (
        (Parquet, "a.jsonl", "expected a Parquet file, got text; use the Jsonl or the Text source"),
        (Arrow, "a.jsonl", "expected an Arrow file, got text; use the Jsonl or the Text source"),
        (Parquet, "a.arrow", "expected a Parquet file, got an Arrow file; use the Arrow source"),
        (Arrow, "a.parquet", "expected an Arrow file, got a Parquet file; use the Parquet source"),
        (Parquet, "a.gz", "expected a Parquet file, got a file packed by gzip; unpack it"),
    ):
        assert problem(source(glob=f"{tmp_path}/{name}")).message == f"{tmp_path}/{name}: {got}"


def test_a_file_that_may_not_be_read_says_so_and_not_to_fetch_it(tmp_path):
    let_in(tmp_path)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema([("text", pa.string())])):
        pass
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.gz").write_bytes(gzip.compress(TEXT))
    kinds_of = {"a.jsonl": (Text, Jsonl), "a.gz": (Text, Jsonl), "a.parquet": (Parquet,), "a.arrow": (Arrow,)}
    for name, sources in kinds_of.items():
        path = tmp_path / name
        path.chmod(0)
        for source in sources:
            with as_nobody():
                said = problem(source(glob=str(path)))
            assert said.reason == "unreadable"
            assert said.message == (
                f"{path}: expected a file or folder that may be used, got permission denied; change its permissions "
                f"(chmod a+r {path}), or run as its owner"
            )


@pytest.mark.parametrize(("mode", "at"), [(0o600, "folder"), (0o644, "folder"), (0o000, "folder"), (0o711, "folder")])
def test_a_folder_that_may_not_be_looked_into_says_so(tmp_path, mode, at):
    (tmp_path / "folder/inner").mkdir(parents=True)
    for name in ("a.txt", "inner/b.txt"):
        (tmp_path / "folder" / name).write_bytes(TEXT)
    let_in(tmp_path)
    (tmp_path / at).chmod(mode)
    try:
        for glob in ("folder/*.txt", "**/*.txt", "*/*.txt", "fold?r/[a-z].txt", "folder/{a,c}*.txt"):
            with as_nobody(), pytest.raises(UserError) as e:
                Text(glob=f"{tmp_path}/{glob}").parts(tmp_path)
            assert "permission denied; change its permissions (chmod a+rx " in str(e.value), glob
            assert str(tmp_path / at) in str(e.value)
    finally:
        (tmp_path / at).chmod(0o755)


def test_a_saved_dataset_that_may_not_be_read_says_so(tmp_path):
    let_in(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/state.json").write_text("{}")
    for path, mode in ((tmp_path / "d/state.json", 0), (tmp_path / "d", 0o644)):
        path.chmod(mode)
        with as_nobody(), pytest.raises(UserError, match="permission denied; change its permissions"):
            HFDataset(path=f"{tmp_path}/d").parts(tmp_path)
    (tmp_path / "d").chmod(0o755)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EIO, "expected a disk that can be read, got input/output error; look at the disk or its mount"),
        (errno.ESTALE, "expected a disk that can be read, got stale file handle"),
        (errno.ENOENT, "expected the file that was found there, got nothing; it was moved or removed"),
        (errno.EMFILE, "got too many open files; raise `ulimit -n`"),
        (errno.EACCES, "permission denied; change its permissions (chmod "),
    ],
)
def test_what_the_system_says_is_told_apart_from_damage(tmp_path, monkeypatch, code, message):
    (tmp_path / "a.jsonl").write_bytes(LINES)

    def fail(path):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(opening, "open_plain", fail)
    for source in (Text(glob=f"{tmp_path}/a.jsonl"), Jsonl(glob=f"{tmp_path}/a.jsonl")):
        said = problem(source).message
        assert said.startswith(f"{tmp_path}/a.jsonl: ") and message in said and "fetch" not in said


def test_a_file_that_vanishes_or_becomes_a_folder_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for source in (Text(glob=str(path)), Jsonl(glob=str(path)), Parquet(glob=str(path)), Arrow(glob=str(path))):
        path.write_bytes(LINES)
        (part,) = source.parts(tmp_path)
        path.unlink()
        (gone,) = source.entries(part, 100)
        assert "got nothing; it was moved or removed" in gone.message
        path.mkdir()
        (folder,) = source.entries(part, 100)
        assert folder.reason == "unreadable" and "fetch" not in folder.message, folder
        path.rmdir()
    assert "fetch it again" in unreadable("x.gz", EOFError("cut"))


def test_the_first_bytes_of_a_file_are_read_once(tmp_path):
    """What a file is is told from the buffer that its text is then read from."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with opening.open_text(f"{tmp_path}/a.jsonl").file as f:
        assert len(f.peek(kinds.HEAD_BYTES)) == len(LINES)  # the buffer still holds them
        assert f.read() == LINES


def test_compressed_and_marked_files_are_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("lm.data.sources.base.stretch_bytes", lambda total: 100)
    for name, content, n in (
        ("plain.jsonl", LINES, None),
        ("a.jsonl", gzip.compress(LINES), 1),
        ("b.gz", LINES, None),
        ("c.jsonl", LINES.decode().encode("utf-16"), 1),
    ):
        (tmp_path / name).write_bytes(content)
        source = Jsonl(glob=f"{tmp_path}/{name}")
        parts = source.parts(tmp_path)
        assert len(parts) == n if n else len(parts) > 3
        assert [e.raw.decode() for p in parts for e in source.entries(p, 1000)] == [f"line {i} é" for i in range(30)]


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
def test_what_xz_writes_with_threads_is_read(tmp_path):
    packed = subprocess.run(["xz", "-T2", "--block-size=1000"], input=TEXT, capture_output=True, check=True).stdout
    (tmp_path / "a.xz").write_bytes(packed)
    assert text_of(tmp_path / "a.xz") == TEXT


def test_a_part_of_its_own_kind_is_not_opened_twice(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    source = Jsonl(glob=f"{tmp_path}/a.jsonl")
    begin = LINES.index(b"\n") + 1
    found = list(source.entries(Part(f"{tmp_path}/a.jsonl", begin, len(LINES), 0), 1000))
    assert [e.raw.decode() for e in found] == [f"line {i} é" for i in range(1, 30)]
