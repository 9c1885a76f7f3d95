"""Multi-head attention with grouped keys and values: over a row, over a cache, or over another sequence."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from lm.nn import kernels
from lm.nn.compute import DEFAULT, Compute
from lm.nn.dot import dot
from lm.nn.mask import Mask
from lm.nn.param import Init, attach, cast, keep, param, place, zeros
from lm.nn.rope import Rotation, rotate
from lm.sharding import constrain


class KVCache(NamedTuple):
    """k, v [B,T,G,K]: keys (rotated) and values of the tokens so far; of all layers, [L,B,T,G,K]."""

    k: jax.Array
    v: jax.Array


@dataclasses.dataclass(frozen=True)
class Heads:
    """H heads of width K over G keys and values (None: one for each head, Vaswani et al., 2017)."""

    n: int
    dim: int
    n_kv: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How q k^T becomes weights. scale: of the scores, None: K^-1/2. softcap: c tanh(scores / c) (Gemma 2).
    dropout: of the weights."""

    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0


class Inits(NamedTuple):
    """Initial values: of q, k, v and of the output. q: of q alone (T5, whose scores are not scaled, draws it
    smaller)."""

    qkv: Init
    out: Init
    q: Init | None = None


class Attention(nnx.Module):
    """x [B,S,D] -> [B,S,D] (Vaswani et al., 2017; grouped-query form, Ainslie et al., 2023).

    With a cache, the S new keys and values are written at `index` and the queries see all T slots under `mask`.
    With `memory`, the keys and values are those (`keys_values` makes them) and nothing is written.

    bias: on q, k, v; `out_bias` (None: the same) on the output. norms: of q and of k, over K, before the rotation.
    """

    def __init__(
        self,
        d_model: int,
        heads: Heads,
        *,
        rngs: nnx.Rngs,
        inits: Inits,
        bias: bool = False,
        out_bias: bool | None = None,
        norms: tuple[nnx.Module, nnx.Module] | None = None,
        scores: Scores = Scores(),
    ):
        h, kv, k = heads.n, heads.n_kv or heads.n, heads.dim
        self.dropout, self.softcap = scores.dropout, scores.softcap
        self.scale = k**-0.5 if scores.scale is None else scores.scale
        # `keys` marks the map at which `lm.models.cost` counts the FLOPs of the scores.
        self.q = param(rngs, (d_model, h, k), ("embed", "heads", "head_dim"), inits.q or inits.qkv, keys="token")
        self.k = param(rngs, (d_model, kv, k), ("embed", "kv_heads", "head_dim"), inits.qkv)
        self.v = param(rngs, (d_model, kv, k), ("embed", "kv_heads", "head_dim"), inits.qkv)
        self.o = param(rngs, (h, k, d_model), ("heads", "head_dim", "embed"), inits.out)
        self.bias = bias
        self.out_bias = bias if out_bias is None else out_bias
        if self.bias:
            self.q_bias = param(rngs, (h, k), ("heads", "head_dim"), zeros, decay=False)
            self.k_bias = param(rngs, (kv, k), ("kv_heads", "head_dim"), zeros, decay=False)
            self.v_bias = param(rngs, (kv, k), ("kv_heads", "head_dim"), zeros, decay=False)
        if self.out_bias:
            # As a norm's scale: too small to shard.
            self.o_bias = param(rngs, (d_model,), ("norm",), zeros, decay=False)
        if norms is not None:
            attach(self, q_norm=norms[0], k_norm=norms[1])

    def over_memory(self) -> Attention:
        """Returns itself, declared to take its keys and values from a memory."""
        self.q.set_metadata(keys="memory")
        for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
            place(getattr(self, name, None), "memory")
        return self

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
        compute: Compute = DEFAULT,
    ) -> tuple[jax.Array, KVCache | None]:
        """bias [B or 1,H,S,T] is added to the scores, which `scale` multiplies besides the module's own."""
        q = self._queries(x, rotation, compute)
        if memory is not None:
            k, v = memory.k.astype(x.dtype), memory.v.astype(x.dtype)
        else:
            k, v = self.keys_values(x, rotation, compute=compute)
            if cache is not None:
                cache = KVCache(*(_write(old, new, index) for old, new in zip(cache, (k, v), strict=True)))
                k, v = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
        drops = self.dropout > 0.0 and key is not None  # evaluation has no key and asks no kernel for dropout
        needed = kernels.needs(mask, bias=bias is not None, softcap=self.softcap is not None, dropout=drops)
        y = kernels.choose(compute.attention, needed)(
            q,
            k,
            v,
            mask,
            scale=self.scale * scale,
            bias=bias,
            softcap=self.softcap,
            dropout_rate=self.dropout,
            key=key,
            block=compute.query_block,
        )
        y = dot("bshk,hkd->bsd", keep(y, "attended"), self.o, compute.dot)
        if self.out_bias:
            y = y + cast(self.o_bias, x)
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache

    def keys_values(self, x: jax.Array, rotation: Rotation | None = None, *, compute: Compute = DEFAULT) -> KVCache:
        """x [B,T,D] -> its keys and values [B,T,G,K]."""
        k = dot("bsd,dgk->bsgk", x, self.k, compute.dot)
        v = dot("bsd,dgk->bsgk", x, self.v, compute.dot)
        if self.bias:
            k, v = k + cast(self.k_bias, x), v + cast(self.v_bias, x)
        k = constrain(k, "act_batch", "act_seq", "act_kv_heads", None)
        v = constrain(v, "act_batch", "act_seq", "act_kv_heads", None)
        if hasattr(self, "k_norm"):
            k = self.k_norm(k)
        if rotation is not None:
            k = rotate(k, rotation)
        return KVCache(keep(k, "k"), keep(v, "v"))  # kept behind bias, norm and rotation, which then run once

    def _queries(self, x: jax.Array, rotation: Rotation | None, compute: Compute) -> jax.Array:
        q = dot("bsd,dhk->bshk", x, self.q, compute.dot)
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
