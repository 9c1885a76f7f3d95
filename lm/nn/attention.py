"""Multi-head attention with grouped keys and values, over a row or over a cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.dropout import dropout, split_key
from lm.nn.mask import Mask
from lm.nn.param import Init, cast, keep, param, zeros
from lm.nn.position import Rotation, rotate
from lm.sharding import constrain, shards

MAX_BLOCKS = 8  # each is a copy of the attention in the program; (8 + 1) / 16 of the work is left


class KVCache(NamedTuple):
    """k, v [B,T,G,K]: keys (rotated) and values of the tokens so far; of all layers, [L,B,T,G,K]."""

    k: jax.Array
    v: jax.Array


class Attention(nnx.Module):
    """x [B,S,D] -> [B,S,D] (Vaswani et al., 2017; grouped-query form, Ainslie et al., 2023).

    With a cache, the S new keys and values are written at `index` and the queries see all T slots under `mask`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        init: Init,
        out_init: Init,
        n_kv_heads: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        block: int = 0,
    ):
        kv = n_kv_heads or n_heads
        self.dropout, self.block = dropout, block
        self.q = param(rngs, (d_model, n_heads, head_dim), ("embed", "heads", "head_dim"), init)
        self.k = param(rngs, (d_model, kv, head_dim), ("embed", "kv_heads", "head_dim"), init)
        self.v = param(rngs, (d_model, kv, head_dim), ("embed", "kv_heads", "head_dim"), init)
        self.o = param(rngs, (n_heads, head_dim, d_model), ("heads", "head_dim", "embed"), out_init)
        self.bias = bias
        if bias:
            self.q_bias = param(rngs, (n_heads, head_dim), ("heads", "head_dim"), zeros, decay=False)
            self.k_bias = param(rngs, (kv, head_dim), ("kv_heads", "head_dim"), zeros, decay=False)
            self.v_bias = param(rngs, (kv, head_dim), ("kv_heads", "head_dim"), zeros, decay=False)
            self.o_bias = param(rngs, (d_model,), ("norm",), zeros, decay=False)

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        rotation: Rotation | None = None,
        *,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        q = jnp.einsum("bsd,dhk->bshk", x, cast(self.q, x))
        k = jnp.einsum("bsd,dgk->bsgk", x, cast(self.k, x))
        v = jnp.einsum("bsd,dgk->bsgk", x, cast(self.v, x))
        if self.bias:
            q, k, v = q + cast(self.q_bias, x), k + cast(self.k_bias, x), v + cast(self.v_bias, x)
        q = constrain(q, "act_batch", "act_seq", "act_heads", None)
        k = constrain(k, "act_batch", None, "act_kv_heads", None)  # gathered over the sequence: every query needs them
        v = constrain(v, "act_batch", None, "act_kv_heads", None)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = keep(q, "q"), keep(k, "k"), keep(v, "v")
        if cache is not None:
            cache = KVCache(*(_write(old, new, index) for old, new in zip(cache, (k, v), strict=True)))
            k, v = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
        y = keep(attend(q, k, v, mask, block=self.block, dropout_rate=self.dropout, key=key), "attended")
        y = jnp.einsum("bshk,hkd->bsd", y, cast(self.o, x))
        if self.bias:
            y = y + cast(self.o_bias, x)
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache


def _write(old: jax.Array, new: jax.Array, index: jax.Array | None) -> jax.Array:
    start = 0 if index is None else index
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    block: int = 0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """q [B,S,H,K], k, v [B,T,G,K] -> [B,S,H,K]; scores are scaled by K^-1/2, the softmax is in float32.

    `block` > 0 takes that many queries at a time, or more where that would be over `MAX_BLOCKS` of them. In aligned
    causal attention a block skips the keys behind its end (in all about half the work), and one block of scores exists
    at once. A sequence that is spread over devices is not cut.
    """
    s = q.shape[1]
    block = max(block, -(-s // MAX_BLOCKS)) if block and shards("act_seq") == 1 else s
    if s <= block:
        return _attend(q, k, v, mask, dropout_rate, key)
    keys = split_key(key, -(-s // block))
    out = []
    for i, start in enumerate(range(0, s, block)):
        rows = slice(start, min(start + block, s))
        cols = slice(0, rows.stop if mask.aligned and mask.causal else k.shape[1])
        out.append(_attend(q[:, rows], k[:, cols], v[:, cols], mask.block(rows, cols), dropout_rate, keys[i]))
    return jnp.concatenate(out, axis=1)


def _attend(q, k, v, mask: Mask, dropout_rate: float, key: jax.Array | None) -> jax.Array:
    b, s, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, s, g, h // g, d)
    scores = jnp.einsum("bsgrk,btgk->bgrst", q, k, preferred_element_type=jnp.float32) * d**-0.5
    dense = mask.dense()
    if dense is not None:
        scores = jnp.where(dense[:, :, None], scores, -1e30)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(q.dtype)
    return jnp.einsum("bgrst,btgk->bsgrk", weights, v).reshape(b, s, h, d)
