"""Attention in plain JAX, on any backend: what every other kernel is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.nn.dropout import dropout, split_key
from lm.nn.mask import Mask
from lm.sharding import constrain, shards

MAX_BLOCKS = 8  # each is a copy of the attention in the program; (8 + 1) / 16 of the work is left


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
    k = constrain(k, "act_batch", None, "act_kv_heads", None)  # gathered over the sequence: every query needs them
    v = constrain(v, "act_batch", None, "act_kv_heads", None)
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
    q = q.reshape(b, s, g, h // g, d)  # grouped: keys are not repeated for the heads that share them
    scores = jnp.einsum("bsgrk,btgk->bgrst", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], g, h // g, *bias.shape[2:])
    dense = mask.dense()
    if dense is not None:
        scores = jnp.where(dense[:, :, None], scores, -1e30)  # finite: a row that sees nothing becomes a mean, not NaN
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(q.dtype)
    return jnp.einsum("bgrst,btgk->bsgrk", weights, v).reshape(b, s, h, d)
