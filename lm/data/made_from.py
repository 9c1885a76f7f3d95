"""The settings that decide what is in a prepared corpus, as they are stored with it.

Keys and values are compared with those of corpora that were made long ago: they change with what they describe and not
with the names of this code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lm.data.documents.filters import Filter
from lm.data.documents.near_duplicates import NearDuplicates
from lm.data.documents.overlap import Overlap
from lm.data.sources.base import Source
from lm.data.store.splits import SPLITS
from lm.data.tokenizer.sentencepiece import SentencePiece


class Settings(Protocol):
    """What a corpus is made from, as `Data` says it."""

    @property
    def path(self) -> str: ...
    @property
    def cache(self) -> str | None: ...
    @property
    def sources(self) -> Mapping[str, Source]: ...
    @property
    def tokenizer(self) -> SentencePiece | str: ...
    @property
    def validation_fraction(self) -> float: ...
    @property
    def invalid_utf8(self) -> str: ...
    @property
    def on_error(self) -> str: ...
    @property
    def max_document_bytes(self) -> int: ...
    @property
    def filters(self) -> Sequence[Filter]: ...
    @property
    def near_duplicates(self) -> NearDuplicates | None: ...
    @property
    def overlap(self) -> Overlap | None: ...


def splits(data: Settings) -> list[str]:
    return list(SPLITS) if data.validation_fraction else ["train"]


def made_from(data: Settings, name: str) -> dict[str, Any]:
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


def tokenizer_made_from(data: Settings) -> dict[str, Any]:
    return dataclasses.asdict(data.tokenizer) if isinstance(data.tokenizer, SentencePiece) else {"path": data.tokenizer}


def raw_digest(data: Settings, name: str) -> str | None:
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
