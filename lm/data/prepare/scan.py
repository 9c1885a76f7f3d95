"""The first job that worker processes do for `prepare`: scan the documents of a shard. `tokenize` has the second.

Both write their result under its final name when it is complete and skip it when it is there, so that a killed run goes
on where it was. Neither imports TensorFlow or JAX.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import io
import json
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.documents.near_duplicates import NearDuplicates
from lm.data.documents.overlap import load_index
from lm.data.documents.reading import Reading
from lm.data.store.splits import in_validation
from lm.files import open_atomic, write_atomic

EXCERPT_CHARS = 2048  # unit of the tokenizer's sample: short enough for variety, long enough for words in context
EXAMPLES, EXAMPLE_CHARS = 3, 300  # what a report shows of each reason
OVERLAP = "overlap"
MENDED = "invalid_utf8"  # among the examples: such documents are kept
FIRST_BYTES = 1 << 20  # of the text of a shard, in which a NUL is told
SCAN_VERSION = 2  # of what a scan writes: those of a killed run of older code are made again


def utf8_size(text: str) -> int:
    """Counts the bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class Hit(NamedTuple):
    """A document of the shard that shares text with evaluations. evaluations: their numbers. at: file and place, and
    the words shared."""

    document: int
    evaluations: list[int]
    at: str


class Scan(NamedTuple):
    """What was found: hashes uint64 [n] of a shard's entries; codes uint16 [n], numbers of `reasons`, of which the
    first is "" for what is kept; part_sizes int64 [p], entries of each part; how many were mended, cleaned or hold NUL,
    the bytes of all text, and how many were documents with text; excerpts to learn from; up to EXAMPLES places for each
    reason; what overlaps; how often sources noted what; and the place of a NUL in the first bytes, "" without."""

    hashes: np.ndarray
    codes: np.ndarray
    reasons: list[str]
    part_sizes: np.ndarray
    n_mended: int
    n_cleaned: int
    n_nul: int
    n_text_bytes: int
    n_documents: int
    sample: list[str]
    examples: dict[str, list[str]]
    hits: list[Hit]
    notes: dict[str, int]
    first_nul: str

    def digest(self) -> str:
        """A digest of all the text."""
        return hashlib.sha256(self.hashes.astype("<u8").tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ScanJob:
    """Scans a shard. sample_bytes: how much text of the training split to keep for the tokenizer. near: makes a
    signature of each document that is kept. overlap: path of the index of evaluations to look for; remove_overlap:
    leaves out what is found."""

    reading: Reading
    sample_bytes: int
    validation_fraction: float
    out: Path
    near: NearDuplicates | None = None
    overlap: Path | None = None
    remove_overlap: bool = False

    @property
    def n_bytes(self) -> int:
        return self.reading.n_bytes

    @property
    def signatures(self) -> Path:
        """Where the signatures of the m documents kept lie: uint32 [m, near.size]."""
        return self.out.with_suffix(".u32")

    def done(self) -> bool:
        return self.out.is_file()

    def run(self) -> None:
        hashes, codes, part_sizes = array("Q"), array("H"), []  # 8 bytes a document, of lists it would be some 40
        n_mended = n_cleaned = n_nul = n_text_bytes = n_documents = 0
        notes, first_nul = Counter[str](), ""
        reasons: dict[str, int] = {"": 0}
        examples: dict[str, list[str]] = {}
        hits: list[Hit] = []
        sample = _Sample(self.sample_bytes)
        index = None if self.overlap is None else load_index(self.overlap)
        with contextlib.ExitStack() as stack:
            signatures = None if self.near is None else stack.enter_context(open_atomic(self.signatures))
            for part in self.reading.parts:
                before = len(hashes)
                for entry in self.reading.entries(part):
                    text, reason = entry.text, entry.reason
                    n_documents += entry.is_document
                    if entry.mended:
                        n_mended += 1
                        _show(examples, MENDED, entry.at)
                    if entry.notes:
                        notes.update(entry.notes)
                    if index is not None and not reason:
                        evaluations, words = index.find(text)
                        if evaluations:
                            hits.append(Hit(len(hashes), evaluations, f"{entry.at}: {words}"))
                            reason = OVERLAP if self.remove_overlap else ""
                    hashes.append(entry.hash)
                    codes.append(reasons.setdefault(reason, len(reasons)))
                    if reason:
                        _show(examples, reason, entry.at)
                        continue
                    n_cleaned += entry.cleaned
                    if "\0" in text:
                        n_nul += 1
                        first_nul = first_nul or (entry.at if n_text_bytes < FIRST_BYTES else "")
                    n_text_bytes += utf8_size(text)
                    if signatures is not None and self.near is not None:
                        signatures.write(self.near.signature(text).tobytes())
                    if self.sample_bytes and not in_validation(np.uint64(entry.hash), self.validation_fraction):
                        sample.add(text, entry.hash)
                part_sizes.append(len(hashes) - before)
        # A corpus may have millions of hits.
        hits = [h if i < EXAMPLES else h._replace(at="") for i, h in enumerate(hits)]
        rest = {"reasons": list(reasons), "examples": examples, "hits": hits, "sample": sample.excerpts()}
        rest |= {"notes": notes, "first_nul": first_nul}
        file = io.BytesIO()
        np.savez(
            file,
            hashes=np.frombuffer(hashes, np.uint64),
            codes=np.frombuffer(codes, np.uint16),
            part_sizes=np.array(part_sizes, np.int64),
            numbers=np.array([n_mended, n_cleaned, n_nul, n_text_bytes, n_documents], np.int64),
            rest=np.frombuffer(json.dumps(rest).encode(), np.uint8),
        )
        write_atomic(self.out, file.getvalue())  # after the signatures: `done` looks for it alone

    def result(self) -> Scan:
        with np.load(self.out) as z:
            rest = json.loads(z["rest"].tobytes())
            n_mended, n_cleaned, n_nul, n_text_bytes, n_documents = z["numbers"].tolist()
            return Scan(
                hashes=z["hashes"],
                codes=z["codes"],
                reasons=rest["reasons"],
                part_sizes=z["part_sizes"],
                n_mended=n_mended,
                n_cleaned=n_cleaned,
                n_nul=n_nul,
                n_text_bytes=n_text_bytes,
                n_documents=n_documents,
                sample=rest["sample"],
                examples=rest["examples"],
                hits=[Hit(*h) for h in rest["hits"]],
                notes=rest["notes"],
                first_nul=rest["first_nul"],
            )


def _show(examples: dict[str, list[str]], reason: str, at: str) -> None:
    if len(shown := examples.setdefault(reason, [])) < EXAMPLES:
        shown.append(at[:EXAMPLE_CHARS])


class _Sample:
    """Different excerpts of least rank, up to about `n_bytes`: any order of the documents finds the same. One that
    repeats is held once: thousands of copies of a document would leave no room for others."""

    def __init__(self, n_bytes: int):
        self._n_bytes, self._held = n_bytes, 0
        self._heap: list[tuple[int, str]] = []  # of (-rank, excerpt)
        self._ranks: set[int] = set()  # of those in the heap: the hash of the text decides it

    def add(self, text: str, hash_: int) -> None:
        for at in range(0, len(text), EXCERPT_CHARS):
            # Of text and place alone: the same for any number of workers.
            rank = (hash_ ^ at * 0x9E3779B97F4A7C15) * 0xD1B54A32D192ED03 % 2**64
            if rank not in self._ranks and (self._held < self._n_bytes or rank < -self._heap[0][0]):
                self._ranks.add(rank)
                excerpt = text[at : at + EXCERPT_CHARS]
                heapq.heappush(self._heap, (-rank, excerpt))
                self._held += len(excerpt.encode())
                while self._held - len(self._heap[0][1].encode()) >= self._n_bytes:
                    dropped, excerpt = heapq.heappop(self._heap)
                    self._ranks.remove(-dropped)
                    self._held -= len(excerpt.encode())

    def excerpts(self) -> list[str]:
        return [text for _, text in sorted(self._heap, reverse=True)]
