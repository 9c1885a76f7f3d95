"""From raw text to token stores, once: read, deduplicate, split, learn a tokenizer, tokenise.

    <path>/tokenizer.model tokenizer.json      the vocabulary and the settings it was learnt with
    <path>/<source>/{train,validation}/        a `Store` each
    <path>/<source>/report.json                what became of everything that was read
    <path>/<source>/work/                      scans and receipts of an unfinished run
    <path>/raw/<source>/                       what a source had to download or build

Two passes over the text, and memory for some 50 bytes a document (`lm.data.dedup` says what near-duplicates add): the
first pass filters and hashes documents, so that duplicates and the split are settled before any shard is written, and
shards can be written in parallel and in any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
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

from lm.data.dedup import NearDuplicates
from lm.data.exclude import Exclude, ExcludeDocuments
from lm.data.filters import Filter
from lm.data.overlap import Evaluation, Overlap, OverlapIndex, read_evaluation
from lm.data.report import lines, report_of, write_report
from lm.data.schedule import Phase, as_phases, mean_weight
from lm.data.select import Near, Selection, drop_near_duplicates, signatures_path
from lm.data.sources import MAX_DOCUMENT_BYTES, Part, Source, stretch_bytes
from lm.data.store import VERSION, Store, StoreMeta, docs_name, dtype_for, tokens_name, write_atomic, write_meta
from lm.data.tokenizer import SentencePiece, Tokenizer
from lm.data.work import SPLITS, Reading, ScanJob, TokenizeJob, run_jobs
from lm.errors import UserError

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on.

    path: folder of the prepared corpus, on a local disk. sources: by name, which is also their folder. tokenizer: how
    to train one, or the path of a .model. weights: shares by source, for the whole run or in phases;
    None: all epochs end together. weigh: shares of examples, or of tokens, which differs where packed rows are not
    full. plan: rows are windows of the text, or whole documents by best fit (`lm.data.pack`). epochs: how often a
    source may be read; none for it: without limit. when_exhausted: a run that needs more is refused, or other sources
    take over while there are any. exclude: documents and examples to leave out (`lm.data.exclude`). batch_size:
    global, in sequences. validation_fraction: share of documents, chosen by hash of their content; 0: none.
    invalid_utf8: bytes that are no UTF-8 become U+FFFD and their documents are counted, or are refused. seed: of the
    order only. workers: processes of `prepare`; None: one per CPU.

    on_error: a line that is no JSON, a missing field, a file that breaks off, a document above max_document_bytes, and
    UTF-8 that is refused, stop `prepare`; or they are left out and counted in the report. filters: in order, on each
    document. near_duplicates: of what is left, all but the first go. overlap: documents that hold text of evaluations
    are counted, or go.
    """

    path: str
    sources: dict[str, Source]
    tokenizer: SentencePiece | str
    weights: dict[str, float] | tuple[Phase, ...] | None = None
    weigh: Literal["examples", "tokens"] = "examples"
    plan: Literal["windows", "best_fit"] = "windows"
    epochs: dict[str, float] | None = None
    when_exhausted: Literal["refuse", "hand_over"] = "refuse"
    exclude: tuple[Exclude, ...] = ()
    seq_len: int
    batch_size: int
    validation_fraction: float = 0.01
    invalid_utf8: Literal["replace", "error"] = "replace"
    on_error: Literal["refuse", "skip"] = "refuse"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    filters: tuple[Filter, ...] = ()
    near_duplicates: NearDuplicates | None = None
    overlap: Overlap | None = None
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
        if self.weights is not None:
            as_phases(self.weights, self.sources, "data.weights")
        for name, epochs in (self.epochs or {}).items():
            if name not in self.sources or not 0 < epochs < math.inf:
                raise UserError(
                    f"data.epochs: expected positive numbers for some of {sorted(self.sources)}, got {name!r}: {epochs}"
                )
        for e in self.exclude:
            if isinstance(e, ExcludeDocuments) and e.source not in self.sources:
                raise UserError(f"data.exclude: expected a source of {sorted(self.sources)}, got {e.source!r}")
        for name, known in (
            ("weigh", ("examples", "tokens")),
            ("plan", ("windows", "best_fit")),
            ("when_exhausted", ("refuse", "hand_over")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"data.{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name, value in (("seq_len", self.seq_len), ("batch_size", self.batch_size), ("workers", self.workers or 1)):
            if value < 1:
                raise UserError(f"data.{name}: expected at least 1, got {value}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction: expected 0 <= x < 1, got {self.validation_fraction}")
        if self.invalid_utf8 not in ("replace", "error"):
            raise UserError(f"data.invalid_utf8: expected 'replace' or 'error', got {self.invalid_utf8!r}")
        if self.on_error not in ("refuse", "skip"):
            raise UserError(f"data.on_error: expected 'refuse' or 'skip', got {self.on_error!r}")
        if self.max_document_bytes < 1:
            raise UserError(f"data.max_document_bytes: expected at least 1, got {self.max_document_bytes}")
        for f in self.filters:
            if not isinstance(f, Filter):
                raise UserError(f"data.filters: expected Filters, got {f!r}; write e.g. (Length(min_chars=200),)")


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
        data.sources[name].fetch(path / "raw" / name, log)
        shards[name] = _shards(data.sources[name].parts(path / "raw" / name))
    evaluations, index = _read_evaluations(data, log)
    scans = _scan_jobs(data, shards, index)
    workers = data.workers or os.cpu_count() or 1
    resumed = any(j.done() for jobs in scans.values() for j in jobs)
    with progress("reading", sum(j.n_bytes for jobs in scans.values() for j in jobs)) as tick:
        run_jobs([j for jobs in scans.values() for j in jobs], workers, tick)
    selections = {name: Selection(name, jobs, data.validation_fraction) for name, jobs in scans.items()}
    near = _drop_near_duplicates(data, selections, log)
    reports = {}
    for name, selection in selections.items():
        reports[name] = report_of(selection, near, data.overlap, evaluations)
        write_report(path / name, reports[name])
        for line in lines(selection, reports[name]):
            log(line)
    for selection in selections.values():
        _check_left(data, selection)

    if not have_tokenizer:
        _make_tokenizer(data, scans, log)
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    jobs = {name: _tokenize_jobs(data, name, scans[name], selections[name].by_shard(), tokenizer) for name in names}
    with progress("tokenising", sum(j.n_bytes for named in jobs.values() for j in named)) as tick:
        run_jobs([j for named in jobs.values() for j in named], workers, tick)
    for name in names:
        _finish(data, name, jobs[name], selections[name], tokenizer, log)
    if index is not None:
        index.unlink()
    seconds, n_bytes = time.monotonic() - began, sum(r["text_bytes"] for r in reports.values())
    rate = "" if resumed else f", {n_bytes / 1e6:.1f} MB of text at {n_bytes / 1e6 / seconds:.1f} MB/s"
    log(f"{path}: prepared in {seconds:.0f} s{rate}")


def _read_evaluations(data: Data, log: Log) -> tuple[dict[str, Evaluation], Path | None]:
    """The evaluations to look for, and the file of their n-grams for the workers."""
    if data.overlap is None:
        return {}, None
    raw = Path(data.path, "raw")
    found = {}
    for name, source in data.overlap.files.items():
        cache = raw / f"overlap:{name}"  # no source can be called that
        source.fetch(cache, log)
        found[name] = read_evaluation(name, source, data.overlap.ngram, cache)
        log(f"overlap: {name}: {len(found[name].grams)} n-grams of {found[name].n_documents} documents")
    grams = hashlib.sha256(b"".join(hashlib.sha256(e.grams.tobytes()).digest() for e in found.values())).hexdigest()
    index = raw / f"overlap:index-{grams[:16]}.npz"
    raw.mkdir(parents=True, exist_ok=True)
    OverlapIndex.of(found, data.overlap.ngram).save(index)
    return found, index


def _drop_near_duplicates(data: Data, selections: dict[str, Selection], log: Log) -> Near | None:
    if data.near_duplicates is None:
        return None
    n = sum(s.n_kept for s in selections.values())
    log(f"near-duplicates: comparing {n} documents, {n * data.near_duplicates.size * 4 / 1e6:.0f} MB of signatures")
    return drop_near_duplicates(selections, list(data.sources), Path(data.path), data.near_duplicates)


def _shards(parts: list[Part]) -> list[tuple[Part, ...]]:
    """Consecutive parts, joined until a shard is worth its file."""
    shards: list[list[Part]] = [[]]
    enough = stretch_bytes(sum(p.n_bytes for p in parts))
    for part in parts:
        if sum(p.n_bytes for p in shards[-1]) >= enough:
            shards.append([])
        shards[-1].append(part)
    return [tuple(s) for s in shards]


def _scan_jobs(data: Data, shards: dict[str, list[tuple[Part, ...]]], index: Path | None) -> dict[str, list[ScanJob]]:
    sample_bytes = data.tokenizer.train_bytes if isinstance(data.tokenizer, SentencePiece) else 0
    size = {name: sum(p.n_bytes for parts in named for p in parts) for name, named in shards.items()}
    share: dict[str, float] = {**size}
    if data.weights:
        phases = as_phases(data.weights, data.sources)
        share = {n: mean_weight(phases, n) for n in shards}
    jobs: dict[str, list[ScanJob]] = {}
    for name, named in shards.items():
        work = Path(data.path, name, "work")
        work.mkdir(parents=True, exist_ok=True)
        wanted = sample_bytes * share[name] / max(1, sum(share.values()))
        jobs[name] = []
        for i, parts in enumerate(named):
            sample = -int(-wanted * sum(p.n_bytes for p in parts) // max(1, size[name]))
            evaluations = None if index is None else index.name
            key = _digest([VERSION, _made_from(data, name), _raw(data, name), evaluations, parts, sample])
            jobs[name].append(
                ScanJob(
                    reading=Reading(
                        source=data.sources[name],
                        parts=parts,
                        invalid_utf8=data.invalid_utf8,
                        on_error=data.on_error,
                        max_document_bytes=data.max_document_bytes,
                        filters=data.filters,
                    ),
                    near=data.near_duplicates,
                    overlap=index,
                    remove_overlap=data.overlap is not None and data.overlap.remove,
                    sample_bytes=sample,
                    validation_fraction=data.validation_fraction,
                    out=work / f"scan-{i:05d}-{key[:12]}.npz",
                )
            )
    return jobs


def _check_left(data: Data, selection: Selection) -> None:
    name, n, left_out = selection.name, selection.n_kept, selection.left_out()
    if n == 0:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        only_empty = not left_out.keys() - {"empty", "duplicates"}
        raise UserError(
            f"data.sources[{name!r}]: expected text, got {len(selection.labels)} documents, "
            + ("all empty; check the source" if only_empty else f"none left: {why}; see {data.path}/{name}/report.json")
        )
    for split, label in SPLITS.items():
        if split in _splits(data) and not (selection.labels == label).any():
            raise UserError(
                f"data.sources[{name!r}]: expected documents in {split}, got none: all of {n} fell elsewhere with "
                f"validation_fraction={data.validation_fraction}; change it, or cut the text into more documents"
            )


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
    selection: Selection,
    tokenizer: Tokenizer,
    log: Log,
) -> None:
    results, counts = [j.result() for j in jobs], selection.counts()
    corpus = hashlib.sha256(selection.hashes.astype("<u8").tobytes()).hexdigest()
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
                raw=_raw(data, name),
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
    """The settings that decide what is in a store. One that is not set is None, which an older store need not have."""
    settings = {
        "source": _described(data.sources[name]),
        "validation_fraction": data.validation_fraction,
        "invalid_utf8": data.invalid_utf8,
        "skip_errors": {"max_document_bytes": data.max_document_bytes} if data.on_error == "skip" else None,
        "filters": [_described(f) for f in data.filters] or None,
        "near_duplicates": data.near_duplicates and _described(data.near_duplicates),
        "overlap": data.overlap and _described(data.overlap),
    }
    return json.loads(json.dumps(settings))


def _described(value: Any) -> Any:
    """A dataclass as a dict with the name of its class, and of the classes inside."""
    if isinstance(value, dict):
        return {k: _described(v) for k, v in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    return {"type": type(value).__name__} | {
        f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)
    }


def _tokenizer_made_from(data: Data) -> dict[str, Any]:
    return dataclasses.asdict(data.tokenizer) if isinstance(data.tokenizer, SentencePiece) else {"path": data.tokenizer}


def _raw(data: Data, name: str) -> str | None:
    """Of the raw files and those that filters read; None when that cannot be told or some are not here."""
    identity = data.sources[name].identity()
    paths = [Path(p) for f in data.filters for p in f.files()]
    if identity is None or not all(p.is_file() for p in paths):
        return None
    if not paths:
        return _digest(identity)
    return _digest([identity, [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]])


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
    raw = _raw(data, name)
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
        for file in (path / name / "report.json", signatures_path(path / name)):
            file.unlink(missing_ok=True)
    for name in data.overlap.files if data.overlap else ():
        shutil.rmtree(path / "raw" / f"overlap:{name}", ignore_errors=True)


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
