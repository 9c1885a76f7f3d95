"""From raw text to token stores, once: read, deduplicate, split, learn a tokenizer, tokenise.

    <path>/tokenizer.model tokenizer.json      the vocabulary and the settings it was learnt with
    <path>/<source>/{train,validation}/        a `Store` each
    <path>/<source>/report.json                what became of everything that was read
    <path>/<source>/work/                      scans and receipts of an unfinished run
    <path>/raw/<source>/                       what a source had to download or build
    <path>/.plan.json                          what several hosts have agreed on (`lm.data.prepare.hosts`)

Two passes over the text, and memory for some 50 bytes a document (`lm.data.documents.near_duplicates` says what
near-duplicates add): the first pass filters and hashes documents, so that duplicates and the split are settled before
any shard is written, and shards can be written in parallel and in any order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.config import Data
from lm.data.corpus import Corpus, check_tokenizer, open_corpus
from lm.data.documents.overlap import Evaluation, OverlapIndex, read_evaluation
from lm.data.made_from import raw_digest, splits
from lm.data.prepare.hosts import Team, help_prepare, is_finished, remove_work, unfinished, wait
from lm.data.prepare.manifest import PLAN, Plan, in_one, scan_jobs, settings, tokenize_job, with_threads
from lm.data.prepare.pool import Workers
from lm.data.prepare.progress import Progress
from lm.data.prepare.report import lines, report_of, write_report
from lm.data.prepare.select import Near, Selection, drop_near_duplicates, signatures_path
from lm.data.prepare.stores import check_left, finish_source, make_tokenizer
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.sources.base import Part, stretch_bytes
from lm.data.sources.files import is_remote
from lm.data.store.splits import SPLITS
from lm.data.store.tokens import Store
from lm.data.tokenizer.open import open_tokenizer, read_prepared
from lm.errors import UserError
from lm.files import Log, locked, open_atomic, remove_temporary


def prepare(
    data: Data, *, force: bool = False, progress: bool = True, log: Log = print, host: int = 0, hosts: int = 1
) -> Corpus:
    """Makes what `open_corpus` opens; what is there already is kept, finished shards of a killed run included. A corpus
    in an object store is only opened.

    force: deletes and makes again the tokenizer and the sources of `data`. progress: a bar on a terminal, else a line
    now and then by `log`. A second process waits for the first. A finished corpus may be read-only. host, hosts: which
    of how many that share `data.path` and see the raw data under the same paths; the result does not depend on it.
    UserError as `open_corpus`, and for raw data that is missing, empty, unreadable or changed.
    """
    path, team = Path(data.path), Team(host=host, hosts=hosts)
    if is_remote(data.path):
        if force or hosts > 1:
            raise UserError(
                f"data.path: expected a local folder to prepare a corpus in, got {data.path!r}; prepare it there, then "
                "copy the folder"
            )
        return open_corpus(data, log)
    if force and hosts > 1:
        raise UserError(
            f"--force --hosts {hosts}: expected one of them, since a host cannot know what another has written anew; "
            f"delete {path} on one host, then start all without --force"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"data.path: expected a folder that can be made, got {e}; name another") from None
    writable = all(os.access(p, os.W_OK) for p in (path, path / "lock") if p.exists())
    if not writable and not force and is_finished(data):  # nothing to do, and no lock to take
        for name in data.sources:
            check_raw(data, name)
        return open_corpus(data)
    with (
        locked(path / f".lock-{host}", log) if hosts > 1 else contextlib.nullcontext(),
        locked(path / "lock", log, shared=hosts > 1),
        Workers(data.workers or os.cpu_count() or 1) as workers,
    ):
        if host:
            help_prepare(data, team, workers, Progress(progress, log), log)
            return open_corpus(data)
        for folder in (path, *(path / name for name in data.sources)):
            remove_temporary(folder.glob(".*"))  # of host 0: others write only to work and the splits
        remove_temporary((path / "raw").rglob(".*"))
        if force:
            _remove(data)
        todo = [n for n in data.sources if not all((path / n / s / "meta.json").is_file() for s in splits(data))]
        for name in data.sources.keys() - set(todo):
            check_raw(data, name)
        if todo or not (path / "tokenizer.model").is_file():
            _prepare(data, todo or list(data.sources), team, workers, Progress(progress, log), log)
        remove_work(data)
        (path / PLAN).unlink(missing_ok=True)
        return open_corpus(data)


def check_raw(data: Data, name: str) -> None:
    """UserError where the raw files of a source are no more what its store was made from."""
    folder = Path(data.path, name, "train")
    raw = raw_digest(data, name)
    if raw is not None and raw != (prepared := Store(folder).meta.raw):
        raise UserError(
            f"{folder}: expected raw files {str(prepared)[:12]} of data.sources[{name!r}], got {raw[:12]}: a file was "
            "added, removed or changed; run `lm prepare --force`"
        )


def _prepare(data: Data, names: list[str], team: Team, workers: Workers, progress: Progress, log: Log) -> None:
    path, began = Path(data.path), time.monotonic()
    have_tokenizer = (path / "tokenizer.model").is_file()
    if have_tokenizer:  # refuse before the work
        check_tokenizer(data, read_prepared(path / "tokenizer.model"), path)
    elif isinstance(data.tokenizer, str):
        open_tokenizer(data.tokenizer)
    shards: dict[str, list[tuple[Part, ...]]] = {}
    for name in names:
        log(f"{name}: finding raw text of {type(data.sources[name]).__name__}")
        data.sources[name].fetch(path / "raw" / name, log)
        shards[name] = _shards(data.sources[name].parts(path / "raw" / name))
    evaluations, index = _read_evaluations(data, log)
    plan = Plan(
        settings=settings(data, team.hosts),
        shards=shards,
        raw={name: raw_digest(data, name) for name in names},
        index=None if index is None else index.name,
    )
    scans = scan_jobs(data, plan)
    resumed = any(j.done() for j in in_one(scans))
    if team.hosts > 1:
        plan.save(path)
    mine = team.share(in_one(scans))
    with progress("reading", sum(j.n_bytes for j in mine)) as tick:
        workers.run(mine, tick)
    wait(unfinished(in_one(scans), "scans"), log)
    selections = {name: Selection(name, jobs, data.validation_fraction) for name, jobs in scans.items()}
    near = _drop_near_duplicates(data, selections, log)
    reports = {}
    for name, selection in selections.items():
        reports[name] = report_of(selection, near, data.overlap, evaluations)
        write_report(path / name, reports[name])
        for line in lines(selection, reports[name]):
            log(line)
    for selection in selections.values():
        check_left(data, selection)

    if not have_tokenizer:
        make_tokenizer(data, scans, log)
    tokenizer = read_prepared(path / "tokenizer.model")
    jobs: dict[str, list[TokenizeJob]] = {}
    for name, selection in selections.items():
        labels = selection.by_shard()
        if team.hosts > 1:
            with open_atomic(plan.labels_path(path, name)) as f:
                arrays: dict[str, Any] = {str(i): x for i, x in enumerate(labels)}
                np.savez(f, **arrays)
        found = enumerate(zip(scans[name], labels, selection.scans, strict=True))
        jobs[name] = [tokenize_job(data, name, i, job, x, scan.digest(), tokenizer) for i, (job, x, scan) in found]
    own = with_threads(team.share(in_one(jobs)), workers.n)
    with progress("tokenising", sum(j.n_bytes for j in own)) as tick:
        workers.run(own, tick)
    wait(unfinished(in_one(jobs), "shards"), log)
    for name in names:
        finish_source(data, name, jobs[name], selections[name], tokenizer, log)
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
    enough, held = stretch_bytes(sum(p.n_bytes for p in parts)), 0
    for part in parts:
        if held >= enough:
            shards.append([])
            held = 0
        shards[-1].append(part)
        held += part.n_bytes
    return [tuple(s) for s in shards]


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
