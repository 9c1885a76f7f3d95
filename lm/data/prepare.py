"""From raw text to token stores, once: read, deduplicate, split, learn a tokenizer, tokenise.

    <path>/tokenizer.model tokenizer.json      the vocabulary and the settings it was learnt with
    <path>/<source>/{train,validation}/        a `Store` each
    <path>/<source>/work/                      scans and receipts of an unfinished run
    <path>/raw/<source>/                       what a source had to download or build

Two passes over the text, and memory for 8 bytes a document: the first pass hashes documents, so that duplicates and the
split are settled before any shard is written, and shards can be written in parallel and in any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lm.data.sources import Part, Source, stretch_bytes
from lm.data.store import VERSION, Store, StoreMeta, docs_name, dtype_for, tokens_name, write_atomic, write_meta
from lm.data.tokenizer import SentencePiece, Tokenizer
from lm.data.work import DROP, SPLITS, TRAIN, VALIDATION, Reading, ScanJob, TokenizeJob, in_validation, run_jobs
from lm.errors import UserError

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on.

    path: folder of the prepared corpus, on a local disk. sources: by name, which is also their folder. tokenizer: how
    to train one, or the path of a .model. weights: share of examples by source; None: as their tokens. batch_size:
    global, in sequences. validation_fraction: share of documents, chosen by hash of their content; 0: none.
    invalid_utf8: bytes that are no UTF-8 become U+FFFD and their documents are counted, or are refused. seed: of the
    order only. workers: processes of `prepare`; None: one per CPU.
    """

    path: str
    sources: dict[str, Source]
    tokenizer: SentencePiece | str
    weights: dict[str, float] | None = None
    seq_len: int
    batch_size: int
    validation_fraction: float = 0.01
    invalid_utf8: Literal["replace", "error"] = "replace"
    seed: int = 0
    workers: int | None = None

    def __post_init__(self):
        if not self.sources:
            raise UserError("data.sources: expected at least one, got none; add e.g. {'stdlib': Stdlib()}")
        if "://" in self.path:
            raise UserError(
                f"data.path: expected a local folder, since stores are memory-mapped, got {self.path!r}; copy the "
                "prepared folder to each host's disk"
            )
        for name, source in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or name in ("raw", "lock", "tokenizer.model"):
                raise UserError(f"data.sources: expected names fit for a folder, got {name!r}; rename it")
            if not isinstance(source, Source):
                raise UserError(f"data.sources[{name!r}]: expected a Source, got {source!r}")
        if self.weights is not None and set(self.weights) != set(self.sources):
            raise UserError(
                f"data.weights: expected one for each of {sorted(self.sources)}, got {sorted(self.weights)}"
            )
        for name, value in (("seq_len", self.seq_len), ("batch_size", self.batch_size), ("workers", self.workers or 1)):
            if value < 1:
                raise UserError(f"data.{name}: expected at least 1, got {value}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction: expected 0 <= x < 1, got {self.validation_fraction}")
        if self.invalid_utf8 not in ("replace", "error"):
            raise UserError(f"data.invalid_utf8: expected 'replace' or 'error', got {self.invalid_utf8!r}")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus. validation: empty with validation_fraction=0. fingerprint: of tokenizer and each store."""

    tokenizer: Tokenizer
    train: dict[str, Store]
    validation: dict[str, Store]
    fingerprint: dict[str, str]


def open_corpus(data: Data) -> Corpus:
    """The corpus at `data.path`. UserError when it is unfinished, damaged in size, or made with other settings."""
    path = Path(data.path)
    if not (path / "tokenizer.model").is_file():
        raise UserError(f"{path}: expected a prepared corpus, got no tokenizer.model there; run `lm prepare`")
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    _check_tokenizer(data, tokenizer)
    stores: dict[str, dict[str, Store]] = {split: {} for split in SPLITS}
    for name in data.sources:
        for split in _splits(data):
            folder = path / name / split
            if not (folder / "meta.json").is_file():
                raise UserError(f"{folder}: expected a prepared store, got no meta.json there; run `lm prepare`")
            stores[split][name] = store = Store(folder)
            _check_store(data, name, store, tokenizer)
    fingerprint = {f"{n}/{split}": s.fingerprint for split, named in stores.items() for n, s in named.items()}
    return Corpus(tokenizer=tokenizer, fingerprint={"tokenizer": tokenizer.fingerprint} | fingerprint, **stores)


def prepare(data: Data, *, force: bool = False, progress: bool = True, log: Log = print) -> Corpus:
    """Makes what `open_corpus` opens; what is there already is kept, finished shards of a killed run included.

    force: deletes and makes again the tokenizer and the sources of `data`. progress: a bar on a terminal, else a line
    now and then by `log`. A second process waits for the first. UserError as `open_corpus`, and for raw data that is
    missing, empty, unreadable or changed.
    """
    path = Path(data.path)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path / "lock", log):
        if force:
            _remove(data)
        todo = [n for n in data.sources if not all((path / n / s / "meta.json").is_file() for s in _splits(data))]
        for name in data.sources.keys() - set(todo):
            _check_raw(data, name)
        if todo or not (path / "tokenizer.model").is_file():
            _prepare(data, todo or list(data.sources), _Progress(progress, log), log)
        return open_corpus(data)


def _prepare(data: Data, names: list[str], progress: _Progress, log: Log) -> None:
    path, began = Path(data.path), time.monotonic()
    have_tokenizer = (path / "tokenizer.model").is_file()
    if have_tokenizer:  # refuse before the work
        _check_tokenizer(data, Tokenizer.load(path / "tokenizer.model"))
    shards: dict[str, list[tuple[Part, ...]]] = {}
    for name in names:
        log(f"{name}: finding raw text of {type(data.sources[name]).__name__}")
        shards[name] = _shards(data.sources[name].parts(path / "raw" / name))
    scans = _scan_jobs(data, shards)
    workers = data.workers or os.cpu_count() or 1
    with progress("reading", sum(j.n_bytes for jobs in scans.values() for j in jobs)) as tick:
        run_jobs([j for jobs in scans.values() for j in jobs], workers, tick)
    labels = {name: _label(data, name, jobs, log) for name, jobs in scans.items()}

    if not have_tokenizer:
        _make_tokenizer(data, scans, log)
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    jobs = {name: _tokenize_jobs(data, name, scans[name], labels[name][0], tokenizer) for name in names}
    with progress("tokenising", sum(j.n_bytes for named in jobs.values() for j in named)) as tick:
        run_jobs([j for named in jobs.values() for j in named], workers, tick)
    for name in names:
        _finish(data, name, jobs[name], *labels[name][1:], tokenizer, log)
    log(f"{path}: prepared in {time.monotonic() - began:.0f} s")


def _shards(parts: list[Part]) -> list[tuple[Part, ...]]:
    """Consecutive parts, joined until a shard is worth its file."""
    shards: list[list[Part]] = [[]]
    enough = stretch_bytes(sum(p.n_bytes for p in parts))
    for part in parts:
        if sum(p.n_bytes for p in shards[-1]) >= enough:
            shards.append([])
        shards[-1].append(part)
    return [tuple(s) for s in shards]


def _scan_jobs(data: Data, shards: dict[str, list[tuple[Part, ...]]]) -> dict[str, list[ScanJob]]:
    sample_bytes = data.tokenizer.train_bytes if isinstance(data.tokenizer, SentencePiece) else 0
    size = {name: sum(p.n_bytes for parts in named for p in parts) for name, named in shards.items()}
    share = {n: data.weights[n] for n in shards} if data.weights else size
    jobs: dict[str, list[ScanJob]] = {}
    for name, named in shards.items():
        work = Path(data.path, name, "work")
        work.mkdir(parents=True, exist_ok=True)
        wanted = sample_bytes * share[name] / max(1, sum(share.values()))
        jobs[name] = []
        for i, parts in enumerate(named):
            sample = -int(-wanted * sum(p.n_bytes for p in parts) // max(1, size[name]))
            key = _digest([VERSION, _made_from(data, name), _raw(data.sources[name]), parts, sample])
            jobs[name].append(
                ScanJob(
                    reading=Reading(source=data.sources[name], parts=parts, invalid_utf8=data.invalid_utf8),
                    sample_bytes=sample,
                    validation_fraction=data.validation_fraction,
                    out=work / f"scan-{i:05d}-{key[:12]}.npz",
                )
            )
    return jobs


def _label(data: Data, name: str, jobs: list[ScanJob], log: Log) -> tuple[list[np.ndarray], dict[str, int], str]:
    """Labels of the documents of each shard, the counts for the meta, and the fingerprint of the corpus."""
    scans = [j.result()[:3] for j in jobs]
    hashes = np.concatenate([s[0] for s in scans])
    labels = np.where(in_validation(hashes, data.validation_fraction), VALIDATION, TRAIN).astype(np.uint8)
    empty = np.concatenate([s[1] for s in scans])
    labels[empty] = DROP
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    labels[~first] = DROP
    counts = {
        "documents": len(hashes),
        "empty": int(empty.sum()),
        "duplicates": int((~first & ~empty).sum()),
        "invalid_utf8": sum(s[2] for s in scans),
    }
    log(f"{name}: " + ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in counts.items()))
    n = int((labels != DROP).sum())
    if n == 0:
        raise UserError(
            f"data.sources[{name!r}]: expected text, got {len(hashes)} documents, all empty; check the source"
        )
    for split, label in SPLITS.items():
        if split in _splits(data) and not (labels == label).any():
            raise UserError(
                f"data.sources[{name!r}]: expected documents in {split}, got none: all of {n} fell elsewhere with "
                f"validation_fraction={data.validation_fraction}; change it, or cut the text into more documents"
            )
    sizes = np.cumsum([len(s[0]) for s in scans])[:-1]
    return np.split(labels, sizes), counts, hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()


def _make_tokenizer(data: Data, scans: dict[str, list[ScanJob]], log: Log) -> None:
    path = Path(data.path)
    if isinstance(data.tokenizer, str):
        tokenizer = Tokenizer.load(data.tokenizer)
    else:
        sample = list(dict.fromkeys(text for jobs in scans.values() for j in jobs for text in j.result().sample))
        n_bytes, began = sum(len(t.encode()) for t in sample), time.monotonic()
        log(f"tokenizer: learning {data.tokenizer.vocab_size} {data.tokenizer.kind} pieces from {n_bytes / 1e6:.1f} MB")
        tokenizer = data.tokenizer.train(sample)
        log(f"tokenizer: learnt in {time.monotonic() - began:.1f} s")
    settings = {"made_from": _tokenizer_made_from(data), "fingerprint": tokenizer.fingerprint}
    write_atomic(path / "tokenizer.json", json.dumps(settings, indent=1).encode())
    write_atomic(path / "tokenizer.model", tokenizer.to_bytes())


def _tokenize_jobs(
    data: Data, name: str, scans: list[ScanJob], labels: list[np.ndarray], tokenizer: Tokenizer
) -> list[TokenizeJob]:
    path = Path(data.path)
    return [
        TokenizeJob(
            reading=scan.reading,
            scan=scan.out,
            labels=label,
            tokenizer=path / "tokenizer.model",
            dtype=dtype_for(tokenizer.vocab_size),
            folder=path / name,
            shard=i,
            out=path / name / "work" / f"shard-{i:05d}.json",
            key=_digest([hashlib.sha256(label.tobytes()).hexdigest(), scan.result().digest(), tokenizer.fingerprint]),
        )
        for i, (scan, label) in enumerate(zip(scans, labels, strict=True))
    ]


def _finish(
    data: Data,
    name: str,
    jobs: list[TokenizeJob],
    counts: dict[str, int],
    corpus: str,
    tokenizer: Tokenizer,
    log: Log,
) -> None:
    results = [j.result() for j in jobs]
    folder = Path(data.path, name)
    for split in reversed(_splits(data)):
        shards = tuple(r[split] for r in results)
        write_meta(
            folder / split,
            StoreMeta(
                dtype=dtype_for(tokenizer.vocab_size),
                tokenizer=tokenizer.fingerprint,
                corpus=corpus,
                made_from=_made_from(data, name),
                raw=_raw(data.sources[name]),
                counts=counts,
                shards=shards,
            ),
        )
        ours = {"meta.json", *(name(i) for i in range(len(shards)) for name in (tokens_name, docs_name))}
        for path in (folder / split).iterdir():
            if path.name not in ours:  # half-written by a run that was killed
                path.unlink()
        n_tokens, n_bytes = sum(s.n_tokens for s in shards), sum(s.n_bytes for s in shards)
        n_documents = sum(s.n_documents for s in shards)
        log(f"{name}/{split}: {n_documents} documents, {n_tokens} tokens, {n_bytes / n_tokens:.2f} bytes a token")
    if "validation" not in _splits(data):
        shutil.rmtree(folder / "validation", ignore_errors=True)
    shutil.rmtree(folder / "work")


def _splits(data: Data) -> list[str]:
    return list(SPLITS) if data.validation_fraction else ["train"]


def _made_from(data: Data, name: str) -> dict[str, Any]:
    source = data.sources[name]
    fields = {"type": type(source).__name__} | dataclasses.asdict(source)
    settings = {"source": fields, "validation_fraction": data.validation_fraction, "invalid_utf8": data.invalid_utf8}
    return json.loads(json.dumps(settings))


def _tokenizer_made_from(data: Data) -> dict[str, Any]:
    return dataclasses.asdict(data.tokenizer) if isinstance(data.tokenizer, SentencePiece) else {"path": data.tokenizer}


def _raw(source: Source) -> str | None:
    identity = source.identity()
    return None if identity is None else _digest(identity)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_tokenizer(data: Data, tokenizer: Tokenizer) -> None:
    path = Path(data.path, "tokenizer.model")
    if isinstance(data.tokenizer, str):
        if Path(data.tokenizer).is_file() and (wanted := Tokenizer.load(data.tokenizer).fingerprint):
            if wanted != tokenizer.fingerprint:
                raise UserError(
                    f"{path}: expected tokenizer {data.tokenizer} ({wanted[:12]}), got {tokenizer.fingerprint[:12]}; "
                    "set data.path to another folder or run `lm prepare --force`"
                )
        return
    settings = path.with_name("tokenizer.json")
    saved = json.loads(settings.read_bytes()) if settings.is_file() else {}
    _same(f"{path}: tokenizer", _tokenizer_made_from(data), saved.get("made_from"))
    if saved["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{path}: expected fingerprint {saved['fingerprint'][:12]}, got {tokenizer.fingerprint[:12]}; "
            "copy it again or run `lm prepare --force`"
        )


def _check_store(data: Data, name: str, store: Store, tokenizer: Tokenizer) -> None:
    if store.meta.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{store.path}: expected tokens of tokenizer {tokenizer.fingerprint[:12]}, got of "
            f"{store.meta.tokenizer[:12]}; delete {store.path.parent} and run `lm prepare`"
        )
    _same(f"{store.path}", _made_from(data, name), store.meta.made_from)


def _check_raw(data: Data, name: str) -> None:
    folder = Path(data.path, name, "train")
    raw = _raw(data.sources[name])
    if raw is not None and raw != (made_from := Store(folder).meta.raw):
        raise UserError(
            f"{folder}: expected raw files {str(made_from)[:12]} of data.sources[{name!r}], got {raw[:12]}: a file was "
            "added, removed or changed; run `lm prepare --force`"
        )


def _same(what: str, expected: dict | None, got: dict | None, at: str = "") -> None:
    for key in [*(expected or {}), *(got or {})]:
        a, b = (expected or {}).get(key), (got or {}).get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _same(what, a, b, f"{at}{key}.")
        elif a != b:
            raise UserError(
                f"{what}: expected {at}{key}={a!r} as in the config, got one made with {b!r}; set data.path to another "
                "folder or run `lm prepare --force`"
            )


def _remove(data: Data) -> None:
    path = Path(data.path)
    for name in ("tokenizer.model", "tokenizer.json"):
        (path / name).unlink(missing_ok=True)
    for name in data.sources:
        for folder in (*SPLITS, "work"):
            shutil.rmtree(path / name / folder, ignore_errors=True)
        shutil.rmtree(path / "raw" / name, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Waits for the process that holds the file. The kernel frees it when that one ends, however it ends."""
    with open(path, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            log(f"{path}: waiting for process {f.read().strip() or '?'}, which prepares this folder")
            fcntl.flock(f, fcntl.LOCK_EX)
        f.truncate(0)
        f.write(f"{os.getpid()} on {os.uname().nodename}")
        f.flush()
        yield


class _Progress:
    """with progress("reading", total_bytes) as tick: tick(n_bytes)."""

    def __init__(self, wanted: bool, log: Log):
        self._wanted, self._log = wanted, log

    @contextlib.contextmanager
    def __call__(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        if self._wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (
                "{task.description}",
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(what, total=total)
                yield lambda n: bar.advance(task, n)
            return
        done, said = 0, time.monotonic()

        def tick(n):
            nonlocal done, said
            done += n
            if self._wanted and time.monotonic() - said > 10:
                said = time.monotonic()
                self._log(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        yield tick
