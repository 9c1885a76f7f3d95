"""Training documents that hold text of an evaluation: shared word n-grams, as Brown et al. 2020 (appendix C) look for
them. There, a document is cut around what it shares; here it is counted, and left out on request."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.data.documents.ngrams import WORD, ngram_hashes, word_hashes
from lm.data.sources.base import MAX_DOCUMENT_BYTES, Problem, Source
from lm.errors import UserError
from lm.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Looks in the documents for text of evaluations. files: these by name, each a source of its own, read whole into
    memory. ngram: words that two texts share in a row. remove: leaves the documents out that share any; otherwise
    they are only counted in the report.

    An evaluation's document of fewer than `ngram` words cannot be found; the report says how many those are.
    """

    files: dict[str, Source] = field(default_factory=dict)
    ngram: int = 13  # as GPT-3 (Brown et al., 2020, appendix C)
    remove: bool = False

    def __post_init__(self):
        if not self.files:
            raise UserError(
                "data.overlap.files: expected evaluations by name, got none; add e.g. {'lambada': Jsonl(glob=...)}"
            )
        for name, source in self.files.items():
            if not isinstance(source, Source):
                raise UserError(f"data.overlap.files[{name!r}]: expected a Source, got {source!r}")
        if self.ngram < 1:
            raise UserError(f"data.overlap.ngram: expected at least 1, got {self.ngram}")


class Evaluation(NamedTuple):
    """An evaluation to look for. grams: its n-grams, uint64, sorted. n_short: documents that have none."""

    grams: np.ndarray
    n_documents: int
    n_short: int


def read_evaluation(name: str, source: Source, ngram: int, cache: Path) -> Evaluation:
    """Reads an evaluation. UserError for anything that cannot be read: what is not checked would count as clean."""
    found, n, n_short = [np.empty(0, np.uint64)], 0, 0
    for part in source.parts(cache):
        for entry in source.entries(part, MAX_DOCUMENT_BYTES):
            if isinstance(entry, Problem):
                raise UserError(f"data.overlap.files[{name!r}]: {entry.message}")
            grams = ngram_hashes(word_hashes(entry.raw.decode(errors="replace")), ngram)
            found.append(grams)
            n, n_short = n + 1, n_short + (not len(grams))
    grams = np.unique(np.concatenate(found))
    if not len(grams):
        raise UserError(
            f"data.overlap.files[{name!r}]: expected documents of at least {ngram} words, got {n} documents, all "
            "shorter; lower data.overlap.ngram or drop it"
        )
    return Evaluation(grams, n, n_short)


@dataclass(frozen=True, kw_only=True)
class OverlapIndex:
    """The n-grams of several evaluations, uint64, sorted. names: in order. grams: of all of them; each: of each."""

    ngram: int
    names: tuple[str, ...]
    grams: np.ndarray
    each: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, evaluations: dict[str, Evaluation], ngram: int) -> OverlapIndex:
        each = tuple(e.grams for e in evaluations.values())
        return cls(ngram=ngram, names=tuple(evaluations), grams=np.unique(np.concatenate(each)), each=each)

    def save(self, path: Path) -> None:
        file = io.BytesIO()
        arrays: dict[str, Any] = {f"each{i}": grams for i, grams in enumerate(self.each)}
        names = np.frombuffer(json.dumps(self.names).encode(), np.uint8)
        np.savez(file, ngram=self.ngram, names=names, **arrays)
        write_atomic(path, file.getvalue())

    @classmethod
    def load(cls, path: Path) -> OverlapIndex:
        with np.load(path) as z:
            names = tuple(json.loads(z["names"].tobytes()))
            each = tuple(z[f"each{i}"] for i in range(len(names)))
            return cls(ngram=int(z["ngram"]), names=names, grams=np.unique(np.concatenate(each)), each=each)

    def find(self, text: str) -> tuple[list[int], str]:
        """(numbers of the evaluations that a text shares an n-gram with, the first one shared)."""
        hashes = ngram_hashes(word_hashes(text), self.ngram)
        hit = np.flatnonzero(_holds(self.grams, hashes))
        if not len(hit):
            return [], ""
        shared = hashes[hit]
        begin = int(hit[0])
        excerpt = WORD.findall(text.lower())[begin : begin + self.ngram]
        return [i for i, grams in enumerate(self.each) if _holds(grams, shared).any()], " ".join(excerpt)


@functools.lru_cache(maxsize=1)
def load_index(path: Path) -> OverlapIndex:
    """Loads the index once for each process."""
    return OverlapIndex.load(path)


def _holds(grams: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    at = np.searchsorted(grams, hashes)
    return grams[np.minimum(at, len(grams) - 1)] == hashes  # a hash above all finds the place behind the last
