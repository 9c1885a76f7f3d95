"""The settings that decide what is in a prepared corpus, as they are stored with it.

Keys and values are compared with those of corpora that were made long ago: they change with what they describe and not
with the names of this code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.data.documents.filters import Filter
from lm.data.documents.near_duplicates import NearDuplicates
from lm.data.documents.overlap import Overlap
from lm.data.folder import CorpusFolder
from lm.data.sources.base import NEVER, WHEN_SET, Source
from lm.data.store.splits import SPLITS, TRAIN
from lm.data.tokenizer.sentencepiece import SentencePiece
from lm.system_errors import refuse


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """The part of `Data` that says what a corpus is made of and where it lies; how it is mixed and batched is not here.
    The fields are those of `Data`, but `shares`: of each source in the sample that the tokenizer learns from, None
    where that goes by size."""

    path: str
    cache: str | None
    sources: Mapping[str, Source]
    tokenizer: SentencePiece | str
    shares: Mapping[str, float] | None
    validation_fraction: float
    invalid_utf8: str
    on_error: str
    max_document_bytes: int
    filters: tuple[Filter, ...]
    near_duplicates: NearDuplicates | None
    overlap: Overlap | None

    @property
    def folder(self) -> CorpusFolder:
        """The folder of the corpus at `path`, which is a local one."""
        return CorpusFolder(Path(self.path))

    @property
    def splits(self) -> dict[str, int]:
        """The splits that each source has, with the labels of their documents."""
        return SPLITS if self.validation_fraction else {"train": TRAIN}

    def made_from(self, name: str) -> dict[str, Any]:
        """The settings that decide what is in a store, as JSON. One that is not set is None, which an older store need
        not have."""
        settings = {
            "source": _described(self.sources[name]),
            "validation_fraction": self.validation_fraction,
            "invalid_utf8": self.invalid_utf8,
            # None where off: older stores lack the key.
            "skip_errors": {"max_document_bytes": self.max_document_bytes} if self.on_error == "skip" else None,
            "filters": [_described(f) for f in self.filters] or None,
            "near_duplicates": self.near_duplicates and _described(self.near_duplicates),
            "overlap": self.overlap and _described(self.overlap),
        }
        return json.loads(json.dumps(settings))  # as it is read back: tuples are lists

    def tokenizer_made_from(self) -> dict[str, Any]:
        """The settings that decide what the tokenizer is."""
        if isinstance(self.tokenizer, SentencePiece):
            return dataclasses.asdict(self.tokenizer)
        return {"path": self.tokenizer}

    def raw_digest(self, name: str, identity: list | None) -> str | None:
        """A digest of what the raw files of a source are known by and of those that filters read; None when that cannot
        be told or some are not here."""
        paths = [Path(p) for f in self.filters for p in f.files()]
        if identity is None or not all(map(os.path.isfile, paths)):
            return None
        return digest([identity, [_sha256(p) for p in paths]] if paths else identity)


def _described(value: Any) -> Any:
    """A dataclass as a dict with the name of its class, and of the classes inside."""
    if isinstance(value, dict):
        return {k: _described(v) for k, v in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    return {"type": type(value).__name__} | {
        f.name: _described(found)
        for f in dataclasses.fields(value)
        for found in [getattr(value, f.name)]
        if f.metadata != NEVER and not (f.metadata == WHEN_SET and found == f.default)
    }


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise refuse(path, e) from None


def digest(value: Any) -> str:
    """The sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
