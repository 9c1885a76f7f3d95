"""What one preparation has to do: the raw text it found, cut into shards, and the jobs that follow from it.

The jobs are a function of the config and the plan, so hosts that share a folder share the plan and nothing else.
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

from lm.data.config import Data
from lm.data.documents.reading import Reading
from lm.data.made_from import digest, made_from, tokenizer_made_from
from lm.data.prepare.scan import ScanJob
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.sources.base import Part
from lm.data.store.tokens import VERSION, dtype_for
from lm.data.stream.mixture import as_phases, mean_weight
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.sentencepiece import SentencePiece
from lm.files import write_atomic

PLAN = ".plan.json"  # no source can be called that


@dataclass(frozen=True, kw_only=True)
class Plan:
    """shards: by source, in order, the parts of each. raw: by source, what `raw_digest` says of its files. index: name
    of the file with the n-grams to look for. settings: of the config, what the jobs depend on, and the hosts."""

    settings: dict[str, Any]
    shards: dict[str, list[tuple[Part, ...]]]
    raw: dict[str, str | None]
    index: str | None

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Plan:
        raw = json.loads(content)
        shards = {name: [tuple(Part(*p) for p in shard) for shard in named] for name, named in raw["shards"].items()}
        return cls(**raw | {"shards": shards})

    def save(self, path: Path) -> None:
        write_atomic(path / PLAN, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan | None:
        """The one in the folder of a corpus, None where there is none."""
        try:
            return cls.from_json((path / PLAN).read_bytes())
        except FileNotFoundError:
            return None

    def labels_path(self, path: Path, name: str) -> Path:
        """Where host 0 says which documents of a source stay: arrays "0", "1", ... uint8, a shard each."""
        return path / name / "work" / f"labels-{hashlib.sha256(self.to_json()).hexdigest()[:12]}.npz"


def settings(data: Data, hosts: int) -> dict[str, Any]:
    """As JSON: what hosts that prepare one corpus have to agree on."""
    files = sorted({path for f in data.filters for path in f.files()})
    found = {
        "hosts": hosts,
        "tokenizer": tokenizer_made_from(data),
        "weights": _shares(data, list(data.sources)),
        "sources": {name: made_from(data, name) for name in data.sources},
        "files": {p: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in files if Path(p).is_file()},
    }
    return json.loads(json.dumps(found))


def difference(mine: Any, theirs: Any, at: str = "") -> tuple[str, Any, Any] | None:
    """(name, mine, theirs) of the first setting that is not the same, None where all are."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        if mine.keys() == theirs.keys() and list(mine) != list(theirs):
            return at or "order", list(mine), list(theirs)
        inner = (difference(mine.get(k), theirs.get(k), f"{at}.{k}".lstrip(".")) for k in [*mine, *theirs])
        return next((d for d in inner if d), None)
    return None if mine == theirs else (at, mine, theirs)


def scan_jobs(data: Data, plan: Plan) -> dict[str, list[ScanJob]]:
    sample_bytes = data.tokenizer.train_bytes if isinstance(data.tokenizer, SentencePiece) else 0
    size = {name: sum(p.n_bytes for parts in named for p in parts) for name, named in plan.shards.items()}
    share = _shares(data, list(plan.shards)) or size
    index = None if plan.index is None else Path(data.path, "raw", plan.index)
    jobs: dict[str, list[ScanJob]] = {}
    for name, named in plan.shards.items():
        work = Path(data.path, name, "work")
        work.mkdir(parents=True, exist_ok=True)
        wanted = sample_bytes * share[name] / (sum(share.values()) or 1)  # all files may be empty
        jobs[name] = []
        for i, parts in enumerate(named):
            sample = -int(-wanted * sum(p.n_bytes for p in parts) // max(1, size[name]))
            key = digest([VERSION, made_from(data, name), plan.raw[name], plan.index, parts, sample])
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


def tokenize_job(
    data: Data, name: str, shard: int, scan: ScanJob, labels: np.ndarray, text: str, tokenizer: Tokenizer
) -> TokenizeJob:
    """labels uint8 [n] of the documents that `scan` found; text: their `Scan.digest`."""
    folder = Path(data.path, name)
    return TokenizeJob(
        reading=scan.reading,
        scan=scan.out,
        labels=labels,
        tokenizer=Path(data.path, "tokenizer.model"),
        dtype=dtype_for(tokenizer.vocab_size),
        folder=folder,
        shard=shard,
        out=folder / "work" / f"shard-{shard:05d}.json",
        key=digest([hashlib.sha256(labels.tobytes()).hexdigest(), text, tokenizer.fingerprint]),
    )


def with_threads(jobs: Sequence[TokenizeJob], cores: int) -> list[TokenizeJob]:
    """The same, with the cores that fewer jobs than these would leave idle."""
    return [dataclasses.replace(job, threads=max(1, cores // len(jobs))) for job in jobs]


def in_one(named: dict[str, list[Any]]) -> list[Any]:
    """Of all sources: the order in which jobs are dealt to hosts."""
    return [job for jobs in named.values() for job in jobs]


def _shares(data: Data, names: Sequence[str]) -> dict[str, float] | None:
    """Of the tokenizer's sample; None: by size."""
    if not data.weights:
        return None
    phases = as_phases(data.weights, data.sources)
    return {name: mean_weight(phases, name) for name in names}
