"""What a run trains on, as it is said in a config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lm.data.documents.filters import Filter
from lm.data.documents.near_duplicates import NearDuplicates
from lm.data.documents.overlap import Overlap
from lm.data.folder import RESERVED
from lm.data.made_from import CorpusSpec
from lm.data.sources.base import MAX_DOCUMENT_BYTES, Source
from lm.data.stream.batches import BatchPhase, BatchSchedule
from lm.data.stream.exclude import Exclude, ExcludeDocuments
from lm.data.stream.mixture import Phase, as_phases, mean_weight
from lm.data.tokenizer.sentencepiece import SentencePiece
from lm.errors import UserError, positive
from lm.files import is_remote
from lm.renamed import Renaming


@dataclass(frozen=True, kw_only=True)
class Data(metaclass=Renaming):
    """What a run trains on.

    path: folder of the prepared corpus, on a local disk; or the url of one in an object store (`gs://bucket/corpus`),
    which is only read, and copied once to a folder of its own in `cache` (None: ~/.cache/lm/corpora). sources: by name,
    which is also their folder. tokenizer: how to train one, or the path of one: a .model of ours, a tokenizer.json or a
    folder of Hugging Face, or the folder of a run, such as an imported model to go on from (`lm.data.tokenizer.open`).
    Its end of text separates documents; nothing else is put around them, and what they spell is text, special tokens
    included.

    weights: shares by source, for the whole run or in phases; None: all epochs end together. weigh: shares of examples,
    or of tokens, which differs where packed rows are not full. packing: rows are windows of the text, or whole
    documents by best fit (`lm.data.stream.packing`). epochs: how often a source may be read; none: without limit.
    when_exhausted: a run that needs more is refused, or other sources take over while there are any. exclude: documents
    and examples to leave out (`lm.data.stream.exclude`). batch_size: global, in sequences. ramp: phases before it with
    smaller batches or shorter rows (`lm.data.stream.batches`). validation_fraction: share of documents, chosen by hash
    of their content; 0: none. invalid_utf8: bytes that are no UTF-8 become U+FFFD and their documents are counted, or
    are refused; more than 1% of such documents are refused but for sources with not_text="keep". seed: of the order
    only. workers: processes of `prepare`; None: one per CPU.

    on_error: a line that is no JSON, a missing field, a file that breaks off or is no text, a document above
    max_document_bytes, and UTF-8 that is refused, stop `prepare`; or they are left out and counted in the report.
    filters: in order, on each document. near_duplicates: of what is left, all but the first go. overlap: documents that
    hold text of evaluations are counted, or go.
    """

    renamed: ClassVar[Mapping[str, str]] = {"plan": "packing"}  # stored runs and older recipes say so
    renamed_values: ClassVar[Mapping[str, Mapping[Any, Any]]] = {"packing": {"windows": "split"}}

    path: str
    cache: str | None = None
    sources: dict[str, Source]
    tokenizer: SentencePiece | str
    weights: dict[str, float] | tuple[Phase, ...] | None = None
    weigh: Literal["examples", "tokens"] = "examples"
    packing: Literal["split", "best_fit"] = "split"
    epochs: dict[str, float] | None = None
    when_exhausted: Literal["refuse", "hand_over"] = "refuse"
    exclude: tuple[Exclude, ...] = ()
    seq_len: int
    batch_size: int
    ramp: tuple[BatchPhase, ...] = ()
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
            # A folder's name; a dot in front is of our own hidden files.
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name in RESERVED:
                raise UserError(f"data.sources: expected names fit for a folder, got {name!r}; rename it")
            if not isinstance(source, Source):
                raise UserError(f"data.sources[{name!r}]: expected a Source, got {source!r}")
            if source.not_text not in ("refuse", "keep"):
                raise UserError(
                    f"data.sources[{name!r}].not_text: expected 'refuse' or 'keep', got {source.not_text!r}"
                )
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
            ("packing", ("split", "best_fit")),
            ("when_exhausted", ("refuse", "hand_over")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"data.{name}: expected one of {known}, got {getattr(self, name)!r}")
        positive("data", self, "seq_len", "batch_size", "workers")
        BatchSchedule.of(self)
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

    @property
    def corpus(self) -> CorpusSpec:
        """The part that says what the corpus is made of. `Stream.of` and `BatchSchedule.of` take the others."""
        phases = as_phases(self.weights, self.sources) if self.weights else None
        return CorpusSpec(
            path=self.path,
            cache=self.cache,
            sources=self.sources,
            tokenizer=self.tokenizer,
            shares=None if phases is None else {name: mean_weight(phases, name) for name in self.sources},
            validation_fraction=self.validation_fraction,
            invalid_utf8=self.invalid_utf8,
            on_error=self.on_error,
            max_document_bytes=self.max_document_bytes,
            filters=self.filters,
            near_duplicates=self.near_duplicates,
            overlap=self.overlap,
        )
