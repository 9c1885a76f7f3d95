"""Which documents of a source stay: what the scans left out, exact duplicates, and near-duplicates across sources."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.documents.near_duplicates import NearDuplicates, find_clusters
from lm.data.folder import CorpusFolder
from lm.data.prepare.scan import EXAMPLES, Scan, ScanJob
from lm.data.sources.base import Part
from lm.data.store.splits import DROP, TRAIN, VALIDATION, in_validation
from lm.errors import UserError
from lm.files import open_atomic

DUPLICATES, NEAR = "duplicates", "near_duplicates"


class Selection:
    """What becomes of the entries of one source, in order: `labels` uint8 [n], DROP, TRAIN or VALIDATION, and why."""

    def __init__(self, name: str, jobs: Sequence[ScanJob], validation_fraction: float):
        self.name, self.jobs = name, jobs
        self.scans: list[Scan] = [j.result() for j in jobs]
        self.hashes = np.concatenate([s.hashes for s in self.scans])
        self.reasons = ["", *sorted({r for s in self.scans for r in s.reasons} - {""}), DUPLICATES, NEAR]
        number = {reason: i for i, reason in enumerate(self.reasons)}
        renamed = [np.array([number[r] for r in s.reasons], np.uint16)[s.codes] for s in self.scans]
        self._codes = np.concatenate(renamed)
        self.labels = np.where(in_validation(self.hashes, validation_fraction), VALIDATION, TRAIN).astype(np.uint8)
        self.labels[self._codes > 0] = DROP
        kept = np.flatnonzero(self.labels)
        repeats = np.ones(len(kept), bool)
        repeats[np.unique(self.hashes[kept], return_index=True)[1]] = False  # the first of equals
        self.drop(kept[repeats], DUPLICATES)

    def drop(self, documents: np.ndarray, reason: str) -> None:
        self.labels[documents] = DROP
        self._codes[documents] = self.reasons.index(reason)

    @property
    def n_kept(self) -> int:
        return int((self.labels != DROP).sum())

    def left_out(self) -> dict[str, int]:
        """Reason -> entries, of those that occur."""
        counts = np.bincount(self._codes, minlength=len(self.reasons))
        return {r: n for r, n in zip(self.reasons, counts.tolist(), strict=True) if r and n}

    def counts(self) -> dict[str, int]:
        """What the store says about itself."""
        always = {"documents": len(self.labels), "empty": 0, DUPLICATES: 0, "invalid_utf8": 0}
        return always | self.left_out() | {"invalid_utf8": sum(s.n_mended for s in self.scans)}

    def by_shard(self) -> list[np.ndarray]:
        """Labels of the entries of each job."""
        return np.split(self.labels, np.cumsum([len(s.hashes) for s in self.scans])[:-1])

    def files(self) -> dict[str, dict[str, int]]:
        """Path -> entries read and documents kept."""
        out: dict[str, dict[str, int]] = {}
        at = 0
        for part, size in self._parts():
            of = out.setdefault(part.path, {"read": 0, "kept": 0})
            of["read"] += size
            of["kept"] += int((self.labels[at : at + size] != DROP).sum())
            at += size
        return out

    def place(self, document: int) -> str:
        """The file of an entry, and its number there from 1."""
        before: Counter[str] = Counter()
        for part, size in self._parts():
            if document < size:
                return f"{part.path}: record {before[part.path] + document + 1}"
            before[part.path] += size
            document -= size
        raise IndexError(document)

    def _parts(self) -> list[tuple[Part, int]]:
        sizes = [n for s in self.scans for n in s.part_sizes.tolist()]
        return list(zip([p for j in self.jobs for p in j.reading.parts], sizes, strict=True))


class Near(NamedTuple):
    """What is near. clusters: of two and more documents, over all sources; documents: how many these are; dropped: by
    source; examples: places of the largest clusters; n_cut: buckets of a band too varied to compare every pair in."""

    clusters: int
    documents: int
    dropped: dict[str, int]
    examples: list[list[str]]
    n_cut: int


def drop_near_duplicates(
    selections: Mapping[str, Selection], order: Sequence[str], folder: CorpusFolder, how: NearDuplicates
) -> Near:
    """Leaves out all but the first of each cluster, and writes the signatures of what it compared.

    order: all sources; those without a selection are finished, come first and keep what they have. UserError when the
    signatures of a finished one are gone.
    """
    kept: dict[str, np.ndarray] = {name: np.flatnonzero(s.labels != DROP) for name, s in selections.items()}
    for name, selection in selections.items():
        _write_signatures(folder.signatures(name), selection, how)
    names = sorted(order, key=lambda name: name in selections)
    arrays = [_map(folder.signatures(name), how) for name in names]
    clusters = find_clusters(arrays, how)
    base = dict(zip(names, np.cumsum([0, *map(len, arrays)])[:-1].tolist(), strict=True))
    dropped = {}
    for name, selection in selections.items():
        first = clusters.first[base[name] : base[name] + len(kept[name])]
        near = kept[name][first != np.arange(base[name], base[name] + len(first))]
        selection.drop(near, NEAR)
        dropped[name] = len(near)

    def place(document: int) -> str:
        name = next(n for n in reversed(names) if base[n] <= document)
        within = document - base[name]
        known = name in selections
        return f"{name}: {selections[name].place(int(kept[name][within])) if known else f'document {within}'}"

    sizes = clusters.sizes
    examples = []
    for earliest in list(sizes)[:EXAMPLES]:
        examples.append([place(d) for d in np.flatnonzero(clusters.first == earliest)[: EXAMPLES + 1].tolist()])
    return Near(len(sizes), sum(sizes.values()), dropped, examples, clusters.n_cut)


def _write_signatures(path: Path, selection: Selection, how: NearDuplicates) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as f:
        for job, scan, labels in zip(selection.jobs, selection.scans, selection.by_shard(), strict=True):
            signatures = _map(job.signatures, how)
            rows = np.flatnonzero(labels[scan.codes == 0] != DROP)
            for at in range(0, len(rows), 1 << 14):
                f.write(signatures[rows[at : at + (1 << 14)]].tobytes())


def _map(path: Path, how: NearDuplicates) -> np.ndarray:
    if not path.is_file() or os.path.getsize(path) % (4 * how.size):
        got = "others" if path.is_file() else "nothing there"
        raise UserError(f"{path}: expected signatures of {how.size} values, got {got}; run `lm prepare --force`")
    if not os.path.getsize(path):
        return np.empty((0, how.size), np.uint32)
    return np.memmap(path, np.uint32, "r").reshape(-1, how.size)
