"""What one preparation has to do: the raw text it found, cut into shards, and the jobs that follow from it.

The jobs are a function of the config and the manifest, so hosts that share a folder share it and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.documents.reading import Reading
from lm.data.folder import CorpusFolder
from lm.data.made_from import CorpusSpec, digest
from lm.data.prepare.scan import SCAN_VERSION, ScanJob
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.sources.base import Part
from lm.data.store.tokens import VERSION, dtype_for
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.sentencepiece import SentencePiece
from lm.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the jobs follow from. settings: see `settings`. shards: by source, in order, the parts of each. raw: by
    source, what `raw_files.take` says of its files. index: name of the file with the n-grams to look for."""

    settings: dict[str, Any]
    shards: dict[str, list[tuple[Part, ...]]]
    raw: dict[str, str | None]
    index: str | None

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        raw = json.loads(content)
        shards = {name: [tuple(Part(*p) for p in shard) for shard in named] for name, named in raw["shards"].items()}
        return cls(**raw | {"shards": shards})

    def save(self, path: Path) -> None:
        write_atomic(CorpusFolder(path).manifest, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """Reads the one in the folder of a corpus; None where there is none."""
        try:
            return cls.from_json(CorpusFolder(path).manifest.read_bytes())
        except FileNotFoundError:
            return None

    def labels_path(self, path: Path, name: str) -> Path:
        """Where host 0 says which documents of a source stay: arrays "0", "1", ... uint8, a shard each."""
        return CorpusFolder(path).work(name) / f"labels-{hashlib.sha256(self.to_json()).hexdigest()[:12]}.npz"


def settings(spec: CorpusSpec, hosts: int) -> dict[str, Any]:
    """What hosts that prepare one corpus have to agree on, as JSON."""
    files = sorted({path for f in spec.filters for path in f.files()})
    found = {
        "hosts": hosts,
        "tokenizer": spec.tokenizer_made_from(),
        "weights": spec.shares,
        "sources": {name: spec.made_from(name) for name in spec.sources},
        "files": {p: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in files if Path(p).is_file()},
    }
    return json.loads(json.dumps(found))  # as it is read back: tuples are lists


def difference(mine: Any, theirs: Any, at: str = "") -> tuple[str, Any, Any] | None:
    """(name, mine, theirs) of the first setting that is not the same, None where all are."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        # Of sources, the order decides which near-duplicate is the first.
        if mine.keys() == theirs.keys() and list(mine) != list(theirs):
            return at or "order", list(mine), list(theirs)
        inner = (difference(mine.get(k), theirs.get(k), f"{at}.{k}".lstrip(".")) for k in [*mine, *theirs])
        return next((d for d in inner if d), None)
    return None if mine == theirs else (at, mine, theirs)


def scan_jobs(spec: CorpusSpec, manifest: Manifest) -> dict[str, list[ScanJob]]:
    """The first jobs of each source, one a shard. The tokenizer's sample is dealt out over them before anything is
    read, so that each excerpt is chosen by one worker alone and no worker has to know of another."""
    folder, sample_bytes = spec.folder, spec.tokenizer.train_bytes if isinstance(spec.tokenizer, SentencePiece) else 0
    size = {name: sum(p.n_bytes for parts in named for p in parts) for name, named in manifest.shards.items()}
    share = {name: spec.shares[name] for name in manifest.shards} if spec.shares else size
    index = None if manifest.index is None else folder.raw / manifest.index
    jobs: dict[str, list[ScanJob]] = {}
    for name, named in manifest.shards.items():
        work = folder.work(name)
        work.mkdir(parents=True, exist_ok=True)
        wanted = sample_bytes * share[name] / (sum(share.values()) or 1)  # all files may be empty
        jobs[name] = []
        for i, parts in enumerate(named):
            # Rounded up: a small shard gives some too.
            sample = -int(-wanted * sum(p.n_bytes for p in parts) // max(1, size[name]))
            key = digest(  # all that the result follows from: where any of it differs, it is scanned anew
                [
                    VERSION,
                    SCAN_VERSION,
                    manifest.settings["sources"][name],
                    manifest.raw[name],
                    manifest.index,
                    parts,
                    sample,
                ]
            )
            jobs[name].append(
                ScanJob(
                    reading=Reading(
                        source=spec.sources[name],
                        parts=parts,
                        invalid_utf8=spec.invalid_utf8,
                        on_error=spec.on_error,
                        max_document_bytes=spec.max_document_bytes,
                        filters=spec.filters,
                    ),
                    near=spec.near_duplicates,
                    overlap=index,
                    remove_overlap=spec.overlap is not None and spec.overlap.remove,
                    sample_bytes=sample,
                    validation_fraction=spec.validation_fraction,
                    out=work / f"scan-{i:05d}-{key[:12]}.npz",
                )
            )
    return jobs


def tokenize_job(
    folder: CorpusFolder, name: str, shard: int, scan: ScanJob, labels: np.ndarray, text: str, tokenizer: Tokenizer
) -> TokenizeJob:
    """The second job of a shard. labels uint8 [n] of the documents that `scan` found; text: their `Scan.digest`."""
    return TokenizeJob(
        reading=scan.reading,
        scan=scan.out,
        labels=labels,
        tokenizer=folder.tokenizer,
        dtype=dtype_for(tokenizer.vocab_size),
        folder=folder.source(name),
        shard=shard,
        out=folder.work(name) / f"shard-{shard:05d}.json",
        key=digest([hashlib.sha256(labels.tobytes()).hexdigest(), text, tokenizer.fingerprint]),
    )


def with_threads(jobs: Sequence[TokenizeJob], cores: int) -> list[TokenizeJob]:
    """The same jobs, with the cores that fewer jobs than these would leave idle."""
    return [dataclasses.replace(job, threads=max(1, cores // len(jobs))) for job in jobs]


def flatten(named: dict[str, list[Any]]) -> list[Any]:
    """The jobs of all sources, in the order in which they are dealt to hosts."""
    return [job for jobs in named.values() for job in jobs]
