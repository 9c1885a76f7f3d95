"""Batches of a validation store, in order."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from lm.data.loader.host_rows import HostRows
from lm.data.loader.reader import Examples, another, check_extra, identity
from lm.data.store.tokens import Store
from lm.data.tokenizer.base import PAD_ID


def eval_batches(
    store: Store,
    *,
    seq_len: int,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
    examples: Examples = identity,
    extra_rows: int = 0,
    max_batches: int | None = None,
    pad_id: int = PAD_ID,
) -> Iterator[dict[str, jax.Array]]:
    """Yields the store in order, {"tokens": int32 [batch_size, seq_len+1]}: each token but the first is a target once.

    Rows overlap by one token. The end of the last row and the rows after it are `pad_id`, which a loss must skip. An
    `examples` sees the number of the row as its id. extra_rows: as in `make_loader`; "other" is padding where the store
    is a single row, and for the rows after the last.
    """
    check_extra(extra_rows)
    host = HostRows(sharding, batch_size)
    n_windows = -(-(store.n_tokens - 1) // seq_len)
    n_batches = -(-n_windows // batch_size)

    def windows(ids):
        tokens = np.full((len(ids), seq_len + 1), pad_id, np.int32)
        starts = ids * seq_len
        whole = np.flatnonzero(starts + seq_len < store.n_tokens)
        store.read_windows(starts[whole], tokens, whole)
        for row in np.flatnonzero((starts + seq_len >= store.n_tokens) & (starts + 1 < store.n_tokens)):
            rest = store.read(int(starts[row]), store.n_tokens)
            tokens[row, : len(rest)] = rest
        return tokens

    def read(step):
        ids = host.rows + step * batch_size
        batch = {"tokens": windows(ids), "id": ids}
        if extra_rows:
            after = ids + n_windows  # of the last row: padding
            here = (ids < n_windows) & (n_windows > 1)
            batch["other"] = windows(np.where(here, another(ids, max(n_windows, 2), ids), after))
        batch = examples(batch)
        return host.put({name: x for name, x in batch.items() if name != "id"})

    for step in range(n_batches if max_batches is None else min(n_batches, max_batches)):
        yield read(step)
