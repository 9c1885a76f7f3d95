"""What a run trains on, as it is said in a config, and the prepared corpus that answers to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm.data.dedup import NearDuplicates
from lm.data.exclude import Exclude, ExcludeDocuments
from lm.data.files import is_remote
from lm.data.filters import Filter
from lm.data.open_tokenizer import open_tokenizer, prepared_settings, read_prepared, there
from lm.data.overlap import Overlap
from lm.data.progress import Log
from lm.data.ramp import Ramp, Stage
from lm.data.schedule import Phase, as_phases
from lm.data.sources import MAX_DOCUMENT_BYTES, Source
from lm.data.stage import stage_corpus
from lm.data.store import Store
from lm.data.tokenizer import SentencePiece, Tokenizer
from lm.data.work import SPLITS
from lm.errors import UserError

RESERVED = ("raw", "lock", "tokenizer.model", "tokenizer.json")  # what else lies in the folder of a corpus


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on.

    path: folder of the prepared corpus, on a local disk; or the url of one in an object store (`gs://bucket/corpus`),
    which is only read, and copied once to a folder of its own in `cache` (None: ~/.cache/lm/corpora). sources: by name,
    which is also their folder. tokenizer: how to train one, or the path of one: a .model of ours, a tokenizer.json or a
    folder of Hugging Face, or the folder of a run, such as an imported model to go on from (`lm.data.open_tokenizer`).
    Its end of text separates documents; nothing else is put around them, and what they spell is text, special tokens
    included.

    weights: shares by source, for the whole run or in phases; None: all epochs end together. weigh: shares of examples,
    or of tokens, which differs where packed rows are not full. plan: rows are windows of the text, or whole documents
    by best fit (`lm.data.pack`). epochs: how often a source may be read; none for it: without limit. when_exhausted: a
    run that needs more is refused, or other sources take over while there are any. exclude: documents and examples to
    leave out (`lm.data.exclude`). batch_size: global, in sequences. ramp: stages before it with smaller batches or
    shorter rows (`lm.data.ramp`). validation_fraction: share of documents, chosen by hash of their content; 0: none.
    invalid_utf8: bytes that are no UTF-8 become U+FFFD and their documents are counted, or are refused. seed: of the
    order only. workers: processes of `prepare`; None: one per CPU.

    on_error: a line that is no JSON, a missing field, a file that breaks off, a document above max_document_bytes, and
    UTF-8 that is refused, stop `prepare`; or they are left out and counted in the report. filters: in order, on each
    document. near_duplicates: of what is left, all but the first go. overlap: documents that hold text of evaluations
    are counted, or go.
    """

    path: str
    cache: str | None = None
    sources: dict[str, Source]
    tokenizer: SentencePiece | str
    weights: dict[str, float] | tuple[Phase, ...] | None = None
    weigh: Literal["examples", "tokens"] = "examples"
    plan: Literal["windows", "best_fit"] = "windows"
    epochs: dict[str, float] | None = None
    when_exhausted: Literal["refuse", "hand_over"] = "refuse"
    exclude: tuple[Exclude, ...] = ()
    seq_len: int
    batch_size: int
    ramp: tuple[Stage, ...] = ()
    validation_fraction: float = 0.01
    invalid_utf8: Literal["replace", "error"] = "replace"
    on_error: Literal["refuse", "skip"] = "refuse"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    filters: tuple[Filter, ...] = ()
    near_duplicates: NearDuplicates | None = None
    overlap: Overlap | None = None
    seed: int = 0
    workers: int | None = None

    def __post_init__(self):
        if not self.sources:
            raise UserError("data.sources: expected at least one, got none; add e.g. {'stdlib': Stdlib()}")
        if self.cache is not None and is_remote(self.cache):
            raise UserError(
                f"data.cache: expected a local folder, since stores are memory-mapped, got {self.cache!r}; name one on "
                "each host's disk"
            )
        for field in ("path", "tokenizer"):
            if getattr(self, field) == "":
                raise UserError(f"data.{field}: expected a path, got an empty one; name it")
        for name, source in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name in RESERVED:
                raise UserError(f"data.sources: expected names fit for a folder, got {name!r}; rename it")
            if not isinstance(source, Source):
                raise UserError(f"data.sources[{name!r}]: expected a Source, got {source!r}")
        if self.weights is not None:
            as_phases(self.weights, self.sources, "data.weights")
        for name, epochs in (self.epochs or {}).items():
            if name not in self.sources or not 0 < epochs < math.inf:
                raise UserError(
                    f"data.epochs: expected positive numbers for some of {sorted(self.sources)}, got {name!r}: {epochs}"
                )
        for e in self.exclude:
            if isinstance(e, ExcludeDocuments) and e.source not in self.sources:
                raise UserError(f"data.exclude: expected a source of {sorted(self.sources)}, got {e.source!r}")
        for name, known in (
            ("weigh", ("examples", "tokens")),
            ("plan", ("windows", "best_fit")),
            ("when_exhausted", ("refuse", "hand_over")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"data.{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name, value in (("seq_len", self.seq_len), ("batch_size", self.batch_size), ("workers", self.workers or 1)):
            if value < 1:
                raise UserError(f"data.{name}: expected at least 1, got {value}")
        Ramp.of(self)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction: expected 0 <= x < 1, got {self.validation_fraction}")
        if self.invalid_utf8 not in ("replace", "error"):
            raise UserError(f"data.invalid_utf8: expected 'replace' or 'error', got {self.invalid_utf8!r}")
        if self.on_error not in ("refuse", "skip"):
            raise UserError(f"data.on_error: expected 'refuse' or 'skip', got {self.on_error!r}")
        if self.max_document_bytes < 1:
            raise UserError(f"data.max_document_bytes: expected at least 1, got {self.max_document_bytes}")
        for f in self.filters:
            if not isinstance(f, Filter):
                raise UserError(f"data.filters: expected Filters, got {f!r}; write e.g. (Length(min_chars=200),)")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus. validation: empty with validation_fraction=0. fingerprint: of tokenizer and each store."""

    tokenizer: Tokenizer
    train: dict[str, Store]
    validation: dict[str, Store]
    fingerprint: dict[str, str]


def open_corpus(data: Data, log: Log = print) -> Corpus:
    """The corpus at `data.path`. UserError when it is unfinished, damaged in size, or made with other settings; and as
    `stage_corpus` for one in an object store. log: of what is copied from there."""
    if not is_remote(data.path):
        return _open(data)
    named = [f"{name}/{split}" for name in data.sources for split in splits(data)]
    copy = stage_corpus(data.path, named, cache=data.cache, log=log)
    try:
        return _open(dataclasses.replace(data, path=str(copy)))
    except UserError as e:
        raise UserError(
            f"{e} (where that corpus is made; this is the copy of {data.path}: copy it there again and delete this one)"
        ) from None


def _open(data: Data) -> Corpus:
    path = Path(data.path)
    if not (path / "tokenizer.model").is_file():
        raise UserError(f"{path}: expected a prepared corpus, got no tokenizer.model there; run `lm prepare`")
    tokenizer = read_prepared(path / "tokenizer.model")
    check_tokenizer(data, tokenizer)
    stores: dict[str, dict[str, Store]] = {split: {} for split in SPLITS}
    for name in data.sources:
        for split in splits(data):
            folder = path / name / split
            if not (folder / "meta.json").is_file():
                raise UserError(f"{folder}: expected a prepared store, got no meta.json there; run `lm prepare`")
            stores[split][name] = store = Store(folder)
            _check_store(data, name, store, tokenizer)
    fingerprint = {f"{n}/{split}": s.fingerprint for split, named in stores.items() for n, s in named.items()}
    return Corpus(tokenizer=tokenizer, fingerprint={"tokenizer": tokenizer.fingerprint} | fingerprint, **stores)


def splits(data: Data) -> list[str]:
    return list(SPLITS) if data.validation_fraction else ["train"]


def made_from(data: Data, name: str) -> dict[str, Any]:
    """The settings that decide what is in a store. One that is not set is None, which an older store need not have."""
    settings = {
        "source": _described(data.sources[name]),
        "validation_fraction": data.validation_fraction,
        "invalid_utf8": data.invalid_utf8,
        "skip_errors": {"max_document_bytes": data.max_document_bytes} if data.on_error == "skip" else None,
        "filters": [_described(f) for f in data.filters] or None,
        "near_duplicates": data.near_duplicates and _described(data.near_duplicates),
        "overlap": data.overlap and _described(data.overlap),
    }
    return json.loads(json.dumps(settings))


def _described(value: Any) -> Any:
    """A dataclass as a dict with the name of its class, and of the classes inside."""
    if isinstance(value, dict):
        return {k: _described(v) for k, v in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    return {"type": type(value).__name__} | {
        f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)
    }


def tokenizer_made_from(data: Data) -> dict[str, Any]:
    return dataclasses.asdict(data.tokenizer) if isinstance(data.tokenizer, SentencePiece) else {"path": data.tokenizer}


def raw_digest(data: Data, name: str) -> str | None:
    """Of the raw files and those that filters read; None when that cannot be told or some are not here."""
    identity = data.sources[name].identity()
    paths = [Path(p) for f in data.filters for p in f.files()]
    if identity is None or not all(p.is_file() for p in paths):
        return None
    if not paths:
        return digest(identity)
    return digest([identity, [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_tokenizer(data: Data, tokenizer: Tokenizer) -> None:
    path = Path(data.path, "tokenizer.model")
    if isinstance(data.tokenizer, str):
        if there(data.tokenizer) and (wanted := open_tokenizer(data.tokenizer).fingerprint) != tokenizer.fingerprint:
            raise UserError(
                f"{path}: expected tokenizer {data.tokenizer} ({wanted[:12]}), got {tokenizer.fingerprint[:12]}; "
                "set data.path to another folder or run `lm prepare --force`"
            )
        return
    saved = prepared_settings(path)
    _same(f"{path}: tokenizer", tokenizer_made_from(data), saved.get("made_from"))
    if saved.get("fingerprint") != tokenizer.fingerprint:
        raise UserError(
            f"{path}: expected fingerprint {str(saved.get('fingerprint'))[:12]}, got {tokenizer.fingerprint[:12]}; "
            "copy it again or run `lm prepare --force`"
        )


def _check_store(data: Data, name: str, store: Store, tokenizer: Tokenizer) -> None:
    if store.meta.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{store.path}: expected tokens of tokenizer {tokenizer.fingerprint[:12]}, got of "
            f"{store.meta.tokenizer[:12]}; delete {store.path.parent} and run `lm prepare`"
        )
    _same(f"{store.path}", made_from(data, name), store.meta.made_from)


def check_raw(data: Data, name: str) -> None:
    folder = Path(data.path, name, "train")
    raw = raw_digest(data, name)
    if raw is not None and raw != (prepared := Store(folder).meta.raw):
        raise UserError(
            f"{folder}: expected raw files {str(prepared)[:12]} of data.sources[{name!r}], got {raw[:12]}: a file was "
            "added, removed or changed; run `lm prepare --force`"
        )


def _same(what: str, expected: dict | None, got: dict | None, at: str = "") -> None:
    for key in [*(expected or {}), *(got or {})]:
        a, b = (expected or {}).get(key), (got or {}).get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _same(what, a, b, f"{at}{key}.")
        elif a != b:
            raise UserError(
                f"{what}: expected {at}{key}={a!r} as in the config, got one made with {b!r}; set data.path to another "
                "folder or run `lm prepare --force`"
            )
