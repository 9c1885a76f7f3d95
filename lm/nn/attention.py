"""Multi-head attention with grouped keys and values: over a row, over a cache, or over another sequence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.dropout import dropout, split_key
from lm.nn.mask import Mask
from lm.nn.param import Init, attach, cast, keep, param, zeros
from lm.nn.rope import Rotation, rotate
from lm.sharding import constrain, shards

MAX_BLOCKS = 8  # each is a copy of the attention in the program; (8 + 1) / 16 of the work is left


class KVCache(NamedTuple):
    """k, v [B,T,G,K]: keys (rotated) and values of the tokens so far; of all layers, [L,B,T,G,K]."""

    k: jax.Array
    v: jax.Array


class Attention(nnx.Module):
    """x [B,S,D] -> [B,S,D] (Vaswani et al., 2017; grouped-query form, Ainslie et al., 2023).

    With a cache, the S new keys and values are written at `index` and the queries see all T slots under `mask`.
    With `memory`, the keys and values are those (`keys_values` makes them) and nothing is written.

    bias: on q, k, v; `out_bias` (None: the same) on the output. q_norm, k_norm: norms over K, before the rotation.
    scale: of the scores, None: K^-1/2. softcap: c tanh(scores / c) (Gemma 2). dropout: of the attention weights.
    q_init: of q, None: as k and v (T5, which does not scale its scores, draws q smaller).
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
        q_init: Init | None = None,
        n_kv_heads: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        q_norm: nnx.Module | None = None,
        k_norm: nnx.Module | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        block: int = 0,
    ):
        kv = n_kv_heads or n_heads
        self.dropout, self.block, self.softcap = dropout, block, softcap
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q = param(rngs, (d_model, n_heads, head_dim), ("embed", "heads", "head_dim"), q_init or init)
        self.k = param(rngs, (d_model, kv, head_dim), ("embed", "kv_heads", "head_dim"), init)
        self.v = param(rngs, (d_model, kv, head_dim), ("embed", "kv_heads", "head_dim"), init)
        self.o = param(rngs, (n_heads, head_dim, d_model), ("heads", "head_dim", "embed"), out_init)
        self.bias = bias
        self.out_bias = bias if out_bias is None else out_bias
        if self.bias:
            self.q_bias = param(rngs, (n_heads, head_dim), ("heads", "head_dim"), zeros, decay=False)
            self.k_bias = param(rngs, (kv, head_dim), ("kv_heads", "head_dim"), zeros, decay=False)
            self.v_bias = param(rngs, (kv, head_dim), ("kv_heads", "head_dim"), zeros, decay=False)
        if self.out_bias:
            self.o_bias = param(rngs, (d_model,), ("norm",), zeros, decay=False)
        attach(self, q_norm=q_norm, k_norm=k_norm)

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        rotation: Rotation | None = None,
        *,
        bias: jax.Array | None = None,
        scale: float = 1.0,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        index: jax.Array | None = None,
        memory: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """bias [B or 1,H,S,T] is added to the scores, which `scale` multiplies besides the module's own."""
        q = self._queries(x, rotation)
        if memory is not None:
            k, v = memory.k.astype(x.dtype), memory.v.astype(x.dtype)
        else:
            k, v = self.keys_values(x, rotation)
            if cache is not None:
                cache = KVCache(*(_write(old, new, index) for old, new in zip(cache, (k, v), strict=True)))
                k, v = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
        y = attend(
            q,
            k,
            v,
            mask,
            scale=self.scale * scale,
            bias=bias,
            softcap=self.softcap,
            block=self.block,
            dropout_rate=self.dropout,
            key=key,
        )
        y = jnp.einsum("bshk,hkd->bsd", keep(y, "attended"), cast(self.o, x))
        if self.out_bias:
            y = y + cast(self.o_bias, x)
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache

    def keys_values(self, x: jax.Array, rotation: Rotation | None = None) -> KVCache:
        """x [B,T,D] -> its keys and values [B,T,G,K]."""
        k = jnp.einsum("bsd,dgk->bsgk", x, cast(self.k, x))
        v = jnp.einsum("bsd,dgk->bsgk", x, cast(self.v, x))
        if self.bias:
            k, v = k + cast(self.k_bias, x), v + cast(self.v_bias, x)
        k = constrain(k, "act_batch", None, "act_kv_heads", None)  # gathered over the sequence: every query needs them
        v = constrain(v, "act_batch", None, "act_kv_heads", None)
        if hasattr(self, "k_norm"):
            k = self.k_norm(k)
        if rotation is not None:
            k = rotate(k, rotation)
        return KVCache(keep(k, "k"), keep(v, "v"))

    def _queries(self, x: jax.Array, rotation: Rotation | None) -> jax.Array:
        q = jnp.einsum("bsd,dhk->bshk", x, cast(self.q, x))
        if self.bias:
            q = q + cast(self.q_bias, x)
        q = constrain(q, "act_batch", "act_seq", "act_heads", None)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
        if rotation is not None:
            q = rotate(q, rotation)
        return keep(q, "q")


def _write(old: jax.Array, new: jax.Array, index: jax.Array | None) -> jax.Array:
    start = 0 if index is None else index
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    block: int = 0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """q [B,S,H,K], k, v [B,T,G,K], bias [B or 1,H,S,T] -> [B,S,H,K]; the softmax is in float32.

    scale: of q k^T, None: K^-1/2. softcap: c tanh(scores / c), before the bias.
    `block` > 0 takes that many queries at a time, or more where that would be over `MAX_BLOCKS` of them. In aligned
    causal attention a block skips the keys behind its end (in all about half the work) and before its window, and one
    block of scores exists at once. A sequence that is spread over devices is not cut.
    """
    s = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    block = max(block, -(-s // MAX_BLOCKS)) if block and shards("act_seq") == 1 else s
    if s <= block:
        return _attend(q, k, v, mask, scale, bias, softcap, dropout_rate, key)
    keys = split_key(key, -(-s // block))
    out = []
    for i, start in enumerate(range(0, s, block)):
        rows = slice(start, min(start + block, s))
        cols = mask.keys_for(rows)
        part = None if bias is None else bias[:, :, rows, cols]
        out.append(
            _attend(
                q[:, rows], k[:, cols], v[:, cols], mask.block(rows, cols), scale, part, softcap, dropout_rate, keys[i]
            )
        )
    return jnp.concatenate(out, axis=1)


def _attend(q, k, v, mask: Mask, scale, bias, softcap, dropout_rate: float, key: jax.Array | None) -> jax.Array:
    b, s, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, s, g, h // g, d)
    scores = jnp.einsum("bsgrk,btgk->bgrst", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], g, h // g, *bias.shape[2:])
    dense = mask.dense()
    if dense is not None:
        scores = jnp.where(dense[:, :, None], scores, -1e30)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(q.dtype)
    return jnp.einsum("bgrst,btgk->bsgrk", weights, v).reshape(b, s, h, d)
