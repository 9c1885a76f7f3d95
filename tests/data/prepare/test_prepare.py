import fcntl
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from lm.data import C4, Data, Jsonl, Length, NearDuplicates, Overlap, SentencePiece, Text, open_corpus, prepare
from lm.data.documents.reading import Reading
from lm.data.prepare.manifest import Manifest, scan_jobs, settings
from lm.data.prepare.scan import ScanJob
from tests.data.conftest import sample_texts

ROOT = Path(__file__).parents[3]


@pytest.fixture
def make(tmp_path, tokenizer_path):
    def make(source=None, **kw):
        sources = {"main": source or Jsonl(glob=f"{tmp_path}/raw/*.jsonl*")}
        defaults = dict(path=f"{tmp_path}/corpus", sources=sources, tokenizer=tokenizer_path, seq_len=16, batch_size=8)
        return Data(**defaults | {"validation_fraction": 0.1, "workers": 1} | kw)

    return make


def write_jsonl(folder, texts, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    content = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (folder / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())


def quiet(data, **kw):
    return prepare(data, progress=False, log=lambda line: None, **kw)


def documents(corpus, split="train", name="main"):
    store = getattr(corpus, split)[name]
    return [corpus.tokenizer.decode(store.document(i)) for i in range(store.n_documents)]


def test_every_document_arrives_once_in_order_in_one_split(tmp_path, make):
    texts = sample_texts(100)
    write_jsonl(tmp_path / "raw", texts[:50])
    write_jsonl(tmp_path / "raw", texts[50:], "b.jsonl.gz")
    corpus = quiet(make())
    train, validation = documents(corpus), documents(corpus, "validation")
    assert 0 < len(validation) < 30 and set(train) | set(validation) == set(texts) and len(train + validation) == 100
    assert train == [t for t in texts if t in set(train)] and validation == [t for t in texts if t in set(validation)]
    for split, held in (("train", train), ("validation", validation)):
        store = getattr(corpus, split)["main"]
        assert store.n_bytes == sum(len(t.encode()) for t in held)
        assert store.n_tokens == 1 + sum(len(corpus.tokenizer.encode(t)) + 1 for t in held)
        assert store.read(0, 1)[0] == store.read(store.n_tokens - 1, store.n_tokens)[0] == corpus.tokenizer.eos_id
        store.verify()
    assert not (tmp_path / "corpus/main/work").exists()
    assert set(corpus.fingerprint) == {"tokenizer", "main/train", "main/validation"}


def test_duplicates_go_and_never_straddle_the_split(tmp_path, make):
    texts = sample_texts(100)
    write_jsonl(tmp_path / "raw", texts[:80] + ["", texts[3]])
    write_jsonl(tmp_path / "raw", texts[40:] + texts[:3], "b.jsonl")
    corpus = quiet(make())
    assert sorted(documents(corpus) + documents(corpus, "validation")) == sorted(texts)
    counts = corpus.train["main"].meta.counts
    assert counts == {"documents": 145, "empty": 1, "duplicates": 44, "invalid_utf8": 0}
    held = set(documents(corpus, "validation"))
    other = quiet(make(path=f"{tmp_path}/other", seed=9))
    assert set(documents(other, "validation")) == held


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, make, monkeypatch):
    for module in ("lm.data.sources.base", "lm.data.prepare.passes"):
        monkeypatch.setattr(sys.modules[module], "stretch_bytes", lambda total: 3000)
    write_jsonl(tmp_path / "raw", sample_texts(60))
    tokenizer = SentencePiece(kind="bpe", vocab_size=400, train_bytes=6000)
    kw = dict(tokenizer=tokenizer)
    one = quiet(make(path=f"{tmp_path}/one", workers=1, **kw))
    two = quiet(make(path=f"{tmp_path}/two", workers=2, **kw))
    assert one.fingerprint == two.fingerprint and len(one.train["main"].meta.shards) > 3


def test_invalid_utf8_is_counted_or_refused(tmp_path, make):
    (tmp_path / "raw").mkdir()
    for i, text in enumerate(sample_texts(100)):
        (tmp_path / "raw" / f"{i:02d}.txt").write_bytes(text.encode() + (b"\xff\xfe" if i == 7 else b""))
    source = Text(glob=f"{tmp_path}/raw/*.txt")
    corpus = quiet(make(source))
    assert corpus.train["main"].meta.counts["invalid_utf8"] == 1
    assert any(t.endswith("\ufffd\ufffd") for t in documents(corpus) + documents(corpus, "validation"))
    with pytest.raises(ValueError, match=r"07.txt: document 1: expected UTF-8, got b'\\xff' at byte"):
        quiet(make(source, path=f"{tmp_path}/strict", invalid_utf8="error"))


def test_preparing_again_reads_nothing(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(40))
    data = make()
    first = quiet(data)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").rglob("*") if p.is_file() and p.name != "lock"}
    (tmp_path / "raw/a.jsonl").unlink()  # the corpus stands on its own
    assert quiet(data).fingerprint == open_corpus(data).fingerprint == first.fingerprint
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_a_source_can_be_added_and_its_tokenizer_stays(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(60))
    write_jsonl(tmp_path / "more", sample_texts(60, seed=1))
    tokenizer = SentencePiece(kind="bpe", vocab_size=400)
    first = quiet(make(tokenizer=tokenizer))
    sources = {"main": Jsonl(glob=f"{tmp_path}/raw/*.jsonl*"), "more": Jsonl(glob=f"{tmp_path}/more/*.jsonl")}
    second = quiet(make(tokenizer=tokenizer, sources=sources))
    assert set(second.train) == {"main", "more"}
    assert first.fingerprint.items() < second.fingerprint.items()


def test_tokenizer_training_does_not_see_validation(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(60))
    source = Jsonl(glob=f"{tmp_path}/raw/*.jsonl")
    reading = Reading(source=source, parts=tuple(source.parts(tmp_path)), invalid_utf8="error")
    job = ScanJob(reading=reading, sample_bytes=10**6, validation_fraction=0.5, out=tmp_path / "scan.npz")
    job.run()
    scan = job.result()
    n_train = int((scan.hashes >= 2**63).sum())
    assert 0 < n_train < 60 and len(scan.sample) == n_train
    small = ScanJob(reading=reading, sample_bytes=1500, validation_fraction=0.5, out=tmp_path / "small.npz")
    small.run()
    sample = small.result().sample
    assert 1500 <= sum(len(t.encode()) for t in sample) < 2200 and set(sample) < set(scan.sample)


def test_other_settings_are_refused_until_forced(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(40))
    first = quiet(make())
    for changed, message in (
        (make(validation_fraction=0.2), "expected validation_fraction=0.2 as in the config, got one made with 0.1"),
        (make(invalid_utf8="error"), "expected invalid_utf8='error'"),
        (make(Jsonl(glob=f"{tmp_path}/raw/a*.jsonl")), "expected source.glob='.*a.*' as in the config"),
        (make(tokenizer=SentencePiece(vocab_size=400)), "tokenizer.model: tokenizer: expected kind='unigram'"),
    ):
        for call in (open_corpus, quiet):
            with pytest.raises(ValueError, match=rf"{message}.*--force"):
                call(changed)
    assert open_corpus(make(seed=5, seq_len=99, batch_size=3, workers=7)).fingerprint == first.fingerprint
    changed = make(validation_fraction=0.2)
    assert quiet(changed, force=True).fingerprint != first.fingerprint
    open_corpus(changed)


def test_changed_raw_files_are_noticed(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(40))
    quiet(make())
    write_jsonl(tmp_path / "raw", sample_texts(41))
    with pytest.raises(ValueError, match="expected raw files .* a file was added, removed or changed; .*--force"):
        quiet(make())
    open_corpus(make())
    quiet(make(), force=True)


def test_another_tokenizer_and_cut_shards_are_refused(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(80))
    quiet(make())
    other = tmp_path / "other.model"
    other.write_bytes(SentencePiece(kind="bpe", vocab_size=400).train(sample_texts(50, seed=4)).to_bytes())
    with pytest.raises(ValueError, match=r"tokenizer.model: expected tokenizer .*other.model .* --force"):
        open_corpus(make(tokenizer=str(other)))
    ours = tmp_path / "corpus/tokenizer.model"
    original = ours.read_bytes()
    ours.write_bytes(other.read_bytes())
    with pytest.raises(
        ValueError, match="main/train: expected tokens of tokenizer .* delete .*main and run `lm prepare`"
    ):
        open_corpus(make(tokenizer=str(other)))
    ours.write_bytes(original)
    shard = tmp_path / "corpus/main/train/tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    for call in (open_corpus, quiet):
        with pytest.raises(ValueError, match=r"tokens-00000.bin: expected \d+ bytes, got \d+; .*--force"):
            call(make())
    quiet(make(), force=True)


def test_opening_before_preparing_says_so(tmp_path, make):
    with pytest.raises(
        ValueError, match="corpus: expected a prepared corpus, got no tokenizer.model there; run `lm prepare`"
    ):
        open_corpus(make())
    write_jsonl(tmp_path / "raw", sample_texts(40))
    quiet(make())
    (tmp_path / "corpus/main/validation/meta.json").unlink()
    with pytest.raises(ValueError, match="validation: expected a prepared store, got no meta.json there"):
        open_corpus(make())
    quiet(make())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "expected text, got 0 documents"),
        (["", ""], "expected text, got 2 documents, all empty"),
        (["one", "one"], "expected documents in (train|validation), got none: all of 1 fell elsewhere"),
    ],
)
def test_too_little_text_is_refused(tmp_path, make, texts, message):
    write_jsonl(tmp_path / "raw", texts)
    with pytest.raises(ValueError, match=rf"data.sources\['main'\]: {message}"):
        quiet(make())


def test_no_validation_when_none_is_wanted(tmp_path, make):
    write_jsonl(tmp_path / "raw", ["one document"])
    corpus = quiet(make(validation_fraction=0.0))
    assert corpus.validation == {} and documents(corpus) == ["one document"]
    assert not (tmp_path / "corpus/main/validation").exists()


def test_data_refuses_what_makes_no_sense(make):
    for kw, message in (
        (dict(sources={}), "expected at least one"),
        (dict(sources={"a/b": Text(glob="x")}), "names fit for a folder, got 'a/b'"),
        (dict(sources={"raw": Text(glob="x")}), "names fit for a folder"),
        (dict(sources={"a": "*.txt"}), "expected a Source"),
        (dict(cache="gs://bucket/corpora"), "data.cache: expected a local folder, since stores are memory-mapped"),
        (dict(weights={"other": 1.0}), r"expected one for each of \['main'\], got \['other'\]"),
        (dict(seq_len=0), "seq_len: expected at least 1"),
        (dict(workers=-1), "workers: expected at least 1"),
        (dict(workers=0), "workers: expected at least 1"),
        (dict(validation_fraction=1.0), "validation_fraction"),
        (dict(invalid_utf8="ignore"), "invalid_utf8"),
        (dict(sources={"a": Text(glob="x", not_text="skip")}), "not_text: expected 'refuse' or 'keep', got 'skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**kw)


SLOW = '''
import os, time
from dataclasses import dataclass
from pathlib import Path
from lm.data import Data, SentencePiece, Source, prepare
from lm.data.sources.base import Document, Part

@dataclass(frozen=True, kw_only=True)
class Slow(Source):
    """Six shards of ten documents. Shard 3 cannot be tokenised while the file `block` is there."""
    folder: str

    def parts(self, cache):
        return [Part(f"{self.folder}/{i}", i, -1, 4 << 20) for i in range(6)]

    def read(self, part):
        folder = Path(self.folder)
        with open(folder / "reads", "a") as f:
            f.write(f"{part.start} {os.getpid()}\\n")
        second = (folder / "reads").read_text().count(f"{part.start} ") > 1
        while part.start == 3 and second and (folder / "block").exists():
            time.sleep(0.02)
        for i in range(10):
            yield Document(str(i), f"document {i} of part {part.start}, {'some words ' * (i + part.start)}".encode())

def data(folder, path, workers):
    return Data(path=path, sources={"slow": Slow(folder=folder)}, tokenizer=SentencePiece(kind="bpe", vocab_size=300),
                seq_len=8, batch_size=4, validation_fraction=0.2, workers=workers)
'''


@pytest.fixture
def slow(tmp_path, monkeypatch):
    (tmp_path / "slow_source.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("slow_source", None)
    import slow_source

    return slow_source


def start(tmp_path, workers, path="corpus"):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import slow_source
        if __name__ == "__main__":
            data = slow_source.data({str(tmp_path)!r}, {str(tmp_path / path)!r}, {workers})
            slow_source.prepare(data, progress=False)
        """)
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    return subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path, slow, workers):
    (tmp_path / "block").touch()
    work = tmp_path / "corpus/slow/work"
    finished = {0, 1, 2} if workers == 1 else {0, 1, 2, 4, 5}
    process = start(tmp_path, workers)
    try:
        wait_for(lambda: {int(p.stem[-1]) for p in work.glob("shard-*.json")} == finished)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reads = [line.split() for line in (tmp_path / "reads").read_text().splitlines()]
    wait_for(lambda: not any(is_running(pid) for _, pid in reads), seconds=10)
    assert not (tmp_path / "corpus/slow/train/meta.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").rglob("tokens-*.bin")}
    assert len(kept) == 2 * len(finished)

    (tmp_path / "block").unlink()
    corpus = quiet(slow.data(str(tmp_path), str(tmp_path / "corpus"), 1))
    again = (tmp_path / "reads").read_text().splitlines()[len(reads) :]
    assert {int(line.split()[0]) for line in again} == set(range(6)) - finished
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in kept}.items()
    whole = quiet(slow.data(str(tmp_path), str(tmp_path / "whole"), 1))
    assert corpus.fingerprint == whole.fingerprint
    assert not list((tmp_path / "corpus").rglob(".*"))


def test_two_processes_at_once_make_one_corpus(tmp_path, slow):
    (tmp_path / "block").touch()
    first = start(tmp_path, 1)
    wait_for(lambda: (tmp_path / "corpus/slow/work/shard-00002.json").exists())
    second = start(tmp_path, 1)
    waiting = second.stdout.readline()
    assert f"waiting for process {first.pid} on" in waiting
    (tmp_path / "block").unlink()
    assert first.wait(120) == second.wait(120) == 0
    reads = (tmp_path / "reads").read_text().splitlines()
    assert len(reads) == 12 and {r.split()[1] for r in reads} == {str(first.pid)}
    corpus = open_corpus(slow.data(str(tmp_path), str(tmp_path / "corpus"), 1))
    assert corpus.train["slow"].n_documents + corpus.validation["slow"].n_documents == 60


def test_a_lock_of_a_dead_process_is_no_obstacle(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(40))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/lock").write_text("999999999 on nowhere")
    lines = []
    prepare(make(), progress=True, log=lines.append)
    assert not any("waiting" in line for line in lines) and "prepared in" in lines[-1]
    with open(tmp_path / "corpus/lock") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, slow, monkeypatch):
    original, n = slow.Slow.read, iter(range(100))

    def read(self, part):
        yield from (d._replace(raw=d.raw + (b"!" if next(n) == 70 else b"")) for d in original(self, part))

    monkeypatch.setattr(slow.Slow, "read", read)
    with pytest.raises(ValueError, match="changed while it was prepared; run `lm prepare` again"):
        quiet(slow.data(str(tmp_path), str(tmp_path / "corpus"), 1))


def test_importing_the_package_loads_no_framework():
    code = "import sys, lm.data; print(sorted({'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A shard of 64 MB is scanned and tokenised in far less than its size."""
    code = textwrap.dedent(f"""
        import resource, sys
        from pathlib import Path
        import numpy as np
        from lm.data import Jsonl
        from lm.data.documents.reading import Reading
        from lm.data.prepare.scan import ScanJob
        from lm.data.prepare.tokenize import TokenizeJob
        tmp = Path({str(tmp_path)!r})
        source = Jsonl(glob=str(tmp / "big.jsonl"))
        reading = Reading(source=source, parts=tuple(source.parts(tmp)), invalid_utf8="error")
        scan = ScanJob(reading=reading, sample_bytes=10**5, validation_fraction=0.1, out=tmp / "scan.npz")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scan.run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    line = json.dumps({"text": "x y " * 2500})
    with open(tmp_path / "big.jsonl", "w") as f:
        for i in range(6400):
            f.write(line[:-2] + f'{i}"}}\n')
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 20_000, "KiB"
    assert np.load(tmp_path / "scan.npz")["hashes"].shape == (6400,)


def report(corpus_folder, name="main"):
    return json.loads((Path(corpus_folder) / name / "report.json").read_text())


def adds_up(r):
    assert r["read"] == sum(r["kept"].values()) + sum(r["left_out"].values())
    assert r["read"] == sum(f["read"] for f in r["files"].values())
    assert sum(r["kept"].values()) == sum(f["kept"] for f in r["files"].values())
    return r["left_out"]


def bad_input(folder, texts):
    """Three files of 40 good documents in all, and one of each kind of trouble."""
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"text": t}).encode() for t in texts]
    trouble = [b"{not json", b"[1]", b'{"body": "x"}', b'{"text": null}', json.dumps({"text": "x" * 9000}).encode()]
    trouble += [b'{"text": "bad \xff utf8"}', b'{"text": ""}', rows[3], json.dumps({"text": "nul \0 inside"}).encode()]
    (folder / "a.jsonl").write_bytes(b"\n".join(rows[:20] + trouble))
    (folder / "b.jsonl").write_bytes(b"\n".join(rows[20:30]))
    content = b"\n".join(rows[30:] + [json.dumps({"text": t}).encode() for t in sample_texts(500, seed=8)])
    whole = gzip.compress(content)
    (folder / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return trouble


def test_bad_input_is_counted_and_what_was_read_adds_up(tmp_path, make, monkeypatch):
    texts = sample_texts(40)
    bad_input(tmp_path / "raw", texts)
    kw = dict(on_error="skip", invalid_utf8="error", max_document_bytes=5000)
    lines = []
    data = make(**kw)
    corpus = prepare(data, progress=False, log=lines.append)
    r = report(data.path)
    left = adds_up(r)
    assert left == {
        **{"bad_json": 2, "duplicates": 1, "empty": 1, "missing_field": 2, "not_utf8": 1},
        **{"too_long": 1, "unreadable": 1},
    }
    assert r["holding_nul"] == 1 and len(r["examples"]["bad_json"]) == 2
    assert re.search(r"a.jsonl:21: expected one JSON object", r["examples"]["bad_json"][0])
    assert "c.jsonl.gz: expected a whole gzip file" in r["examples"]["unreadable"][0]
    held = documents(corpus) + documents(corpus, "validation")
    assert set(texts[:30]) | {"nul \0 inside"} <= set(held) and len(held) == sum(r["kept"].values())
    assert corpus.train["main"].meta.counts.items() >= left.items()
    assert any("2 bad json" in line and "1 unreadable" in line for line in lines)
    assert re.search(r"prepared in \d+ s, [\d.]+ MB of text at [\d.]+ MB/s", lines[-1])

    for module in ("lm.data.sources.base", "lm.data.prepare.passes"):
        monkeypatch.setattr(sys.modules[module], "stretch_bytes", lambda total: 700)
    cut = quiet(make(path=f"{tmp_path}/cut", workers=2, **kw))
    assert documents(cut) == documents(corpus) and len(cut.train["main"].meta.shards) > 3
    assert {k: v for k, v in report(f"{tmp_path}/cut").items() if k != "examples"} == {
        k: v for k, v in r.items() if k != "examples"
    }
    with pytest.raises(ValueError, match="expected skip_errors=None as in the config, got one made with"):
        open_corpus(make(invalid_utf8="error"))


def test_each_kind_of_trouble_is_refused_by_default(tmp_path, make):
    texts = sample_texts(30)
    trouble = bad_input(tmp_path / "raw", texts)
    expected = {0: "one JSON object", 1: "got list", 2: r"got \['body'\]", 3: "NoneType", 4: "at most 5000 bytes"}
    for i, message in {**expected, 5: "expected UTF-8"}.items():
        folder = tmp_path / f"raw{i}"
        folder.mkdir()
        (folder / "x.jsonl").write_bytes(trouble[i])
        source = Jsonl(glob=f"{folder}/*")
        with pytest.raises(ValueError, match=rf"x.jsonl:( line )?1.*{message}"):
            quiet(make(source, path=f"{tmp_path}/p{i}", invalid_utf8="error", max_document_bytes=5000))
    with pytest.raises(ValueError, match="c.jsonl.gz: expected a whole gzip file"):
        quiet(make(Jsonl(glob=f"{tmp_path}/raw/c*"), path=f"{tmp_path}/gz"))


def test_filters_run_once_in_order_and_are_counted(tmp_path, make):
    line = "The cat and the dog sat down to rest there."
    texts = [f"{line}\nmenu\n{line} {i} is a number of some kind." + f"\n{line}" for i in range(60)]
    write_jsonl(tmp_path / "raw", texts + ["short", "{" * 300, *[f"{t}\nhome" for t in texts[:7]]])
    data = make(filters=(Length(min_chars=20), C4()))
    corpus = quiet(data)
    held = documents(corpus) + documents(corpus, "validation")
    assert sorted(held) == sorted(t.replace("menu\n", "") for t in texts)
    r = report(data.path)
    assert adds_up(r) == {"length.short": 1, "c4.curly_bracket": 1, "duplicates": 7} and r["cleaned_by_filters"] == 67
    for changed in (make(), make(filters=(C4(), Length(min_chars=20)))):
        with pytest.raises(ValueError, match="expected filters=.* as in the config, got one made with"):
            open_corpus(changed)
    with pytest.raises(ValueError, match=r"none left: 69 length.short; see .*main/report.json"):
        quiet(make(filters=(Length(min_chars=999),), path=f"{tmp_path}/none"))
    assert adds_up(report(f"{tmp_path}/none")) == {"length.short": 69}


def test_a_changed_file_of_a_filter_is_noticed(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(40))
    (tmp_path / "bad.txt").write_text("nothing\n")
    data = make(filters=(C4(bad_words=f"{tmp_path}/bad.txt", min_sentences=0, terminal=("",), min_words_per_line=0),))
    quiet(data)
    quiet(data)
    (tmp_path / "bad.txt").write_text("something\n")
    with pytest.raises(ValueError, match="expected raw files"):
        quiet(data)


def near_sources(tmp_path, make, **kw):
    texts = [" ".join(f"w{random.Random(i).randrange(10**6)}x{j}" for j in range(150)) for i in range(40)]
    copies = [t.replace("x7 ", "x7changed ") for t in texts]
    write_jsonl(tmp_path / "one", texts[:30] + copies[5:8])
    write_jsonl(tmp_path / "two", [texts[0], *copies[20:30], *texts[30:]])
    sources = {n: Jsonl(glob=f"{tmp_path}/{n}/*.jsonl") for n in ("one", "two")}
    return texts, make(sources=sources, near_duplicates=NearDuplicates(), validation_fraction=0.4, **kw)


def test_near_duplicates_go_across_sources_and_the_first_stays(tmp_path, make):
    texts, data = near_sources(tmp_path, make)
    lines = []
    corpus = prepare(data, progress=False, log=lines.append)
    both = lambda c, n: set(documents(c, name=n)) | set(documents(c, "validation", n))
    assert both(corpus, "one") == set(texts[:30]) and both(corpus, "two") == set(texts[30:])
    one, two = report(data.path, "one"), report(data.path, "two")
    assert adds_up(one) == {"near_duplicates": 3} and adds_up(two) == {"near_duplicates": 11}
    assert two["near_duplicates"]["clusters_in_all_sources"] == 14 and two["near_duplicates"]["documents_in_them"] == 28
    first, *others = one["near_duplicates"]["largest"][0]
    assert first == f"one: {tmp_path}/one/a.jsonl: record 1" and others == [f"two: {tmp_path}/two/a.jsonl: record 1"]
    assert any("11 near-duplicates left out; 14 clusters of 28 documents" in line for line in lines)


def test_a_source_added_later_is_compared_with_those_that_are_there(tmp_path, make):
    texts, data = near_sources(tmp_path, make, path=f"{tmp_path}/whole")
    whole = quiet(data)
    model = f"{tmp_path}/whole/tokenizer.model"
    again = dict(tokenizer=model, path=f"{tmp_path}/parts", near_duplicates=NearDuplicates(), validation_fraction=0.4)
    quiet(make(sources={"one": data.sources["one"]}, **again))
    parts = quiet(make(sources=data.sources, **again))
    assert parts.fingerprint == whole.fingerprint
    assert report(f"{tmp_path}/parts", "two")["left_out"] == {"near_duplicates": 11}
    shutil.rmtree(f"{tmp_path}/parts/two")
    (tmp_path / "parts/one/near.u32").unlink()
    with pytest.raises(ValueError, match="near.u32: expected signatures of 120 values, got nothing there; .*--force"):
        quiet(make(sources=data.sources, **again))


@pytest.mark.parametrize("remove", [False, True])
def test_overlap_is_reported_by_source_and_removed_on_request(tmp_path, make, remove):
    texts = sample_texts(80)
    write_jsonl(tmp_path / "raw", texts + texts[:3])
    write_jsonl(tmp_path / "eval", ["before " + " ".join(texts[i].split()[2:30]) for i in (0, 5, 9)] + ["short one"])
    write_jsonl(tmp_path / "clean", sample_texts(5, seed=77))
    files = {n: Jsonl(glob=f"{tmp_path}/{n}/*.jsonl") for n in ("eval", "clean")}
    lines = []
    data = make(overlap=Overlap(files=files, ngram=7, remove=remove))
    corpus = prepare(data, progress=False, log=lines.append)
    r = report(data.path)
    found = r["overlap"]
    assert found["documents"] == (4 if remove else 3) and found["removed"] == remove and found["ngram"] == 7
    assert found["share"] == pytest.approx(4 / 81 if remove else 3 / 80)
    assert found["by_evaluation"] == {
        "eval": {"documents": found["documents"], "evaluation_documents": 4, "too_short_to_find": 1},
        "clean": {"documents": 0, "evaluation_documents": 5, "too_short_to_find": 0},
    }
    assert "a.jsonl: line 1: " in found["examples"][0] and any("share 7 words in a row" in line for line in lines)
    held = set(documents(corpus)) | set(documents(corpus, "validation"))
    assert held == set(texts) - ({texts[0], texts[5], texts[9]} if remove else set())
    assert adds_up(r) == ({"overlap": 4, "duplicates": 2} if remove else {"duplicates": 3})
    assert not list((tmp_path / "corpus/raw").glob("*.npz"))


def test_stores_of_before_these_settings_still_open(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(40))
    corpus = quiet(make())
    for split in ("train", "validation"):
        path = tmp_path / f"corpus/main/{split}/meta.json"
        meta = json.loads(path.read_text())
        assert meta["made_from"].pop("source") == {
            **{"type": "Jsonl", "glob": f"{tmp_path}/raw/*.jsonl*", "field": "text", "template": None}
        }
        old = {"type": "Jsonl", "glob": f"{tmp_path}/raw/*.jsonl*", "field": "text"}
        meta["made_from"] = {"source": old, "validation_fraction": 0.1, "invalid_utf8": "replace"}
        path.write_text(json.dumps(meta))
    assert open_corpus(make()).fingerprint == corpus.fingerprint


def test_preparing_settings_are_checked(make):
    for kw, message in (
        (dict(on_error="ignore"), "data.on_error: expected 'refuse' or 'skip', got 'ignore'"),
        (dict(max_document_bytes=0), "data.max_document_bytes: expected at least 1"),
        (dict(filters=("c4",)), "data.filters: expected Filters, got 'c4'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**kw)


def test_what_a_killed_run_left_half_written_goes(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(100))
    names = [".tokenizer.model.host.7", "main/.near.u32.a.host.8", "raw/main/gs/b/.a.jsonl.gz.host.9"]
    left = [f"{name}.unfinished" for name in names]
    for name in left:
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(b"half")
    (tmp_path / "corpus/.mine.v1.2").write_bytes(b"")
    quiet(make())
    assert not any((tmp_path / "corpus" / name).exists() for name in left)
    assert (tmp_path / "corpus/.mine.v1.2").exists()


def test_copies_of_a_document_leave_room_for_others_in_the_tokenizers_sample(tmp_path):
    texts = sample_texts(300)
    for copied in texts[:8]:  # of high and low rank
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [copied] * 500 + texts))
        source = Jsonl(glob=f"{tmp_path}/a.jsonl")
        reading = Reading(source=source, parts=tuple(source.parts(tmp_path)), invalid_utf8="replace")
        job = ScanJob(reading=reading, sample_bytes=20_000, validation_fraction=0.0, out=tmp_path / "scan.npz")
        job.run()
        sample = job.result().sample
        assert len(set(sample)) == len(sample) and 20_000 <= sum(len(t.encode()) for t in sample) < 21_000


def test_weights_need_not_add_up_to_one_for_the_tokenizers_sample(tmp_path, make):
    write_jsonl(tmp_path / "raw", sample_texts(10))
    sources = {name: Jsonl(glob=f"{tmp_path}/raw/*.jsonl") for name in "ab"}
    tokenizer = SentencePiece(kind="bpe", vocab_size=400, train_bytes=1000)
    for scale in (0.001, 0.25, 10.0):
        data = make(sources=sources, tokenizer=tokenizer, weights={"a": 3 * scale, "b": scale})
        shards = {name: [tuple(source.parts(tmp_path))] for name, source in sources.items()}
        manifest = Manifest(settings=settings(data.corpus, 1), shards=shards, raw=dict.fromkeys(sources), index=None)
        assert [job.sample_bytes for jobs in scan_jobs(data.corpus, manifest).values() for job in jobs] == [750, 250]


def test_a_finished_corpus_may_be_read_only(tmp_path, make, monkeypatch):
    write_jsonl(tmp_path / "raw", sample_texts(100))
    first = quiet(make())
    lock = tmp_path / "corpus/lock"
    lock.unlink()
    lock.mkdir()  # what root, who runs tests, cannot write either
    with pytest.raises(ValueError, match="corpus/lock: expected a file that can be written, got Is a"):
        quiet(make())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert quiet(make()).fingerprint == first.fingerprint
    write_jsonl(tmp_path / "raw", sample_texts(90))
    with pytest.raises(ValueError, match="a file was added, removed or changed"):
        quiet(make())
