"""The end of a preparation: the tokenizer, what is left of each source, and the meta of its stores."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

from lm.data.config import Data
from lm.data.made_from import made_from, raw_digest, splits, tokenizer_made_from
from lm.data.prepare.scan import ScanJob
from lm.data.prepare.select import Selection
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.store.splits import SPLITS
from lm.data.store.tokens import StoreMeta, docs_name, dtype_for, tokens_name, write_meta
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.open import open_tokenizer
from lm.errors import UserError
from lm.files import Log, write_atomic


def check_left(data: Data, selection: Selection) -> None:
    name, n, left_out = selection.name, selection.n_kept, selection.left_out()
    if n == 0:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        only_empty = not left_out.keys() - {"empty", "duplicates"}
        raise UserError(
            f"data.sources[{name!r}]: expected text, got {len(selection.labels)} documents, "
            + ("all empty; check the source" if only_empty else f"none left: {why}; see {data.path}/{name}/report.json")
        )
    for split, label in SPLITS.items():
        if split in splits(data) and not (selection.labels == label).any():
            raise UserError(
                f"data.sources[{name!r}]: expected documents in {split}, got none: all of {n} fell elsewhere with "
                f"validation_fraction={data.validation_fraction}; change it, or cut the text into more documents"
            )


def make_tokenizer(data: Data, scans: dict[str, list[ScanJob]], log: Log) -> None:
    path = Path(data.path)
    tokenizer: Tokenizer
    if isinstance(data.tokenizer, str):
        tokenizer = open_tokenizer(data.tokenizer)
        end = tokenizer.pieces([tokenizer.eos_id])[0]
        log(f"tokenizer: {data.tokenizer} of {tokenizer.vocab_size} ids; {end} ({tokenizer.eos_id}) ends a document")
    else:
        sample = list(dict.fromkeys(text for jobs in scans.values() for j in jobs for text in j.result().sample))
        n_bytes, began = sum(len(t.encode()) for t in sample), time.monotonic()
        log(f"tokenizer: learning {data.tokenizer.vocab_size} {data.tokenizer.kind} pieces from {n_bytes / 1e6:.1f} MB")
        tokenizer = data.tokenizer.train(sample)
        log(f"tokenizer: learnt in {time.monotonic() - began:.1f} s")
    settings = {"made_from": tokenizer_made_from(data), "fingerprint": tokenizer.fingerprint}
    write_atomic(path / "tokenizer.json", json.dumps(settings, indent=1).encode())
    write_atomic(path / "tokenizer.model", tokenizer.to_bytes())


def finish_source(
    data: Data,
    name: str,
    jobs: list[TokenizeJob],
    selection: Selection,
    tokenizer: Tokenizer,
    log: Log,
) -> None:
    results, counts = [j.result() for j in jobs], selection.counts()
    corpus = hashlib.sha256(selection.hashes.astype("<u8").tobytes()).hexdigest()
    folder = Path(data.path, name)
    for split in reversed(splits(data)):
        shards = tuple(r[split] for r in results)
        write_meta(
            folder / split,
            StoreMeta(
                dtype=dtype_for(tokenizer.vocab_size),
                tokenizer=tokenizer.fingerprint,
                corpus=corpus,
                made_from=made_from(data, name),
                raw=raw_digest(data, name),
                counts=counts,
                shards=shards,
            ),
        )
        ours = {"meta.json", *(name(i) for i in range(len(shards)) for name in (tokens_name, docs_name))}
        for path in (folder / split).iterdir():
            if path.name not in ours:  # half-written by a run that was killed
                path.unlink()
        n_tokens, n_bytes = sum(s.n_tokens for s in shards), sum(s.n_bytes for s in shards)
        n_documents = sum(s.n_documents for s in shards)
        log(f"{name}/{split}: {n_documents} documents, {n_tokens} tokens, {n_bytes / n_tokens:.2f} bytes a token")
    if "validation" not in splits(data):
        shutil.rmtree(folder / "validation", ignore_errors=True)
