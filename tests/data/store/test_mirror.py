"""A corpus in an object store is copied to each host once, whole and unchanged, or refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from etils import epath

from lm import cli
from lm.data import Jsonl, open_corpus, prepare
from lm.data.inspect import stats
from lm.data.sources import files as sources_files
from lm.data.store import mirror as mirror_module
from lm.data.store.mirror import cache_folder, mirror
from lm.data.store.splits import SPLITS
from lm.errors import UserError
from tests.data.conftest import sample_texts
from tests.data.prepare.test_prepare import make, write_jsonl  # noqa: F401

URL = "gs://bucket/corpora/mix"
STORES = [f"{name}/{split}" for name in ("main", "more") for split in SPLITS]


@pytest.fixture
def far(tmp_path, monkeypatch):
    """The folder that is the bucket."""
    real = epath.Path
    monkeypatch.setattr(epath, "Path", lambda p: real(str(p).replace("gs://bucket", f"{tmp_path}/far")))
    (tmp_path / "far/corpora").mkdir(parents=True)
    return tmp_path / "far"


@pytest.fixture
def corpus(tmp_path, far, make, monkeypatch):  # noqa: F811
    """A prepared corpus of three sources, and the same copied to the bucket."""
    for module in ("lm.data.sources.base", "lm.data.prepare.passes"):
        monkeypatch.setattr(sys.modules[module], "stretch_bytes", lambda total: 4000)
    for i, name in enumerate(("main", "more", "other")):
        write_jsonl(tmp_path / name, sample_texts(50, seed=i))
    sources = {name: Jsonl(glob=f"{tmp_path}/{name}/*.jsonl") for name in ("main", "more", "other")}
    local = make(sources=sources)
    prepare(local, progress=False, log=lambda line: None)
    shutil.copytree(local.path, far / "corpora/mix")
    shutil.rmtree(local.path)
    two = {name: sources[name] for name in ("main", "more")}
    return dataclasses.replace(local, path=URL, cache=f"{tmp_path}/cache", sources=two)


def files(folder):
    return {str(p.relative_to(folder)): p.stat() for p in Path(folder).rglob("*") if p.is_file() and p.name != "lock"}


def state(folder):
    return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in files(folder).items()}


def test_the_stores_that_are_named_are_copied_once_byte_for_byte(corpus, far, tmp_path):
    lines = []
    opened = open_corpus(corpus, lines.append)
    folder = cache_folder(URL, corpus.cache)
    assert opened.train["main"].path == folder / "main/train" and folder.parent == tmp_path / "cache"
    assert re.fullmatch(r"mix-[0-9a-f]{12}", folder.name)
    ours = files(folder)
    stored = {n for n in files(far / "corpora/mix") if n.startswith(("main/", "more/")) and "report" not in n}
    assert set(ours) == stored | {"tokenizer.model", "tokenizer.json"}
    assert all((folder / n).read_bytes() == (far / "corpora/mix" / n).read_bytes() for n in ours)
    n_copied = len([n for n in ours if n.endswith((".bin", ".u64"))])
    assert n_copied > 8 and f"{URL}: copying {n_copied} files, 0.00 GB, to {folder}" == lines[0]
    assert re.fullmatch(rf"{URL}: copied 0.00 GB in [\d.]+ s, [\d.]+ GB/s", lines[1])

    before = state(folder)
    assert prepare(corpus, progress=False, log=lines.append).fingerprint == opened.fingerprint
    assert len(lines) == 2 and state(folder) == before
    local = dataclasses.replace(corpus, path=str(folder))
    assert open_corpus(local).fingerprint == opened.fingerprint
    for store in opened.train.values():
        store.check_unchanged()


def test_processes_of_one_host_copy_once(corpus, monkeypatch):
    copied, lines, lock, copy = [], [], threading.Lock(), sources_files.copy_file

    def slowly(path, *args):
        with lock:
            copied.append(str(path))
        copy(path, *args)

    monkeypatch.setattr(mirror_module, "copy_file", slowly)
    with ThreadPoolExecutor(3) as pool:
        corpora = [f.result(30) for f in [pool.submit(open_corpus, corpus, lines.append) for _ in range(3)]]
    assert len({str(c.fingerprint) for c in corpora}) == 1 and len(copied) == len(set(copied)) > 8
    assert sum("copied" in line for line in lines) == 1


@pytest.mark.parametrize("name", ["tokens-00001.bin", "docs-00000.u64"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_file_is_refused_and_leaves_nothing_under_its_name(corpus, far, name, damage):
    path = far / "corpora/mix/more/train" / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-2] if damage == "cut" else whole[:7] + bytes([whole[7] ^ 4]) + whole[8:])
    expected = {
        "bit": r"expected sha256 \w{12}, got \w{12}: it is damaged",
        "cut": rf"expected {len(whole)} bytes, got {len(whole) - 2}: it changed or was cut",
        "gone": "expected to copy it to .*, got .*No such file.*",
    }[damage]
    with pytest.raises(UserError, match=rf"more/train/{name}: {expected}; open the corpus again, or copy it to {URL}"):
        open_corpus(corpus, lambda line: None)
    folder = cache_folder(URL, corpus.cache) / "more/train"
    assert not (folder / name).exists() and not (folder / "meta.json").exists() and not list(folder.glob(".*"))
    path.write_bytes(whole)
    open_corpus(corpus, lambda line: None)


def test_a_copy_that_was_cut_off_goes_on_and_trusts_no_file_that_it_has_not_compared(corpus, monkeypatch):
    folder, lines, copied, copy = cache_folder(URL, corpus.cache), [], [], sources_files.copy_file
    monkeypatch.setattr(mirror_module, "THREADS", 1)

    def stops(path, *args):
        copied.append(path)
        if len(copied) >= 7:
            raise KeyboardInterrupt
        copy(path, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(mirror_module, "copy_file", stops)
        with pytest.raises(KeyboardInterrupt):
            open_corpus(corpus, lines.append)
    assert not list(folder.rglob("meta.json"))
    there = sorted(p for p in folder.rglob("*") if p.suffix in (".bin", ".u64"))
    assert len(there) == 6
    (there[0].with_name(f".{there[0].name}.123")).write_bytes(b"of a killed process")
    other = there[1].read_bytes()[::-1]  # of a corpus that was there before, with as many tokens
    there[1].write_bytes(other)
    kept = {p: p.stat().st_ino for p in there if p != there[1]}
    opened = open_corpus(corpus, lines.append)
    for store in (*opened.train.values(), *opened.validation.values()):
        store.verify()
    assert kept == {p: p.stat().st_ino for p in kept} and not list(folder.rglob(".*"))
    n = int(re.search(r"copying (\d+) files", lines[-2])[1])
    assert n == int(re.search(r"copying (\d+) files", lines[0])[1]) - 5


def test_a_corpus_that_has_changed_is_refused_and_the_copy_stays(corpus, far):
    opened = open_corpus(corpus, lambda line: None)
    folder = cache_folder(URL, corpus.cache)
    before = state(folder)
    for name in ("more/validation/meta.json", "tokenizer.model", "tokenizer.json"):
        path = far / "corpora/mix" / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"documents": 50', b'"documents": 51') if "meta" in name else content + b"\n")
        with pytest.raises(
            UserError, match=rf"{name}: expected sha256 \w+ as when it was copied, got \w+: .* data.cache"
        ):
            open_corpus(corpus, lambda line: None)
        path.write_bytes(content)
    assert state(folder) == before
    for store in opened.train.values():  # a live run has lost nothing
        store.check_unchanged()
    open_corpus(corpus, lambda line: None)


def test_a_disk_that_is_too_small_is_refused_before_it_begins(corpus, monkeypatch):
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**4, 10**4)
    monkeypatch.setattr(mirror_module.shutil, "disk_usage", lambda path: usage)
    message = r"mix-\w+: expected [\d.]+ GB of free disk for gs://.*, got 0.000 GB; make room or set data.cache"
    with pytest.raises(UserError, match=message):
        open_corpus(corpus, lambda line: None)
    assert not list(cache_folder(URL, corpus.cache).rglob("*.bin"))


def test_what_is_no_prepared_corpus_says_how_to_make_one(corpus, far):
    how = "make it with `lm prepare` in a local folder, then copy that folder there"
    (far / "corpora/mix/more/train/meta.json").unlink()
    for call in (open_corpus, lambda data, log: prepare(data, log=log)):
        with pytest.raises(
            UserError, match=rf"{URL}: expected a prepared corpus, got no meta.json at .*/more/train.*{how}"
        ):
            call(corpus, lambda line: None)
    nothing = dataclasses.replace(corpus, path="gs://bucket/none")
    with pytest.raises(
        UserError, match=rf"gs://bucket/none: expected a prepared corpus, got no tokenizer.model .*{how}"
    ):
        open_corpus(nothing, lambda line: None)
    for kw in (dict(force=True), dict(host=1, hosts=2)):
        with pytest.raises(UserError, match=f"data.path: expected a local folder to prepare a corpus in, got '{URL}'"):
            prepare(corpus, **kw)
    with pytest.raises(UserError, match="ftp://x/y: expected gs://, s3:// or az://, got ftp://"):
        mirror("ftp://x/y", STORES, cache=corpus.cache)
    (far / "corpora/mix/more/train/meta.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match=f"{URL}/more/train/meta.json: expected store version 1, got 99"):
        open_corpus(corpus, lambda line: None)


def test_a_copy_that_does_not_fit_the_config_says_what_it_is_a_copy_of(corpus):
    open_corpus(corpus, lambda line: None)
    other = dataclasses.replace(corpus, invalid_utf8="error")
    with pytest.raises(
        UserError, match=rf"expected invalid_utf8='error'.*; this is the copy of {URL}: copy it there again"
    ):
        open_corpus(other, lambda line: None)


def test_corpora_of_one_name_do_not_meet():
    folders = {cache_folder(url, "c") for url in ("gs://a/mix", "gs://b/mix", "gs://b/mix/", "s3://b/mix")}
    assert len(folders) == 3 and all(f.name.startswith("mix-") for f in folders)
    assert cache_folder("gs://a/mix") == Path.home() / ".cache/lm/corpora" / cache_folder("gs://a/mix", "c").name


def test_stats_and_verify_take_the_url(corpus, far, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = stats.stats(stats.find_stores(far / "corpora/mix"))
    for command in ("stats", "verify"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", command, URL])
        out = capsys.readouterr().out
        assert stopped.value.code == 0
        if command == "stats":
            assert expected in out and "copied" in out
        else:
            assert out.count("as written") == 6 and "other/train" in out
    assert list((tmp_path / "home/.cache/lm/corpora").iterdir()) == [cache_folder(URL)]
    with pytest.raises(
        UserError, match="gs://bucket/corpora: expected the folder of a prepared corpus, got no <source>"
    ):
        stats.find_stores("gs://bucket/corpora")
