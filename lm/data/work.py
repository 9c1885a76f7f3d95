"""The two jobs that worker processes do for `prepare`: scan the documents of a shard, then tokenise them.

Both write their result under its final name when it is complete and skip it when it is there, so that a killed run goes
on where it was. Nothing here imports TensorFlow or JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.data.sources import Part, Source
from lm.data.store import Shard, ShardWriter, check_shard_files, write_atomic
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

EXCERPT_CHARS = 2048  # unit of the tokenizer's sample: short enough for variety, long enough for words in context
ENCODE_CHARS = 1 << 20  # documents are handed to the tokenizer in batches of this size
DROP, TRAIN, VALIDATION = 0, 1, 2  # labels of documents
SPLITS = {"train": TRAIN, "validation": VALIDATION}


def in_validation(hashes: Any, fraction: float) -> Any:
    """uint64 hash or array of hashes of contents -> bool. The same text is in the same split, in whatever corpus."""
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The documents of one shard: which parts of which source, and what to do with bytes that are no UTF-8."""

    source: Source
    parts: tuple[Part, ...]
    invalid_utf8: str

    @property
    def n_bytes(self) -> int:
        return sum(p.n_bytes for p in self.parts)

    def texts(self) -> Iterator[tuple[str, int, int]]:
        """(text, 64-bit hash of its UTF-8, 1 if it was mended) of each document, the empty ones included."""
        for part in self.parts:
            for document in self.source.read(part):
                raw, mended = document.raw, 0
                try:
                    text = raw.decode()
                except UnicodeDecodeError as e:
                    if self.invalid_utf8 == "error":
                        raise UserError(
                            f"{part.path}: {document.place}: expected UTF-8, got {raw[e.start : e.end]!r} at byte "
                            f"{e.start}; mend the file or set invalid_utf8='replace'"
                        ) from None
                    text = raw.decode(errors="replace")
                    raw, mended = text.encode(), 1
                yield text, int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"), mended


class Scan(NamedTuple):
    """hashes uint64 [n] of a shard's documents, empty bool [n], the number mended, and excerpts to learn from."""

    hashes: np.ndarray
    empty: np.ndarray
    n_mended: int
    sample: list[str]

    def digest(self) -> str:
        """Of all the text."""
        return hashlib.sha256(self.hashes.astype("<u8").tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ScanJob:
    """sample_bytes: how much text of the training split to keep for the tokenizer."""

    reading: Reading
    sample_bytes: int
    validation_fraction: float
    out: Path

    @property
    def n_bytes(self) -> int:
        return self.reading.n_bytes

    def done(self) -> bool:
        return self.out.is_file()

    def run(self) -> None:
        hashes, empty = [], []
        n_mended = sampled = 0
        sample: list[tuple[int, str]] = []  # a heap of (-rank, excerpt)
        for text, hash_, mended in self.reading.texts():
            hashes.append(hash_)
            empty.append(not text)
            n_mended += mended
            if not self.sample_bytes or in_validation(np.uint64(hash_), self.validation_fraction):
                continue
            for at in range(0, len(text), EXCERPT_CHARS):  # the excerpts of least rank: any order finds the same
                rank = (hash_ ^ at * 0x9E3779B97F4A7C15) * 0xD1B54A32D192ED03 % 2**64
                if sampled < self.sample_bytes or rank < -sample[0][0]:
                    excerpt = text[at : at + EXCERPT_CHARS]
                    heapq.heappush(sample, (-rank, excerpt))
                    sampled += len(excerpt.encode())
                    while sampled - len(sample[0][1].encode()) >= self.sample_bytes:
                        sampled -= len(heapq.heappop(sample)[1].encode())
        file = io.BytesIO()
        excerpts = json.dumps([text for _, text in sorted(sample, reverse=True)])
        np.savez(
            file,
            hashes=np.array(hashes, np.uint64),
            empty=np.array(empty, bool),
            n_mended=n_mended,
            sample=np.frombuffer(excerpts.encode(), np.uint8),
        )
        write_atomic(self.out, file.getvalue())

    def result(self) -> Scan:
        with np.load(self.out) as z:
            return Scan(z["hashes"], z["empty"], int(z["n_mended"]), json.loads(z["sample"].tobytes()))


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """labels uint8 [n]: DROP, TRAIN or VALIDATION for each document of the reading. key: what the result depends on."""

    reading: Reading
    scan: Path
    labels: np.ndarray
    tokenizer: Path
    dtype: str
    folder: Path
    shard: int
    out: Path
    key: str

    @property
    def n_bytes(self) -> int:
        return self.reading.n_bytes

    def done(self) -> bool:
        if not self.out.is_file():
            return False
        receipt = json.loads(self.out.read_bytes())
        if receipt["key"] != self.key:
            return False
        try:
            for split, shard in self.result().items():
                check_shard_files(self.folder / split, self.shard, shard, self.dtype)
        except UserError:
            return False
        return True

    def run(self) -> None:
        tokenizer = _tokenizer(self.tokenizer)
        with np.load(self.scan) as z:
            hashes = z["hashes"].tolist()
        labels = self.labels.tolist()
        with (
            ShardWriter(self.folder / "train", self.shard, self.dtype) as train,
            ShardWriter(self.folder / "validation", self.shard, self.dtype) as validation,
        ):
            writers = {TRAIN: train, VALIDATION: validation}
            pending: list[tuple[int, str]] = []
            waiting = n = 0

            def flush():
                for (label, text), ids in zip(pending, tokenizer.encode_batch([t for _, t in pending]), strict=True):
                    writers[label].add(ids, len(text.encode()))
                pending.clear()

            for n, (text, hash_, _) in enumerate(self.reading.texts(), 1):
                if n > len(hashes) or hashes[n - 1] != hash_:
                    raise self._changed()
                if label := labels[n - 1]:
                    pending.append((label, text))
                    waiting += len(text)
                    if waiting > ENCODE_CHARS:
                        flush()
                        waiting = 0
            if n != len(hashes):
                raise self._changed()
            flush()
            shards = {split: dataclasses.asdict(writers[label].finish()) for split, label in SPLITS.items()}
        write_atomic(self.out, json.dumps({"key": self.key, **shards}).encode())

    def result(self) -> dict[str, Shard]:
        """The shard of each split."""
        receipt = json.loads(self.out.read_bytes())
        return {split: Shard(**receipt[split]) for split in SPLITS}

    def _changed(self) -> UserError:
        return UserError(f"{self.reading.parts[0].path}: changed while it was prepared; run `lm prepare` again")


Job = ScanJob | TokenizeJob


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def run_jobs(jobs: Sequence[Job], workers: int, tick: Callable[[int], None]) -> None:
    """Does what is not done yet, in up to `workers` processes. tick: called with the bytes of each finished job."""
    todo = [job for job in jobs if not job.done()]
    tick(sum(j.n_bytes for j in jobs) - sum(j.n_bytes for j in todo))
    if min(workers, len(todo)) <= 1:
        for job in todo:
            job.run()
            tick(job.n_bytes)
        return
    # Not fork: the parent may hold the threads of TensorFlow and JAX.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(job.run): job for job in todo}
        try:
            for future in as_completed(futures):
                future.result()
                tick(futures[future].n_bytes)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process of prepare died: out of memory, or a script without `if __name__ == '__main__':`; "
                "what is finished is kept; try fewer data.workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for its next job for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
