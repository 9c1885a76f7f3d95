"""From raw text to token stores, once: read, deduplicate, split, learn a tokenizer, tokenise.

What lies where in the folder of a corpus is in `lm.data.folder`.

Two passes over the text, and memory for some 50 bytes a document (`lm.data.documents.near_duplicates` says what
near-duplicates add): the first pass filters and hashes documents, so that duplicates and the split are settled before
any shard is written, and shards can be written in parallel and in any order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from typing import Any

import numpy as np

from lm.data.config import Data
from lm.data.corpus import Corpus
from lm.data.documents.overlap import Evaluation, Overlap, OverlapIndex, read_evaluation
from lm.data.prepare import raw_files
from lm.data.prepare.hosts import help_prepare
from lm.data.prepare.manifest import Manifest, flatten, scan_jobs, settings, tokenize_job, with_threads
from lm.data.prepare.pool import Workers
from lm.data.prepare.preparation import Preparation, Team
from lm.data.prepare.progress import Progress
from lm.data.prepare.report import lines, report_of, write_report
from lm.data.prepare.select import Selection, drop_near_duplicates
from lm.data.prepare.state import check_raw, clear, is_finished, remove_work
from lm.data.prepare.stores import check_left, check_text, finish_source, known_tokenizer, make_tokenizer
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.sources.base import Part, stretch_bytes
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.open import open_tokenizer
from lm.errors import UserError
from lm.files import Log, is_remote, locked, open_atomic
from lm.system_errors import system_errors


@system_errors()
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
    spec, team = data.corpus, Team(host=host, hosts=hosts)
    if is_remote(spec.path):
        if force or hosts > 1:
            raise UserError(
                f"data.path: expected a local folder to prepare a corpus in, got {spec.path!r}; prepare it there, then "
                "copy the folder"
            )
        return Corpus.open(spec, log)
    folder = spec.folder
    if force and hosts > 1:
        raise UserError(
            f"--force --hosts {hosts}: expected one of them, since a host cannot know what another has written anew; "
            f"delete {folder.path} on one host, then start all without --force"
        )
    if isinstance(spec.tokenizer, str) and not folder.path.exists():
        open_tokenizer(spec.tokenizer)  # refuses one that is not there before anything is made
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"data.path: expected a folder that can be made, got {e}; name another") from None
    writable = all(os.access(p, os.W_OK) for p in (folder.path, folder.lock) if p.exists())
    if not writable and not force and is_finished(spec):  # nothing to do, and no lock to take
        check_raw(spec, spec.sources, data.workers or os.cpu_count() or 1, log)
        return Corpus.open(spec, log)
    with (
        # A second command with this number waits.
        locked(folder.lock_of_host(host), log) if hosts > 1 else contextlib.nullcontext(),
        locked(folder.lock, log, shared=hosts > 1),  # one without --hosts keeps all of them out
        Workers(data.workers or os.cpu_count() or 1) as workers,  # started by the first jobs that are more than one
    ):
        p = Preparation(spec=spec, team=team, workers=workers, progress=Progress(progress, log), log=log)
        if host:
            help_prepare(p)
        else:
            if names := clear(p, force):
                _prepare(p, names)
            remove_work(spec)
            folder.manifest.unlink(missing_ok=True)
        return Corpus.open(spec, log)


def _prepare(p: Preparation, names: list[str]) -> None:
    """Makes the stores of these sources, and the tokenizer if it is not there."""
    folder, began = p.spec.folder, time.monotonic()
    known = known_tokenizer(p.spec)  # what is wrong with it is refused before the work
    evaluations, manifest = _find_text(p, names)
    scans = scan_jobs(p.spec, manifest)
    resumed = any(j.done() for j in flatten(scans))
    if p.team.hosts > 1:
        manifest.save(folder.path)  # the other hosts begin when they see it
    p.run("reading", p.team.share(flatten(scans)), flatten(scans), "scans")

    selections = {name: Selection(name, jobs, p.spec.validation_fraction) for name, jobs in scans.items()}
    n_bytes = _select(p, selections, evaluations)
    tokenizer = make_tokenizer(p.spec, known, flatten(scans), p.log)

    jobs = {name: _tokenize_jobs(p, manifest, s, tokenizer) for name, s in selections.items()}
    own = with_threads(p.team.share(flatten(jobs)), p.workers.n)
    p.run("tokenising", own, flatten(jobs), "shards")
    for name in names:
        finish_source(p.spec, manifest, jobs[name], selections[name], tokenizer, p.log)
    if manifest.index is not None:
        (folder.raw / manifest.index).unlink()
    seconds = time.monotonic() - began
    rate = "" if resumed else f", {n_bytes / 1e6:.1f} MB of text at {n_bytes / 1e6 / seconds:.1f} MB/s"
    p.log(f"{folder.path}: prepared in {seconds:.0f} s{rate}")


def _find_text(p: Preparation, names: list[str]) -> tuple[dict[str, Evaluation], Manifest]:
    """Brings the raw text of these sources and cuts it into shards, and reads the evaluations to look for in it."""
    shards: dict[str, list[tuple[Part, ...]]] = {}
    for name in names:
        source, raw = p.spec.sources[name], p.spec.folder.raw / name
        p.log(f"{name}: finding raw text of {type(source).__name__}")
        source.fetch(raw, p.log)
        shards[name] = _shards(source.parts(raw))
    evaluations, index = ({}, None) if p.spec.overlap is None else _read_evaluations(p, p.spec.overlap)
    manifest = Manifest(
        settings=settings(p.spec, p.team.hosts),
        shards=shards,
        raw={name: raw_files.take(p.spec, name, p.workers.n, p.log) for name in names},
        index=index,
    )
    return evaluations, manifest


def _read_evaluations(p: Preparation, overlap: Overlap) -> tuple[dict[str, Evaluation], str]:
    """The evaluations to look for, and the name of the file of their n-grams, which the workers read."""
    folder, found = p.spec.folder, {}
    for name, source in overlap.files.items():
        cache = folder.evaluation(name)
        source.fetch(cache, p.log)
        found[name] = read_evaluation(name, source, overlap.ngram, cache)
        p.log(f"overlap: {name}: {len(found[name].grams)} n-grams of {found[name].n_documents} documents")
    grams = hashlib.sha256(b"".join(hashlib.sha256(e.grams.tobytes()).digest() for e in found.values())).hexdigest()
    index = folder.evaluation(f"index-{grams[:16]}.npz")
    folder.raw.mkdir(parents=True, exist_ok=True)
    OverlapIndex.of(found, overlap.ngram).save(index)
    return found, index.name


def _select(p: Preparation, selections: dict[str, Selection], evaluations: dict[str, Evaluation]) -> int:
    """Settles which documents stay and reports it. Returns the bytes of text that were read. UserError where too little
    is left."""
    near = None
    if p.spec.near_duplicates is not None:
        n = sum(s.n_kept for s in selections.values())
        mb = n * p.spec.near_duplicates.size * 4 / 1e6
        p.log(f"near-duplicates: comparing {n} documents, {mb:.0f} MB of signatures")
        near = drop_near_duplicates(selections, list(p.spec.sources), p.spec.folder, p.spec.near_duplicates)
    n_bytes = 0
    for name, selection in selections.items():
        report = report_of(selection, near, p.spec.overlap, evaluations)
        write_report(p.spec.folder.report(name), report)
        for line in lines(selection, report):
            p.log(line)
        n_bytes += report["text_bytes"]
    for selection in selections.values():  # after all reports, to which the errors point
        check_text(p.spec, selection)
        check_left(p.spec, selection)
    return n_bytes


def _tokenize_jobs(p: Preparation, manifest: Manifest, selection: Selection, tokenizer: Tokenizer) -> list[TokenizeJob]:
    """The second jobs of a source; other hosts are told the labels that theirs need."""
    folder, labels = p.spec.folder, selection.by_shard()
    if p.team.hosts > 1:
        with open_atomic(manifest.labels_path(folder.path, selection.name)) as f:
            arrays: dict[str, Any] = {str(i): x for i, x in enumerate(labels)}
            np.savez(f, **arrays)
    found = enumerate(zip(selection.jobs, labels, selection.scans, strict=True))
    return [tokenize_job(folder, selection.name, i, job, x, scan.digest(), tokenizer) for i, (job, x, scan) in found]


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
