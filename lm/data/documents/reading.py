"""From the bytes of a source to texts: decoding, filters, and what to do with entries that cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lm.data.documents.filters import Filter
from lm.data.sources.base import MAX_DOCUMENT_BYTES, Part, Problem, Source
from lm.errors import UserError


class Entry(NamedTuple):
    """What stands at one place of a source. text: as it will be stored, "" where it is left out. hash: 64 bits of that
    text, or of what stands there in its place. reason: "" for a document to keep, else why not. at: file and place, and
    the message where there is one. mended, cleaned: its bytes were no UTF-8; a filter changed it. is_document: it has
    text, whatever becomes of it, and no problem stands there. notes: of its source."""

    text: str
    hash: int
    reason: str
    at: str
    mended: bool = False
    cleaned: bool = False
    is_document: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The documents of one shard: which parts of which source, and what to do with what is wrong or not wanted."""

    source: Source
    parts: tuple[Part, ...]
    invalid_utf8: str
    on_error: str = "refuse"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    filters: tuple[Filter, ...] = ()

    @property
    def n_bytes(self) -> int:
        return sum(p.n_bytes for p in self.parts)

    def entries(self, part: Part, filtered: Iterator[bool] | None = None) -> Iterator[Entry]:
        """Yields all that stands in a part, the documents that are left out included.

        filtered: for each entry whether a filter left it out when it was read before; then only those filters run that
        change what is kept, and only on that. UserError for a problem that is refused.
        """
        filters = [f for f in self.filters if f.rewrites or filtered is None]
        for entry in self.source.entries(part, self.max_document_bytes):
            known_bad = filtered is not None and next(filtered, False)
            if isinstance(entry, Problem):
                if self.on_error == "refuse":
                    raise UserError(entry.message)
                # A file's name may be no UTF-8.
                hash_ = _hash(entry.message.encode(errors="surrogateescape"))
                yield Entry("", hash_, entry.reason, entry.message, is_document=False)
                continue
            raw, mended, notes = entry.raw, False, entry.notes
            try:
                text = raw.decode()
            except UnicodeDecodeError as e:
                if self.invalid_utf8 == "error":
                    message = (
                        f"{part.path}: {entry.place}: expected UTF-8, got {raw[e.start : e.end]!r} at byte {e.start}; "
                        "mend the file or set invalid_utf8='replace'"
                    )
                    if self.on_error == "refuse":
                        raise UserError(message) from None
                    yield Entry("", _hash(raw), "not_utf8", message, notes=notes)
                    continue
                text, mended = raw.decode(errors="replace"), True
                raw = text.encode()  # hashed as it is stored
            at, kept, reason = f"{part.path}: {entry.place}", text, None
            for f in () if known_bad or not text else filters:
                kept, reason = f.apply(kept)
                if reason is not None:
                    break
            if reason is not None or known_bad:
                yield Entry("", _hash(raw), reason or "filtered", at, mended, notes=notes)
            elif kept == text:
                yield Entry(text, _hash(raw), "" if text else "empty", at, mended, False, bool(text), notes)
            else:
                yield Entry(kept, _hash(kept.encode()), "" if kept else "empty", at, mended, True, True, notes)


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
