"""The second of two jobs that worker processes do for `prepare`: tokenise the documents of a shard that stay."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.data.documents.reading import Entry, Reading
from lm.data.prepare.pool import in_order
from lm.data.prepare.scan import OVERLAP, utf8_size
from lm.data.store.splits import SPLITS, TRAIN, VALIDATION
from lm.data.store.tokens import Shard, ShardWriter, check_shard_files
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.literal import use_one_thread
from lm.data.tokenizer.open import read_prepared
from lm.errors import UserError
from lm.files import write_atomic

ENCODE_CHARS = 1 << 20  # documents are handed to the tokenizer in batches of this size


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """Tokenises a shard. labels uint8 [n]: DROP, TRAIN or VALIDATION for each document of the reading. key: what the
    result depends on. threads: that encode; a single large file that cannot be cut is not held up by one core."""

    reading: Reading
    scan: Path
    labels: np.ndarray
    tokenizer: Path
    dtype: str
    folder: Path
    shard: int
    out: Path
    key: str
    threads: int = 1

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
        self.out.unlink(missing_ok=True)  # of other files under the names that are written now
        tokenizer = _tokenizer(self.tokenizer, self.tokenizer.stat().st_mtime_ns)
        with np.load(self.scan) as z:
            hashes, codes = z["hashes"].tolist(), z["codes"]
            reasons = json.loads(z["rest"].tobytes())["reasons"]
        # The others were hashed as they are after the filters, which therefore run again.
        filtered = np.isin(codes, [i for i, reason in enumerate(reasons) if reason not in ("", "empty", OVERLAP)])
        again = iter(filtered.tolist())
        entries = (e for part in self.reading.parts for e in self.reading.entries(part, again))
        with (
            ShardWriter(self.folder / "train", self.shard, self.dtype, tokenizer.eos_id) as train,
            ShardWriter(self.folder / "validation", self.shard, self.dtype, tokenizer.eos_id) as validation,
        ):
            writers = {TRAIN: train, VALIDATION: validation}

            def encode(batch: list[tuple[int, str]]) -> list[list[int]]:
                return tokenizer.encode_batch([text for _, text in batch])

            for batch, encoded in in_order(encode, self._batches(entries, hashes), self.threads):
                for (label, text), ids in zip(batch, encoded, strict=True):
                    writers[label].add(ids, utf8_size(text))
            shards = {split: dataclasses.asdict(writers[label].finish()) for split, label in SPLITS.items()}
        write_atomic(self.out, json.dumps({"key": self.key, **shards}).encode())

    def _batches(self, entries: Iterator[Entry], hashes: list[int]) -> Iterator[list[tuple[int, str]]]:
        """Yields labels and texts of the documents to keep. UserError where an entry is not what was scanned."""
        labels, n, waiting = self.labels.tolist(), 0, 0
        batch: list[tuple[int, str]] = []
        for n, entry in enumerate(entries, 1):
            if n > len(hashes) or hashes[n - 1] != entry.hash:
                raise self._changed()
            if label := labels[n - 1]:
                batch.append((label, entry.text))
                waiting += len(entry.text)
                if waiting > ENCODE_CHARS:
                    yield batch
                    batch, waiting = [], 0
        if n != len(hashes):
            raise self._changed()
        yield batch

    def result(self) -> dict[str, Shard]:
        """The shard of each split."""
        receipt = json.loads(self.out.read_bytes())
        return {split: Shard(**receipt[split]) for split in SPLITS}

    def _changed(self) -> UserError:
        return UserError(f"{self.reading.parts[0].path}: changed while it was prepared; run `lm prepare` again")


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, changed: int) -> Tokenizer:
    """The tokenizer at `path`, read once. changed: when it was, as one process may prepare a folder again."""
    if multiprocessing.parent_process() is not None:
        use_one_thread()
    return read_prepared(path)
