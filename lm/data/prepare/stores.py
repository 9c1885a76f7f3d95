"""The end of a preparation: the tokenizer, what is left of each source, and the meta of its stores."""

from __future__ import annotations

import hashlib
import json
import shutil
import time

from lm.data.corpus import check_tokenizer
from lm.data.made_from import CorpusSpec
from lm.data.prepare.manifest import Manifest
from lm.data.prepare.scan import MENDED, ScanJob
from lm.data.prepare.select import Selection
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.store.tokens import META, StoreMeta, docs_name, dtype_for, tokens_name, write_meta
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.open import open_tokenizer, read_prepared
from lm.errors import UserError
from lm.files import Log, write_atomic

MOST_INVALID = 0.01  # of documents: above that a source is in another encoding, or no text


def check_left(spec: CorpusSpec, selection: Selection) -> None:
    """Raises UserError where nothing is left of a source, or of one of its splits."""
    name, n, left_out = selection.name, selection.n_kept, selection.left_out()
    if n == 0:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        only_empty = not left_out.keys() - {"empty", "duplicates"}
        raise UserError(
            f"data.sources[{name!r}]: expected text, got {len(selection.labels)} documents, "
            + ("all empty; check the source" if only_empty else f"none left: {why}; see {spec.folder.report(name)}")
        )
    for split, label in spec.splits.items():
        if not (selection.labels == label).any():
            raise UserError(
                f"data.sources[{name!r}]: expected documents in {split}, got none: all of {n} fell elsewhere with "
                f"validation_fraction={spec.validation_fraction}; change it, or cut the text into more documents"
            )


def check_text(spec: CorpusSpec, selection: Selection) -> None:
    """Raises UserError for a source that looks as if it were no text: with NUL in its first megabyte, or with more than
    MOST_INVALID of its documents no UTF-8. Such documents would be garbage that nobody misses."""
    name, scans, source = selection.name, selection.scans, spec.sources[selection.name]
    if source.not_text == "keep":
        return
    keep = f"set {type(source).__name__}(not_text='keep') to keep them"
    if scans[0].first_nul and not source.escapes_nul:
        raise UserError(
            f"data.sources[{name!r}]: expected text, got NUL in its first megabyte, at {scans[0].first_nul}; leave "
            f"such documents out with data.filters=(Without(),), or {keep}"
        )
    n, n_mended = sum(s.n_documents for s in scans), sum(s.n_mended for s in scans)
    if n_mended > MOST_INVALID * n:
        first = next(s.examples[MENDED][0] for s in scans if s.n_mended)
        raise UserError(
            f"data.sources[{name!r}]: expected text in UTF-8, got other bytes in {n_mended} of {n} documents "
            f"({n_mended / n:.1%}), the first at {first}; convert them (iconv -f LATIN1 -t UTF-8), leave them out with "
            f"data.invalid_utf8=error data.on_error=skip, or {keep} with U+FFFD in place of these bytes"
        )


def known_tokenizer(spec: CorpusSpec) -> Tokenizer | None:
    """The tokenizer that the corpus has already, or that the config names; None where one is learnt. UserError where it
    is not the one of the config, and as `open_tokenizer`."""
    path = spec.folder.tokenizer
    if path.is_file():
        tokenizer = read_prepared(path)
        check_tokenizer(spec, tokenizer, path)
        return tokenizer
    return open_tokenizer(spec.tokenizer) if isinstance(spec.tokenizer, str) else None


def make_tokenizer(spec: CorpusSpec, known: Tokenizer | None, scans: list[ScanJob], log: Log) -> Tokenizer:
    """The corpus's tokenizer, which is written if it is not there: the one that is `known`, or one that is learnt from
    what the scans kept."""
    if spec.folder.tokenizer.is_file() and known is not None:
        return known
    tokenizer: Tokenizer
    if isinstance(spec.tokenizer, str):
        tokenizer = known or open_tokenizer(spec.tokenizer)
        end = tokenizer.pieces([tokenizer.eos_id])[0]
        log(f"tokenizer: {spec.tokenizer} of {tokenizer.vocab_size} ids; {end} ({tokenizer.eos_id}) ends a document")
    else:
        # Shards may hold the same excerpt.
        sample = list(dict.fromkeys(text for job in scans for text in job.result().sample))
        n_bytes, began = sum(len(t.encode()) for t in sample), time.monotonic()
        log(f"tokenizer: learning {spec.tokenizer.vocab_size} {spec.tokenizer.kind} pieces from {n_bytes / 1e6:.1f} MB")
        tokenizer = spec.tokenizer.train(sample)
        log(f"tokenizer: learnt in {time.monotonic() - began:.1f} s")
    settings = {"made_from": spec.tokenizer_made_from(), "fingerprint": tokenizer.fingerprint}
    # First: a tokenizer without settings would pass for one that was made elsewhere.
    write_atomic(spec.folder.tokenizer_settings, json.dumps(settings, indent=1).encode())
    write_atomic(spec.folder.tokenizer, tokenizer.to_bytes())
    return tokenizer


def finish_source(
    spec: CorpusSpec, manifest: Manifest, jobs: list[TokenizeJob], selection: Selection, tokenizer: Tokenizer, log: Log
) -> None:
    """Writes the meta of a source's stores, which makes them whole, the training split last: who sees it sees all. What
    they are made from is what the manifest says, whatever has become of the raw files since."""
    name, results, counts = selection.name, [j.result() for j in jobs], selection.counts()
    corpus = hashlib.sha256(selection.hashes.astype("<u8").tobytes()).hexdigest()
    for split in reversed(spec.splits):
        shards = tuple(r[split] for r in results)
        folder = spec.folder.store(name, split)
        write_meta(
            folder,
            StoreMeta(
                dtype=dtype_for(tokenizer.vocab_size),
                tokenizer=tokenizer.fingerprint,
                corpus=corpus,
                made_from=manifest.settings["sources"][name],
                raw=manifest.raw[name],
                counts=counts,
                shards=shards,
            ),
        )
        ours = {META, *(name(i) for i in range(len(shards)) for name in (tokens_name, docs_name))}
        for path in folder.iterdir():
            if path.name not in ours:  # half-written by a run that was killed
                path.unlink()
        n_tokens, n_bytes = sum(s.n_tokens for s in shards), sum(s.n_bytes for s in shards)
        n_documents = sum(s.n_documents for s in shards)
        log(f"{name}/{split}: {n_documents} documents, {n_tokens} tokens, {n_bytes / n_tokens:.2f} bytes a token")
    if "validation" not in spec.splits:
        # Of a preparation that had a validation split.
        shutil.rmtree(spec.folder.store(name, "validation"), ignore_errors=True)
