"""Several hosts that prepare one corpus in a shared folder make what one makes, whatever happens to them on the way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from lm import cli
from lm.data import Jsonl, Length, NearDuplicates, Overlap, SentencePiece, open_corpus, prepare
from lm.data.folder import MANIFEST
from lm.data.prepare import hosts, preparation
from lm.data.prepare.manifest import Manifest, difference, settings
from lm.data.prepare.preparation import Team
from lm.data.prepare.scan import ScanJob
from lm.data.prepare.tokenize import TokenizeJob
from lm.errors import UserError
from lm.files import locked
from tests.data.conftest import sample_texts
from tests.data.prepare.test_prepare import ROOT, SLOW, make, wait_for, write_jsonl  # noqa: F401

WAY_OUT = "give all hosts one recipe, --hosts and raw files, and start host 0 before this one"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    for module in ("lm.data.sources.base", "lm.data.prepare.passes"):
        monkeypatch.setattr(sys.modules[module], "stretch_bytes", lambda total: 3000)
    monkeypatch.setattr(preparation, "MAX_POLL_S", 0.1)


@pytest.fixture
def everything(tmp_path, make):  # noqa: F811
    """Two sources of several shards; filters, near-duplicates, an evaluation and a tokenizer to learn."""
    texts = sample_texts(60)
    write_jsonl(tmp_path / "one", texts[:35] + ["short"] + texts[:3])
    write_jsonl(tmp_path / "two", texts[30:] + [t.replace("the", "of", 1) for t in texts[40:45]])
    write_jsonl(tmp_path / "eval", [texts[9]])

    def everything(folder, **kw):
        return make(
            path=f"{tmp_path}/{folder}",
            sources={name: Jsonl(glob=f"{tmp_path}/{name}/*.jsonl") for name in ("one", "two")},
            tokenizer=SentencePiece(kind="bpe", vocab_size=400, train_bytes=6000),
            weights={"one": 0.8, "two": 0.2},
            filters=(Length(min_chars=20),),
            near_duplicates=NearDuplicates(),
            overlap=Overlap(files={"eval": Jsonl(glob=f"{tmp_path}/eval/*.jsonl")}, ngram=7, remove=True),
            **kw,
        )

    return everything


def start(data, host, n, log=lambda line: None):
    """One host on a thread that a failure of another does not keep."""
    future: Future = Future()

    def run():
        try:
            future.set_result(prepare(data, progress=False, log=log, host=host, hosts=n))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


def together(data, n, order=None):
    """What `n` hosts at once return, started in an order."""
    started = {host: start(data, host, n) for host in order or range(n)}
    return [started[host].result(timeout=120) for host in range(n)]


def files(folder):
    """Name -> content of all that stays, but for the locks."""
    found = (p for p in Path(folder).rglob("*") if p.is_file() and "lock" not in p.name)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.mark.parametrize("order", [(0, 1), (2, 1, 0)])
def test_any_number_of_hosts_in_any_order_writes_the_bytes_of_one(everything, tmp_path, monkeypatch, order):
    did = []
    for job in (ScanJob, TokenizeJob):
        run = job.run
        monkeypatch.setattr(job, "run", lambda self, run=run: (did.append((threading.get_ident(), self)), run(self))[1])
    one = prepare(everything("alone"), progress=False, log=lambda line: None)
    n_jobs, n = len(did), len(order)
    did.clear()
    corpora = together(everything("many"), n, order)
    assert {str(c.fingerprint) for c in corpora} == {str(one.fingerprint)}
    alone = files(tmp_path / "alone")
    assert files(tmp_path / "many") == alone and "one/train/tokens-00003.bin" in alone
    assert not (tmp_path / "many" / MANIFEST).exists() and not list((tmp_path / "many").glob("*/work"))
    assert len(did) == n_jobs  # nothing was done twice
    by_host: dict = {}
    for thread, job in did:
        by_host.setdefault(thread, []).append(job)
    assert len(by_host) == n
    scans = sorted((j for _, j in did if isinstance(j, ScanJob)), key=lambda j: (j.out.parent.parent.name, j.out.name))
    shares = [{scans.index(j) % n for j in jobs if isinstance(j, ScanJob)} for jobs in by_host.values()]
    assert sorted(shares, key=min) == [{i} for i in range(n)]


def test_a_host_that_comes_late_ends_and_writes_nothing(everything, tmp_path):
    data, lines = everything("corpus"), []
    prepare(data, progress=False, log=lambda line: None)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").rglob("*") if p.is_file() and "lock" not in p.name}
    corpus = prepare(data, progress=False, log=lines.append, host=1, hosts=3)
    assert corpus.fingerprint == open_corpus(data).fingerprint
    assert lines == [f"{tmp_path}/corpus: host 1 of 3: done, all is written"]
    assert times == {p: p.stat().st_mtime_ns for p in times}


def plan_and_die(data):
    """Host 0 is killed when it has written its manifest."""
    save = Manifest.save

    def save_and_die(self, path):
        save(self, path)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Manifest, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, progress=False, log=lambda line: None, host=0, hosts=2)


def test_a_host_waits_where_the_plan_is_of_raw_files_that_have_changed(everything, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "FIRST_WORD_S", 0.0)
    data, lines = everything("corpus"), []
    plan_and_die(data)
    write_jsonl(tmp_path / "two", sample_texts(40, seed=5))
    late = start(data, 1, 2, lines.append)
    wait_for(lambda: lines)
    expected = r"waiting for host 0 to begin anew: .*\.plan\.json: expected raw files of two='\w+' as on this host, got"
    assert re.match(expected, lines[0]) and not list((tmp_path / "corpus").glob("*/work/scan-*"))
    assert start(data, 0, 2).result(60).fingerprint == late.result(60).fingerprint
    prepare(everything("alone"), progress=False, log=lambda line: None)
    assert files(tmp_path / "corpus") == files(tmp_path / "alone")


def test_a_host_begins_anew_when_host_0_does(everything, tmp_path):
    """The evaluation has changed since host 0 was killed, and what was scanned has to be scanned again."""
    data = everything("corpus")
    plan_and_die(data)
    late = start(data, 1, 2)
    n_jobs = sum(len(named) for named in Manifest.load(tmp_path / "corpus").shards.values())
    scans = lambda: list((tmp_path / "corpus").glob("*/work/scan-*.npz"))
    wait_for(lambda: len(scans()) == n_jobs // 2)
    write_jsonl(tmp_path / "eval", sample_texts(8)[3:])
    assert start(data, 0, 2).result(60).fingerprint == late.result(60).fingerprint
    prepare(everything("alone"), progress=False, log=lambda line: None)
    ours, alone = files(tmp_path / "corpus"), files(tmp_path / "alone")
    left = set(ours) - set(alone)  # the n-grams of the killed run
    assert len(left) == 1 and "overlap:index" in left.pop() and alone.items() <= ours.items()


def test_a_host_with_another_config_refuses(everything, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "PATIENCE_S", 0.3)
    data = everything("corpus")
    (tmp_path / "corpus").mkdir()
    Manifest(settings=settings(data.corpus, 2), shards={}, raw={}, index=None).save(tmp_path / "corpus")
    for other, n, message in (
        (everything("corpus", validation_fraction=0.3), 2, "sources.one.validation_fraction=0.3 .* got 0.1 of host 0"),
        (everything("corpus", invalid_utf8="error"), 2, "sources.one.invalid_utf8='error' .* got 'replace' of host 0"),
        (data, 3, "hosts=3 as on this host, got 2 of host 0"),
    ):
        with pytest.raises(UserError, match=rf"\.plan\.json: expected {message}; {WAY_OUT}"):
            prepare(other, progress=False, log=lambda line: None, host=1, hosts=n)


def test_settings_are_compared_to_the_first_that_differs():
    a = {"hosts": 2, "sources": {"x": {"f": 1}, "y": {"f": [2]}}}
    assert difference(a, {**a}) is None
    assert difference(a, {**a, "sources": {"x": {"f": 1}, "y": {"f": [3]}}}) == ("sources.y.f", [2], [3])
    assert difference(a, {**a, "sources": {"x": {"f": 1}}}) == ("sources.y", {"f": [2]}, None)
    swapped = {"y": {"f": [2]}, "x": {"f": 1}}
    assert difference(a, {**a, "sources": swapped}) == ("sources", ["x", "y"], ["y", "x"])


def test_what_makes_no_sense_is_refused(everything, capsys):
    for host, n in ((2, 2), (-1, 3), (0, 0)):
        with pytest.raises(UserError, match=rf"--host {host} --hosts {n}: expected 0 <= host < hosts"):
            Team(host=host, hosts=n)
    with pytest.raises(UserError, match="--force --hosts 2: expected one of them, .* delete .*/corpus on one host"):
        prepare(everything("corpus"), force=True, host=0, hosts=2)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare", "gpt2_tiny", "--hosts", "2"])
    assert stopped.value.code == 2 and "expected both or none, got one" in capsys.readouterr().err


def test_one_and_several_hosts_wait_for_each_other(everything, tmp_path):
    data, lines = everything("corpus"), []
    (tmp_path / "corpus").mkdir()
    lock = tmp_path / "corpus" / "lock"
    with locked(lock, print, shared=True), locked(lock, print, shared=True):  # hosts do not keep each other out
        alone = start(data, 0, 1, lines.append)
        wait_for(lambda: lines)
        assert f"lock: waiting for process {os.getpid()} on" in lines[0] and not alone.done()
    alone.result(60)
    lines.clear()
    with locked(lock, print):
        host = start(data, 1, 2, lines.append)
        wait_for(lambda: lines)
        assert "lock: waiting for process" in lines[0] and not host.done()
    host.result(60)
    lines.clear()
    with locked(lock.with_name(".lock-1"), print):
        host = start(data, 1, 2, lines.append)
        wait_for(lambda: lines)
        assert ".lock-1: waiting for process" in lines[0]
    host.result(60)


def test_work_that_was_removed_because_all_is_written_is_not_done_again(everything, tmp_path, monkeypatch):
    """As seen by a host that looks whether all is written just before it is."""
    data, saved, looks, ran = everything("corpus"), [], [], []
    save, is_finished = Manifest.save, hosts.is_finished
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Manifest, "save", lambda self, path: (saved.append(self), save(self, path)))
        together(data, 2)
    before = files(tmp_path / "corpus")
    saved[0].save(tmp_path / "corpus")
    for job in (ScanJob, TokenizeJob):
        monkeypatch.setattr(job, "run", ran.append)
    monkeypatch.setattr(hosts, "is_finished", lambda data: bool(looks) and is_finished(data) or looks.append(1))
    prepare(data, progress=False, log=lambda line: None, host=1, hosts=2)
    assert ran == [] and len(looks) == 1
    (tmp_path / "corpus" / MANIFEST).unlink()
    assert files(tmp_path / "corpus") == before and not list((tmp_path / "corpus").glob("*/work"))


RUN = """
import sys
import slow_source
from lm.data.prepare import preparation
preparation.MAX_POLL_S, preparation.FIRST_WORD_S = 0.1, 0.5
if __name__ == "__main__":
    data = slow_source.data({folder!r}, {path!r}, 1)
    slow_source.prepare(data, progress=False, host=int(sys.argv[1]), hosts=2)
"""


def test_hosts_that_are_killed_go_on_where_they_were(tmp_path, monkeypatch):
    (tmp_path / "slow_source.py").write_text(SLOW)
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN.format(folder=str(tmp_path), path=str(tmp_path / "corpus"))))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow_source", raising=False)
    import slow_source

    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONUNBUFFERED": "1"}
    work, processes = tmp_path / "corpus/slow/work", []

    def run(host, log):
        with open(tmp_path / log, "w") as out:
            command = [sys.executable, str(tmp_path / "run.py"), str(host)]
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
        return processes[-1]

    def done():
        return {int(p.stem[-1]) for p in work.glob("shard-*.json")}

    (tmp_path / "block").touch()  # shard 3, which is of host 1, cannot be tokenised
    try:
        one = run(1, "one")
        wait_for(lambda: "waiting for host 0, which finds the raw text" in (tmp_path / "one").read_text())
        zero = run(0, "zero")
        expected = f"waiting for 2 of 6 shards of other hosts, first: {work}/shard-00003.json"
        wait_for(lambda: expected in (tmp_path / "zero").read_text())
        assert done() == {0, 1, 2, 4}
        for process in (one, zero):
            process.kill()
            process.wait()
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").rglob("tokens-*.bin")}
        reads = (tmp_path / "reads").read_text()
        assert len(kept) == 8 and not (tmp_path / "corpus/slow/train/meta.json").exists()

        zero = run(0, "zero again")
        wait_for(lambda: expected in (tmp_path / "zero again").read_text())
        (tmp_path / "block").unlink()
        one = run(1, "one again")
        assert one.wait(120) == zero.wait(120) == 0, (tmp_path / "one again").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    again = (tmp_path / "reads").read_text()[len(reads) :].splitlines()
    assert [line.split()[0] for line in again] == ["3", "5"]
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in kept}.items()
    whole = prepare(slow_source.data(str(tmp_path), str(tmp_path / "whole"), 1), progress=False, log=lambda line: None)
    assert files(tmp_path / "corpus") == files(tmp_path / "whole")
    assert whole.train["slow"].n_documents + whole.validation["slow"].n_documents == 60
