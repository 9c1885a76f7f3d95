"""What is in a prepared corpus: how long its documents are, whether its files are as written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.corpus import Corpus
from lm.data.folder import RAW, CorpusFolder
from lm.data.store.mirror import find_remote_stores, mirror
from lm.data.store.splits import SPLITS
from lm.data.store.tokens import META, Store
from lm.data.tokenizer.open import prepared_settings
from lm.errors import UserError
from lm.files import is_remote
from lm.system_errors import system_errors

BAR = 40  # characters of the fullest bucket


@system_errors()
def find_stores(path: str | Path) -> dict[str, Store]:
    """ "source/split" -> store, of the folder of a corpus, of a source, or of one store. UserError where there is none,
    and for one that is unfinished or of another size than its meta.json says. Of a corpus in an object store: of its
    copy in the default cache, which is made and compared with its checksums if it is not there."""
    if is_remote(str(path)):
        path = mirror(str(path), find_remote_stores(str(path)))
    path = Path(path)
    if (path / META).is_file():
        return {f"{path.parent.name}/{path.name}": Store(path)}
    folders = [path / split for split in SPLITS if (path / split).is_dir()]
    if not folders:
        sources = sorted(p for p in path.iterdir() if p.is_dir() and p.name != RAW)
        folders = [p / split for p in sources for split in SPLITS if (p / split).is_dir()]
    if not folders:
        raise UserError(
            f"{path}: expected the folder of a prepared corpus, with <source>/train in it, got none; run `lm prepare`"
        )
    return {f"{p.parent.name}/{p.name}": Store(p) for p in folders}


def stores_of(corpus: Corpus) -> dict[str, Store]:
    """Names the stores of a corpus that is open, as `find_stores` does."""
    splits = {"train": corpus.train, "validation": corpus.validation}
    return {f"{name}/{split}": splits[split][name] for name in corpus.train for split in SPLITS if splits[split]}


class Bucket(NamedTuple):
    """How many documents have from `low` to `high` tokens, and how many tokens they have together."""

    low: int
    high: int
    documents: int
    tokens: int


def length_histogram(store: Store) -> list[Bucket]:
    """Counts documents by their tokens without the eos: 0, 1, 2-3, 4-7, and so on, from the first to the last bucket
    that holds any. Reads the offsets, 8 bytes a document, and no tokens."""
    lengths = np.diff(store.document_starts()) - 1
    if not len(lengths):
        return []
    bits = np.frexp(lengths.astype(np.float64))[1]  # of the binary number: 0 for 0, k + 1 from 2^k on
    counts, tokens = np.bincount(bits), np.bincount(bits, weights=lengths)  # float64 is exact below 2^53
    first = int(bits.min())
    return [Bucket(2**k // 2, max(2**k - 1, 0), int(counts[k]), int(tokens[k])) for k in range(first, len(counts))]


def stats(stores: Mapping[str, Store]) -> str:
    """Describes each store by its meta.json: documents, tokens, bytes of text a token; and its lengths."""
    blocks = []
    for name, store in stores.items():
        lines = [
            f"{name}: {store.n_documents:,} documents, {store.n_tokens:,} tokens, {store.n_bytes:,} bytes of text, "
            f"{store.n_bytes / max(1, store.n_tokens):.2f} bytes/token, {len(store.meta.shards)} shard(s)"
        ]
        buckets = length_histogram(store)
        most = max((b.documents for b in buckets), default=0)
        labels = [f"{b.low:,}" if b.low == b.high else f"{b.low:,}-{b.high:,}" for b in buckets]
        width = max(map(len, ["tokens", *labels]))
        lines.append(f"  {'tokens':>{width}}  {'documents':>12}   share")
        for label, b in zip(labels, buckets, strict=True):
            bar = "#" * -(-BAR * b.documents // most)
            share = f"{b.documents / store.n_documents:7.2%}"
            lines.append(f"  {label:>{width}}  {b.documents:>12,}  {share}  {bar}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def verify(stores: Mapping[str, Store]) -> Iterator[str]:
    """Reads every file of every store and yields a line when one is done. UserError names the first file whose checksum
    is not that of meta.json; and the corpus's tokenizer.model and tokenizer.json, where there are any, if the store was
    made with another.
    """
    for name, store in stores.items():
        _check_tokenizer(store)
        store.verify()
        n_tokens, n_offsets = store.n_tokens, store.n_documents + len(store.meta.shards)
        n_bytes = n_tokens * np.dtype(store.meta.dtype).itemsize + n_offsets * 8
        yield f"{name}: {len(store.meta.shards)} shard(s), {n_bytes:,} bytes, as written"


@system_errors()
def _check_tokenizer(store: Store) -> None:
    folder = CorpusFolder(store.path.resolve().parent.parent)
    tokenizer = folder.tokenizer
    if not tokenizer.is_file():
        return
    got = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    if got != store.meta.tokenizer:
        raise UserError(
            f"{tokenizer}: expected sha256 {store.meta.tokenizer[:12]} as {store.path} was made with, got {got[:12]}; "
            "copy it again or run `lm prepare --force`"
        )
    saved = prepared_settings(tokenizer)
    if saved and saved.get("fingerprint") != got:
        raise UserError(
            f"{folder.tokenizer_settings}: expected fingerprint {got[:12]}, of the {tokenizer.name} beside it, "
            f"got {str(saved.get('fingerprint'))[:12]}; copy it again or run `lm prepare --force`"
        )
