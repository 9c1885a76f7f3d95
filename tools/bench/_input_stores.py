"""Token stores for the benchmarks of the input pipeline: random text, and sparse files of any size."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from lm.data import Store
from lm.data.store.tokens import Shard, StoreMeta, docs_name, tokens_name, write_meta
from lm.data.tokenizer.base import EOS_ID

VOCAB = 32_000
NEWLINE_ID = 3
WORDS_A_LINE = 20
DOCUMENT_TOKENS, DOCUMENT_SIGMA = 400, 1.2  # log-normal, about what web text has: mean 820
SHARD_BYTES = 1 << 30  # of a sparse store


def write_random(folder: Path, n_tokens: int, n_shards: int, seed: int) -> Store:
    """uint16 tokens that no compression shortens, in lines and documents."""
    rng, shards = np.random.default_rng(seed), []
    folder.mkdir(parents=True)
    for i in range(n_shards):
        n = n_tokens // n_shards
        tokens = rng.integers(NEWLINE_ID + 1, VOCAB, n, dtype=np.uint16)
        tokens[np.cumsum(rng.geometric(1 / WORDS_A_LINE, 2 * n // WORDS_A_LINE)).clip(max=n - 1)] = NEWLINE_ID
        lengths = rng.lognormal(np.log(DOCUMENT_TOKENS), DOCUMENT_SIGMA, n // DOCUMENT_TOKENS).astype(np.int64) + 2
        ends = np.cumsum(lengths)  # the position after each eos
        ends = np.append(ends[ends < n - 1], n)
        tokens[ends - 1] = EOS_ID
        first = int(i == 0)  # the eos that opens a store is of no document
        tokens[0] = EOS_ID if first else tokens[0]
        docs = np.concatenate([[first], ends]).astype("<u8")
        shards.append(_write(folder, i, tokens.astype("<u2").tobytes(), docs.tobytes(), n, len(ends)))
    return _finish(folder, shards)


def write_sparse(folder: Path, n_bytes: int, **of_meta) -> Store:
    """Zeros that take no room on the disk, a document a shard."""
    folder.mkdir(parents=True)
    shards = []
    for i, start in enumerate(range(0, n_bytes, SHARD_BYTES)):
        size = min(SHARD_BYTES, n_bytes - start)
        with open(folder / tokens_name(i), "wb") as f:
            os.truncate(f.fileno(), size)
        np.array([int(i == 0), size // 2], "<u8").tofile(folder / docs_name(i))
        shards.append(_shard(size // 2, 1, "0" * 64, "0" * 64))
    return _finish(folder, shards, **of_meta)


def _write(folder: Path, i: int, tokens: bytes, docs: bytes, n_tokens: int, n_documents: int) -> Shard:
    for name, content in ((tokens_name(i), tokens), (docs_name(i), docs)):
        (folder / name).write_bytes(content)
    return _shard(n_tokens, n_documents, *(hashlib.sha256(x).hexdigest() for x in (tokens, docs)))


def _shard(n_tokens: int, n_documents: int, tokens_sha256: str, docs_sha256: str) -> Shard:
    return Shard(
        n_tokens=n_tokens,
        n_documents=n_documents,
        n_bytes=4 * n_tokens,
        tokens_sha256=tokens_sha256,
        docs_sha256=docs_sha256,
    )


def _finish(folder: Path, shards: list[Shard], **of_meta) -> Store:
    meta = dict(dtype="<u2", tokenizer="none", corpus="none", made_from={}, raw=None, counts={}) | of_meta
    write_meta(folder, StoreMeta(**meta, shards=tuple(shards)))
    return Store(folder)
