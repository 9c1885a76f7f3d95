"""Raw files are known by name, size and content: touching one changes nothing, and a change of one is noticed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lm.data import C4, HFDataset, Jsonl, Parquet, Text, open_corpus
from lm.data.made_from import digest
from lm.data.prepare import preparation, raw_files
from lm.data.prepare.scan import ScanJob
from lm.data.prepare.tokenize import TokenizeJob
from lm.errors import UserError
from tests.data.conftest import sample_texts
from tests.data.prepare.test_prepare import make, quiet, write_jsonl  # noqa: F401
from tests.data.prepare.test_prepare_hosts import start
from tests.permissions import as_nobody, let_in


def touch(path: Path, seconds: int = 100) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the raw files that are read for their checksums."""
    names, real = [], raw_files._sha256
    monkeypatch.setattr(raw_files, "_sha256", lambda file: (names.append(Path(file.path).name), real(file))[1])
    return names


def test_touched_files_are_read_once_and_the_corpus_stays(tmp_path, make, hashed):  # noqa: F811
    for i, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl")):
        write_jsonl(tmp_path / "raw", sample_texts(40, seed=i), name)
    first = quiet(make())
    assert sorted(hashed) == ["a.jsonl", "b.jsonl.gz", "c.jsonl"]
    hashed.clear()
    assert quiet(make()).fingerprint == first.fingerprint and hashed == []
    for name in ("a.jsonl", "b.jsonl.gz"):
        touch(tmp_path / "raw" / name)
    assert quiet(make()).fingerprint == first.fingerprint and sorted(hashed) == ["a.jsonl", "b.jsonl.gz"]
    hashed.clear()
    quiet(make())
    assert hashed == []  # the new times are known now
    shutil.copytree(tmp_path / "raw", tmp_path / "copy")  # with other times and inodes
    shutil.rmtree(tmp_path / "raw")
    shutil.copytree(tmp_path / "copy", tmp_path / "raw", copy_function=shutil.copyfile)
    assert quiet(make()).fingerprint == first.fingerprint


@pytest.mark.parametrize("kind", ["content", "longer", "added", "removed", "renamed", "old time", "emptied"])
def test_a_change_is_noticed_and_named(tmp_path, make, kind):  # noqa: F811
    for i in range(3):
        write_jsonl(tmp_path / "raw", sample_texts(30, seed=i), f"{i}.jsonl")
    quiet(make())
    path = tmp_path / "raw/1.jsonl"
    content, stat = path.read_bytes(), path.stat()
    got = f"other content in {path}"
    if kind == "content":
        path.write_bytes(content.replace(b"the", b"eht", 1))
        touch(path)
    elif kind == "old time":
        path.write_bytes(content.replace(b"the", b"eht", 1))
        os.utime(path, ns=(0, stat.st_mtime_ns - 10**9))
    elif kind == "longer":
        path.write_bytes(content + b"\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        got = f"{path} of {len(content) + 1} bytes, which had {len(content)}"
    elif kind == "emptied":
        path.write_bytes(b"")
        got = f"{path} of 0 bytes"
    elif kind == "added":
        write_jsonl(tmp_path / "raw", ["more"], "4.jsonl")
        got = f"1 more, as {tmp_path}/raw/4.jsonl"
    elif kind == "removed":
        path.unlink()
        got = f"1 less, as {path}"
    else:
        path.rename(path.with_name("9.jsonl"))
        got = f"1 more, as {tmp_path}/raw/9.jsonl"
    with pytest.raises(UserError) as e:
        quiet(make())
    assert f"got {got}" in str(e.value) and "run `lm prepare --force`, or put it back" in str(e.value)
    open_corpus(make())  # a run goes on
    quiet(make(), force=True)
    quiet(make())


def test_every_source_of_files_is_known_by_content(tmp_path, make, hashed):  # noqa: F811
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": sample_texts(40)})
    (tmp_path / "raw").mkdir()
    pq.write_table(table, tmp_path / "raw/a.parquet")
    for i, content in enumerate(sample_texts(40)):
        (tmp_path / f"raw/{i}.txt").write_text(content)
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(tmp_path / "saved/data.arrow", table.schema) as w:
        w.write_table(table)
    (tmp_path / "saved/state.json").write_text('{"_data_files": [{"filename": "data.arrow"}], "_split": null}')
    for name, source, path in (
        ("parquet", Parquet(glob=f"{tmp_path}/raw/*.parquet"), "raw/a.parquet"),
        ("text", Text(glob=f"{tmp_path}/raw/*.txt"), "raw/7.txt"),
        ("saved", HFDataset(path=f"{tmp_path}/saved"), "saved/data.arrow"),
    ):
        data = make(source, path=f"{tmp_path}/{name}")
        first = quiet(data)
        hashed.clear()
        touch(tmp_path / path)
        assert quiet(data).fingerprint == first.fingerprint and hashed == [Path(path).name]
        whole = bytearray((tmp_path / path).read_bytes())
        whole[len(whole) // 2] ^= 1
        (tmp_path / path).write_bytes(whole)
        touch(tmp_path / path)
        with pytest.raises(UserError, match=f"got other content in {tmp_path}/{path}: a file was added, removed or ch"):
            quiet(data)


def as_written_before(folder: Path, source) -> None:
    """Makes a corpus one of the code that knew raw files by their times."""
    (folder / "main/report-raw.json").unlink()
    for meta in folder.glob("main/*/meta.json"):
        content = json.loads(meta.read_text())
        content["raw"] = digest([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in source.files()])
        meta.write_text(json.dumps(content))


def test_corpora_that_know_times_alone_are_compared_by_them(tmp_path, make):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    data = make()
    first = quiet(data)
    as_written_before(tmp_path / "corpus", data.sources["main"])
    assert quiet(data).fingerprint == open_corpus(data).fingerprint == first.fingerprint
    touch(tmp_path / "raw/a.jsonl")
    with pytest.raises(
        UserError, match=r"got other names, sizes or times \(all that this store knows of them\): a file"
    ):
        quiet(data)
    (tmp_path / "raw/a.jsonl").unlink()
    assert quiet(data).fingerprint == first.fingerprint


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"files": [1]}', b'{"files": [["x"]]}', b"[]"])
def test_checksums_that_are_lost_are_made_again(tmp_path, make, hashed, content):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    first = quiet(make())
    record = tmp_path / "corpus/main/report-raw.json"
    record.unlink() if content is None else record.write_bytes(content)
    hashed.clear()
    assert quiet(make()).fingerprint == first.fingerprint and hashed == ["a.jsonl"]
    record.unlink()
    touch(tmp_path / "raw/a.jsonl")
    content = (tmp_path / "raw/a.jsonl").read_bytes()
    (tmp_path / "raw/a.jsonl").write_bytes(content.replace(b"the", b"eht", 1))
    with pytest.raises(UserError, match="got other content: a file was added, removed or changed"):
        quiet(make())
    assert not record.exists()  # what was refused is not what is known


def test_a_file_of_a_filter_counts_too(tmp_path, make):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    (tmp_path / "bad.txt").write_text("nothing\n")
    lax = dict(min_sentences=0, terminal=("",), min_words_per_line=0)
    data = make(filters=(C4(bad_words=f"{tmp_path}/bad.txt", **lax),))
    quiet(data)
    touch(tmp_path / "bad.txt")
    touch(tmp_path / "raw/a.jsonl")
    quiet(data)
    (tmp_path / "bad.txt").write_text("something\n")
    with pytest.raises(UserError, match="got other content of a file that filters read"):
        quiet(data)


def test_a_killed_preparation_goes_on_after_a_touch(tmp_path, make, monkeypatch):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    monkeypatch.setattr(TokenizeJob, "run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quiet(make())
    monkeypatch.undo()
    touch(tmp_path / "raw/a.jsonl")
    monkeypatch.setattr(ScanJob, "run", lambda self: pytest.fail("it was read already"))
    assert quiet(make()).train["main"].n_documents > 20


def test_hosts_with_other_times_prepare_one_corpus(tmp_path, make, monkeypatch):  # noqa: F811
    """Each has a copy of the raw files under the same name; here: the file is touched between their starts."""
    monkeypatch.setattr(preparation, "MAX_POLL_S", 0.1)
    write_jsonl(tmp_path / "raw", sample_texts(40))
    data = make()
    host_0 = start(data, 0, 2)
    while not (tmp_path / "corpus/.plan.json").exists():
        assert not host_0.done()
    touch(tmp_path / "raw/a.jsonl")
    host_1 = start(data, 1, 2)
    assert host_0.result(60).fingerprint == host_1.result(60).fingerprint


def test_a_read_only_corpus_is_opened_after_a_touch(tmp_path, make):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    first = quiet(make())
    let_in(tmp_path)
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    touch(tmp_path / "raw/a.jsonl")
    tokenizer = tmp_path / "t.model"
    shutil.copy(make().tokenizer, tokenizer)
    tokenizer.chmod(0o644)
    with as_nobody():
        assert quiet(make(tokenizer=str(tokenizer))).fingerprint == first.fingerprint


def test_raw_files_that_may_not_be_looked_at_do_not_stop_a_run_and_those_that_are_needed_say_so(
    tmp_path,
    make,  # noqa: F811
    # noqa: F811
):
    write_jsonl(tmp_path / "raw", sample_texts(40))
    first = quiet(make())
    let_in(tmp_path)
    for path in (tmp_path / "corpus").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    tokenizer = tmp_path / "t.model"
    shutil.copy(make().tokenizer, tokenizer)
    tokenizer.chmod(0o644)
    data = make(tokenizer=str(tokenizer))
    (tmp_path / "raw").chmod(0)
    with as_nobody():
        assert quiet(data).fingerprint == first.fingerprint
    (tmp_path / "raw").chmod(0o755)
    (tmp_path / "raw/a.jsonl").chmod(0)
    with as_nobody():
        assert quiet(data).fingerprint == first.fingerprint  # size and time are as they were
    touch(tmp_path / "raw/a.jsonl")
    with (
        as_nobody(),
        pytest.raises(UserError, match=r"a.jsonl: expected a file that can be read, since its time .*chmod"),
    ):
        quiet(data)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, make, monkeypatch):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    monkeypatch.setattr(raw_files, "SMALL_BYTES", 0)
    real = raw_files.hashlib.file_digest

    def grows(f, name):
        found = real(f, name)
        with open(f.name, "ab") as more:
            more.write(b"\n")
        return found

    monkeypatch.setattr(raw_files.hashlib, "file_digest", grows)
    with pytest.raises(UserError, match="a.jsonl: expected a file that stays as it is, got one that changes"):
        quiet(make())


def test_force_reads_the_files_again(tmp_path, make, hashed):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    quiet(make())
    hashed.clear()
    quiet(make(), force=True)
    assert hashed == ["a.jsonl"]


def test_fields_that_are_new_are_in_no_store_until_they_are_set(tmp_path, make):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    glob = f"{tmp_path}/raw/*.jsonl*"
    first = quiet(make())
    assert first.train["main"].meta.made_from["source"] == {
        **{"type": "Jsonl", "glob": glob, "field": "text", "template": None}
    }
    quiet(make(Jsonl(glob=glob, window_bytes=1 << 31)))  # it decides nothing of the text
    with pytest.raises(UserError, match="expected source.not_text='keep' as in the config, got one made with None"):
        quiet(make(Jsonl(glob=glob, not_text="keep")))
