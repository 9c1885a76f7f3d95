"""A source that is no text stops, and what is let through or mended is in its report."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm import cli
from lm.data import Jsonl, Overlap, Parquet, Text, Without
from lm.errors import UserError
from tests.data.conftest import sample_texts
from tests.data.prepare.test_prepare import adds_up, documents, make, prepare, quiet, report, write_jsonl  # noqa: F401

LATIN = [t.replace("the", "thé") for t in sample_texts(300)]
KEEP = r"or set (Text|Jsonl|Parquet)\(not_text='keep'\)"


def write(folder, texts, n_latin: int) -> None:
    """Text files, of which some are Latin-1."""
    folder.mkdir(exist_ok=True)
    for i, t in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(
            (t + " é").encode("latin-1" if i < n_latin else "utf-8", errors="replace")
        )


@pytest.mark.parametrize(("n", "n_latin"), [(300, 4), (1, 1), (40, 1), (100, 100)])
def test_more_than_one_document_of_a_hundred_that_is_no_utf8_stops(tmp_path, make, n, n_latin):  # noqa: F811
    write(tmp_path / "raw", sample_texts(n), n_latin)
    source = Text(glob=f"{tmp_path}/raw/*.txt")
    kw = dict(validation_fraction=0.0)
    with pytest.raises(UserError) as e:
        quiet(make(source, **kw))
    assert f"data.sources['main']: expected text in UTF-8, got other bytes in {n_latin} of {n} documents" in str(
        e.value
    )
    assert f"the first at {tmp_path}/raw/000.txt: document 1; convert them (iconv -f LATIN1 -t UTF-8)" in str(e.value)
    assert not (tmp_path / "corpus/main/train").exists()
    quiet(make(Text(glob=f"{tmp_path}/raw/*.txt", not_text="keep"), **kw))
    r = report(tmp_path / "corpus")
    assert r["invalid_utf8_mended"] == n_latin and len(r["examples"]["invalid_utf8"]) == min(n_latin, 3)
    if n > n_latin:
        quiet(make(source, path=f"{tmp_path}/left", invalid_utf8="error", on_error="skip", **kw))
        assert adds_up(report(tmp_path / "left"))["not_utf8"] == n_latin


def test_one_of_a_hundred_is_mended_and_counted(tmp_path, make):  # noqa: F811
    write(tmp_path / "raw", sample_texts(300), 3)
    corpus = quiet(make(Text(glob=f"{tmp_path}/raw/*.txt")))
    assert corpus.train["main"].meta.counts["invalid_utf8"] == 3


def test_empty_documents_and_problems_do_not_dilute(tmp_path, make):  # noqa: F811
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_bytes(b"\xe9t\xe9" + b"\n" * 1000 + b"more")
    with pytest.raises(UserError, match="in 1 of 2 documents"):
        quiet(make(Text(glob=f"{tmp_path}/raw/a.txt", separator="\n")))
    bad = b"{bad\n" * 500
    (tmp_path / "raw/b.jsonl").write_bytes(bad + b'{"text": "\xe9"}\n{"text": "more"}\n')
    with pytest.raises(UserError, match="in 1 of 2 documents"):
        quiet(make(Jsonl(glob=f"{tmp_path}/raw/b.jsonl"), on_error="skip", path=f"{tmp_path}/b"))


def test_every_kind_of_source_is_looked_at(tmp_path, make):  # noqa: F811
    texts = [t.encode("latin-1", errors="replace") for t in LATIN]
    wide = [t.encode("utf-16-le") for t in ("plain", "ascii")]
    for name, column, message in (
        ("latin", pa.array(texts, pa.binary()), f"expected text in UTF-8, got other bytes in .*{KEEP}"),
        ("wide", pa.array(wide, pa.binary()), "expected text, got NUL in its first megabyte, at .*row 1"),
    ):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
        source = Parquet(glob=f"{tmp_path}/{name}.parquet")
        with pytest.raises(UserError, match=message):
            quiet(make(source, path=f"{tmp_path}/{name}", validation_fraction=0.0))
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "%d caf\xe9"}\n' % i for i in range(9)))
    with pytest.raises(UserError, match="in 9 of 9 documents .*a.jsonl: line 1; "):
        quiet(make(Jsonl(glob=f"{tmp_path}/a.jsonl"), path=f"{tmp_path}/j"))


def test_nul_of_rows_is_left_out_by_its_filter_and_spelt_nul_is_kept(tmp_path, make):  # noqa: F811
    texts = sample_texts(60)
    texts[3] += "\0"
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    source = Parquet(glob=f"{tmp_path}/a.parquet")
    with pytest.raises(UserError, match=r"got NUL in its first megabyte, at .*: row 4; leave .*data.filters=\(Without"):
        quiet(make(source))
    assert len(documents(quiet(make(source, filters=(Without(),))))) < 60
    kept = quiet(make(Parquet(glob=f"{tmp_path}/a.parquet", not_text="keep"), path=f"{tmp_path}/kept"))
    assert kept.train["main"].meta.counts["documents"] == 60 and report(tmp_path / "kept")["holding_nul"] == 1
    write_jsonl(tmp_path / "raw", texts)
    quiet(make(Jsonl(glob=f"{tmp_path}/raw/*"), path=f"{tmp_path}/json"))
    assert report(tmp_path / "json")["holding_nul"] == 1


def test_a_file_that_is_no_text_stops_or_is_left_out_or_kept(tmp_path, make):  # noqa: F811
    write(tmp_path / "raw", sample_texts(150), 0)
    (tmp_path / "raw/z.txt").write_bytes(b"PK\x03\x04\x14\0\0\0" + bytes(range(256)))
    source = Text(glob=f"{tmp_path}/raw/*.txt")
    with pytest.raises(UserError, match="z.txt: expected text, got a zip archive .* unpack it and name the files"):
        quiet(make(source))
    lines = []
    prepare(make(source, on_error="skip"), progress=False, log=lines.append)
    r = report(tmp_path / "corpus")
    assert adds_up(r) == {"not_text": 1} and "z.txt: expected text" in r["examples"]["not_text"][0]
    assert any("1 not text" in line for line in lines)
    kept = make(Text(glob=f"{tmp_path}/raw/*.txt", not_text="keep"), path=f"{tmp_path}/kept")
    prepare(kept, progress=False, log=lines.append)
    r = report(tmp_path / "kept")
    assert r["as_read"] == {"files_kept_that_are_no_text": 1} and r["holding_nul"] == r["invalid_utf8_mended"] == 1
    assert "main: 1 files kept that are no text" in lines


def test_what_was_done_to_come_by_text_is_in_the_report(tmp_path, make):  # noqa: F811
    texts = sample_texts(60)
    (tmp_path / "raw").mkdir()
    for i, t in enumerate(texts):
        content = t.encode("utf-16") if i < 3 else ("\ufeff" + t).encode() if i < 7 else t.encode()
        (tmp_path / f"raw/{i:02d}.txt{'.gz' if i == 9 else ''}").write_bytes(content)
    lines = []
    corpus = prepare(make(Text(glob=f"{tmp_path}/raw/*")), progress=False, log=lines.append)
    assert sorted(documents(corpus) + documents(corpus, "validation")) == sorted(texts)
    assert report(tmp_path / "corpus")["as_read"] == {
        **{"files_decoded_from_utf_16": 3, "byte_order_marks_dropped": 4, "files_named_as_packed_that_are_not": 1}
    }
    assert "main: 4 byte order marks dropped" in lines


def test_evaluations_that_are_no_text_are_refused_with_their_name(tmp_path, make):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    (tmp_path / "eval.txt").write_bytes(b"7z\xbc\xaf\x27\x1c\0")
    overlap = Overlap(files={"quiz": Text(glob=f"{tmp_path}/eval.txt")})
    with pytest.raises(UserError, match=r"data.overlap.files\['quiz'\]: .*eval.txt: expected text, got a 7z archive"):
        quiet(make(overlap=overlap))


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ('Text(glob="{0}/a.tar.gz")', "a tar archive inside gzip"),
        ('Text(glob="{0}")', "got a folder with"),
        ('Jsonl(glob="{0}/*.txt")', "got no match"),
        ('Text(glob="")', "got an empty one"),
        ('Text(glob="/dev/zero")', "got a device"),
        ('Jsonl(glob="{0}/u.jsonl")', "UTF-16LE without a byte order mark"),
        ('Text(glob="{0}/nul")', "got NUL at byte 1;"),
        ('Text(glob="{0}/latin")', "got other bytes in 1 of 1 documents"),
        ('Parquet(glob="{0}/latin")', "expected a Parquet file, got text; use the Jsonl or the Text source"),
        ('Text(glob="{0}/cut.xz")', "expected a whole xz file, got"),
    ],
)
def test_on_the_command_line_each_is_one_line_and_exit_2(tmp_path, capsys, source, got):
    from tests.data.sources.test_opening import ARCHIVES, PACK

    (tmp_path / "a.tar.gz").write_bytes(ARCHIVES["a.tar.gz"][0])
    (tmp_path / "u.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16-le"))
    (tmp_path / "nul").write_bytes(b"a\0")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "cut.xz").write_bytes(PACK["xz"](b"text")[:-9])
    sources = f'data.sources={{"x": {source.format(tmp_path)}}}'
    with pytest.raises(SystemExit) as e:
        cli.main(["prepare", "quickstart", f"data.path={tmp_path}/corpus", "data.workers=1", sources])
    (said,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and said.startswith("lm prepare: error: ") and got in said


def test_the_report_is_json_of_an_older_shape_and_more(tmp_path, make):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    quiet(make())
    assert json.loads((tmp_path / "corpus/main/report.json").read_text())["as_read"] == {}
