"""The training stream: rows of tokens as a pure function of example ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lm.data.index import VERSION, Mixture, epoch_key, permute
from lm.data.store import Store
from lm.errors import UserError


class Plan(NamedTuple):
    """Where rows come from: source number, epoch and window of each, int64 [n]."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


class Piece(NamedTuple):
    """A run of one document in a row: its tokens offset to offset+length-1, its eos included."""

    document: int
    offset: int
    length: int


class Row(NamedTuple):
    """Provenance of one example."""

    id: int
    source: str
    epoch: int
    window: int
    pieces: list[Piece]


class Stream:
    """Rows of `seq_len + 1` tokens, by example id. Row w of a source starts at token `w * seq_len`: neighbours share
    one token, so that each is a target once. Each source is shuffled anew every epoch, and sources are mixed by
    `weights` (None: by their tokens). Ids have no end."""

    def __init__(self, stores: Mapping[str, Store], *, weights: Mapping[str, float] | None, seq_len: int, seed: int):
        if seq_len < 1:
            raise UserError(f"seq_len: expected at least 1, got {seq_len}")
        if weights is not None and set(weights) != set(stores):
            raise UserError(f"weights: expected one for each of {sorted(stores)}, got {sorted(weights)}")
        self.seq_len, self.seed = seq_len, seed
        self.names = sorted(stores)
        self.stores = [stores[name] for name in self.names]
        tokenizers = {s.meta.tokenizer for s in self.stores}
        if len(tokenizers) > 1:
            raise UserError(f"stores: expected one tokenizer, got {len(tokenizers)}; run `lm prepare --force`")
        self.n_windows = [(s.n_tokens - 1) // seq_len for s in self.stores]
        for store, n in zip(self.stores, self.n_windows, strict=True):
            if n < 1:
                raise UserError(
                    f"{store.path}: expected more than seq_len={seq_len} tokens, got {store.n_tokens}; lower seq_len "
                    "or add text"
                )
        shares = {n: float(weights[n] if weights else s.n_tokens) for n, s in zip(self.names, self.stores, strict=True)}
        self._mixture = Mixture(shares)
        self.fingerprint: dict[str, Any] = {
            "order_version": VERSION,
            "seed": seed,
            "seq_len": seq_len,
            "tokenizer": self.stores[0].meta.tokenizer,
            "weights": shares,
            "stores": {n: s.fingerprint for n, s in zip(self.names, self.stores, strict=True)},
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """UserError when a checkpoint's fingerprint is not of this stream: going on would repeat and skip text."""
        for name, now in self.fingerprint.items():
            then = saved.get(name)
            if then != now:
                raise UserError(
                    f"data.{name}: expected {then!r} as when the checkpoint was written, got {now!r}; restore that "
                    "setting or corpus, or start a new run from these weights"
                )

    def plan(self, ids: np.ndarray) -> Plan:
        """ids int64 [n] -> where each row is. Costs some 20 numpy calls per source, so ask for many at once."""
        ids = np.asarray(ids, np.int64)
        source, drawn = self._mixture(ids)
        epoch, window = np.empty_like(drawn), np.empty_like(drawn)
        for s, (name, n) in enumerate(zip(self.names, self.n_windows, strict=True)):
            mine = np.flatnonzero(source == s)
            if len(mine):
                e, position = np.divmod(drawn[mine], n)
                same = e[:1] if e[0] == e[-1] and (e == e[0]).all() else e
                epoch[mine], window[mine] = e, permute(position, n, epoch_key(self.seed, name, same))
        return Plan(source, epoch, window)

    def read(self, plan: Plan) -> np.ndarray:
        """-> int32 [n, seq_len + 1]."""
        out = np.empty((len(plan.source), self.seq_len + 1), np.int32)
        for s, store in enumerate(self.stores):
            mine = np.flatnonzero(plan.source == s)
            if len(mine):
                store.read_windows(plan.window[mine] * self.seq_len, out, mine)
        return out

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """ids int64 [n] -> int32 [n, seq_len + 1]."""
        return self.read(self.plan(ids))

    def where(self, ids: np.ndarray) -> list[Row]:
        """The documents in each row, as numbers in the source's store and offsets in the document."""
        plan = self.plan(ids)
        return [
            Row(int(i), self.names[s], int(e), int(w), _pieces(self.stores[s], int(w) * self.seq_len, self.seq_len + 1))
            for i, s, e, w in zip(np.asarray(ids), *plan, strict=True)
        ]


def _pieces(store: Store, start: int, length: int) -> list[Piece]:
    pieces, at, end = [], start, start + length
    while at < end:
        if at == 0:  # the opening eos is of no document
            at = 1
            continue
        document = store.document_at(at)
        first = store.document_start(document)
        last = store.n_tokens if document + 1 == store.n_documents else store.document_start(document + 1)
        pieces.append(Piece(document, at - first, min(last, end) - at))
        at = min(last, end)
    return pieces
