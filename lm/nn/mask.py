"""Who attends to whom, kept as structure and not as an [S,T] array until the block that needs it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query attends to a key of its own segment that is, if `causal`, not after it, and less than `window` before.

    q_segments [B,S] and kv_segments [B,T] (None: one segment) hold the document of each token; q_index [S] and
    kv_index [T] its place in the row or in the cache. `aligned` says that queries and keys are the same tokens in
    the same order, so that a block of queries needs only the keys between its window and its end.

    prefix bool [B,T] (None: none) marks keys that may also come after the query: those of a prefix that its segment
    sees both ways (Raffel et al., 2020, 3.2.1). A window bounds what lies behind a query and not what is ahead.
    """

    q_index: jax.Array
    kv_index: jax.Array
    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    prefix: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, window: int | None) -> Mask:
        """The mask of a layer that looks back over `window` tokens, the query's own included (None: over all)."""
        return dataclasses.replace(self, window=window)

    def keys_for(self, queries: slice) -> slice:
        """The keys that a block of queries may attend to: where a prefix ends is not known when this is traced, so
        that with one no key ahead is skipped."""
        n = self.kv_index.shape[0]
        if not (self.aligned and self.causal):
            return slice(0, n)
        # The window of the block's first query.
        first = 0 if self.window is None else max(0, queries.start - self.window + 1)
        return slice(first, queries.stop if self.prefix is None else n)

    def block(self, q: slice, kv: slice) -> Mask:
        """The mask of some queries and some keys."""
        return dataclasses.replace(
            self,
            q_index=self.q_index[q],
            kv_index=self.kv_index[kv],
            q_segments=None if self.q_segments is None else self.q_segments[:, q],
            kv_segments=None if self.kv_segments is None else self.kv_segments[:, kv],
            prefix=None if self.prefix is None else self.prefix[:, kv],
        )

    def dense(self) -> jax.Array | None:
        """bool [B or 1, 1, S, T], True attends; None when every query attends to every key."""
        parts = []
        ahead = self.q_index[:, None] - self.kv_index[None, :]
        if self.causal:
            behind = (ahead >= 0)[None, None]
            parts.append(behind if self.prefix is None else behind | self.prefix[:, None, None, :])
        if self.window is not None:
            parts.append((ahead < self.window)[None, None])
        if self.q_segments is not None and self.kv_segments is not None:
            parts.append((self.q_segments[:, :, None] == self.kv_segments[:, None, :])[:, None])
        dense = None  # and not all True: a mask that hides nothing costs nothing
        for part in parts:
            dense = part if dense is None else dense & part
        return dense


def causal_mask(seq_len: int, segments: jax.Array | None = None, prefix: jax.Array | None = None) -> Mask:
    """Self-attention over whole rows of length `seq_len`; `segments` [B,S] keeps packed documents apart, and tokens of
    a `prefix` (bool [B,S]) see each other both ways."""
    index = jnp.arange(seq_len)
    return Mask(index, index, segments, segments, prefix, causal=True, aligned=True)


def full_mask(
    n_queries: int, n_keys: int, q_segments: jax.Array | None = None, kv_segments: jax.Array | None = None
) -> Mask:
    """Every query sees every key of its segment: in an encoder, and from a decoder into one."""
    return Mask(jnp.arange(n_queries), jnp.arange(n_keys), q_segments, kv_segments, causal=False)
