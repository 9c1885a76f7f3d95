"""Documents of text files: marks, line ends and separators."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import Jsonl, Text
from lm.data.sources import base, text
from lm.data.sources.base import Document
from lm.data.sources.kinds import BOM


def entries(source):
    return [e for part in source.parts(Path()) for e in source.entries(part, 1 << 20)]


def texts(tmp_path: Path, content: bytes, separator: str | None) -> list[bytes]:
    (tmp_path / "a.txt").write_bytes(content)
    return [e.raw for e in entries(Text(glob=f"{tmp_path}/a.txt", separator=separator))]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "separator", "expected"),
    [
        (b"one\r\nx\r\n\r\ntwo\r\n\r\nthree", "\n\n", [b"one\r\nx", b"two", b"three"]),
        (b"one\nx\n\ntwo", "\n\n", [b"one\nx", b"two"]),
        (b"a\r\n\nb\n\r\nc", "\n\n", [b"a", b"b", b"c"]),
        (b"a\r\nb\nc\r\n", "\n", [b"a", b"b", b"c", b""]),
        (b"a\r\n---\r\nb\n---\nc", "\n---\n", [b"a", b"b", b"c"]),
        (b"a---\r\nb---\nc", "---\n", [b"a", b"b", b"c"]),
        (b"a\r\n.+*b", "\n.+*", [b"a", b"b"]),
        (b"a\r\n\r\nb\n\nc", "\r\n\r\n", [b"a", b"b\n\nc"]),
        (b"\r\n\r\na", "\n\n", [b"", b"a"]),
        (b"a\rb\r\rc\r\r", "\n\n", [b"a\rb", b"c", b""]),
        (b"50%\r100%\ndone\n\nnext", "\n\n", [b"50%\r100%\ndone", b"next"]),
        (b"a\r\n\r\nb", None, [b"a\r\n\r\nb"]),
        (b"a|b\r\n|c", "|", [b"a", b"b\r\n", b"c"]),
    ],
)
def test_a_line_end_in_a_separator_is_any_line_end_and_documents_keep_theirs(
    tmp_path, monkeypatch, chunk, content, separator, expected
):
    monkeypatch.setattr(text, "CHUNK_BYTES", chunk)
    assert texts(tmp_path, content, separator) == expected


@given(st.lists(st.text(st.sampled_from("ab\n"), max_size=8), min_size=1, max_size=6), st.integers(1, 9))
def test_a_file_with_other_line_ends_gives_the_same_documents(tmp_path_factory, pieces, chunk):
    folder = tmp_path_factory.getbasetemp()
    content = "\n\n".join(pieces).encode()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(text, "CHUNK_BYTES", chunk)
        expected = texts(folder, content, "\n\n")
        assert texts(folder, content.replace(b"\n", b"\r\n"), "\n\n") == [d.replace(b"\n", b"\r\n") for d in expected]
        if b"\n" in content:
            assert texts(folder, content.replace(b"\n", b"\r"), "\n\n") == [d.replace(b"\n", b"\r") for d in expected]


def test_lines_that_end_in_cr_alone_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\rtwo")
    first, second = entries(Text(glob=f"{tmp_path}/a.txt", separator="\n\n"))
    assert first.notes == ("files_whose_lines_end_in_cr",) and second.notes == ()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    (said,) = entries(Jsonl(glob=f"{tmp_path}/a.jsonl"))
    assert "a.jsonl:1: expected one JSON object on the line, got lines that end in CR alone; convert" in said.message


MARK = ("byte_order_marks_dropped",)


def test_a_mark_is_dropped_where_text_begins_and_kept_inside(tmp_path):
    for content, separator, expected in (
        (BOM + b"one", None, [(b"one", MARK)]),
        (BOM + b"one\n\ntwo\n\n" + BOM + b"three", "\n\n", [(b"one", MARK), (b"two", ()), (b"three", MARK)]),
        (BOM + BOM + b"one" + BOM, None, [(b"one" + BOM, MARK)]),
        (BOM, None, [(b"", MARK)]),
        (b"\xef\xbbone", None, [(b"\xef\xbbone", ())]),
    ):
        for pack in (bytes, gzip.compress):
            (tmp_path / "a.txt").write_bytes(pack(content))
            found = entries(Text(glob=f"{tmp_path}/a.txt", separator=separator))
            assert [(e.raw, e.notes) for e in found] == expected


@pytest.mark.parametrize("cut", [1, 10**6])
def test_marks_before_json_lines_are_dropped_and_counted(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(base, "stretch_bytes", lambda total: cut)
    lines = [BOM + b'{"text": "one"}', b'{"text": "two"}', BOM + BOM + b'{"text": "three"}', BOM, b"", BOM + b"\r"]
    inside = '{"text": "\ufeffkept"}'.encode()
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join([*lines, inside, BOM + b'{"text": 5}', BOM + b"{"]))
    found = entries(Jsonl(glob=f"{tmp_path}/a.jsonl"))
    documents = [(e.raw.decode(), e.notes) for e in found if isinstance(e, Document)]
    assert documents == [("one", MARK), ("two", ()), ("three", MARK), ("\ufeffkept", ())]
    assert [e.reason for e in found if not isinstance(e, Document)] == ["missing_field", "bad_json"]
    assert [int(re.search(r":(\d+): ", e.message)[1]) for e in found[-2:]] == [8, 9]


def test_long_documents_are_passed_over_at_crlf_separators_too(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_BYTES", 5)
    (tmp_path / "a.txt").write_bytes(b"short\r\n\r\n" + b"x" * 100 + b"\r\n\r\nlast")
    source = Text(glob=f"{tmp_path}/a.txt", separator="\n\n")
    one, long, last = (e for p in source.parts(tmp_path) for e in source.entries(p, 20))
    assert (one.raw, long.reason, last.raw) == (b"short", "too_long", b"last")
