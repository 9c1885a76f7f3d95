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

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

from lm.data.corpus import (
    Corpus,
    Data,
    check_raw,
    check_tokenizer,
    digest,
    made_from,
    open_corpus,
    raw_digest,
    splits,
    tokenizer_made_from,
)
from lm.data.overlap import Evaluation, OverlapIndex, read_evaluation
from lm.data.progress import Log, Progress, locked
from lm.data.report import lines, report_of, write_report
from lm.data.schedule import as_phases, mean_weight
from lm.data.select import Near, Selection, drop_near_duplicates, signatures_path
from lm.data.sources import Part, stretch_bytes
from lm.data.store import VERSION, StoreMeta, docs_name, dtype_for, tokens_name, write_atomic, write_meta
from lm.data.tokenizer import SentencePiece, Tokenizer
from lm.data.work import SPLITS, Reading, ScanJob, TokenizeJob, run_jobs
from lm.errors import UserError


def prepare(data: Data, *, force: bool = False, progress: bool = True, log: Log = print) -> Corpus:
    """Makes what `open_corpus` opens; what is there already is kept, finished shards of a killed run included.

    force: deletes and makes again the tokenizer and the sources of `data`. progress: a bar on a terminal, else a line
    now and then by `log`. A second process waits for the first. UserError as `open_corpus`, and for raw data that is
    missing, empty, unreadable or changed.
    """
    path = Path(data.path)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path / "lock", log):
        if force:
            _remove(data)
        todo = [n for n in data.sources if not all((path / n / s / "meta.json").is_file() for s in splits(data))]
        for name in data.sources.keys() - set(todo):
            check_raw(data, name)
        if todo or not (path / "tokenizer.model").is_file():
            _prepare(data, todo or list(data.sources), Progress(progress, log), log)
        return open_corpus(data)


def _prepare(data: Data, names: list[str], progress: Progress, log: Log) -> None:
    path, began = Path(data.path), time.monotonic()
    have_tokenizer = (path / "tokenizer.model").is_file()
    if have_tokenizer:  # refuse before the work
        check_tokenizer(data, Tokenizer.load(path / "tokenizer.model"))
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
            key = digest([VERSION, made_from(data, name), raw_digest(data, name), evaluations, parts, sample])
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
        if split in splits(data) and not (selection.labels == label).any():
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
    settings = {"made_from": tokenizer_made_from(data), "fingerprint": tokenizer.fingerprint}
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
            key=digest([hashlib.sha256(label.tobytes()).hexdigest(), scan.result().digest(), tokenizer.fingerprint]),
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
    for split in reversed(splits(data)):
        shards = tuple(r[split] for r in results)
        write_meta(
            folder / split,
            StoreMeta(
                dtype=dtype_for(tokenizer.vocab_size),
                tokenizer=tokenizer.fingerprint,
                corpus=corpus,
                made_from=made_from(data, name),
                raw=raw_digest(data, name),
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
    if "validation" not in splits(data):
        shutil.rmtree(folder / "validation", ignore_errors=True)
    shutil.rmtree(folder / "work")


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
