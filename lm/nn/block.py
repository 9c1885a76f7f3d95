"""One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from lm.nn.attention import Attention, KVCache
from lm.nn.dropout import dropout, split_key
from lm.nn.mask import Mask
from lm.nn.param import keep
from lm.nn.position import Rotation


class Block(nnx.Module):
    """Pre-norm: x + attn(norm1(x)), then x + mlp(norm2(x)). x [B,S,D] -> [B,S,D]."""

    def __init__(self, norm1: nnx.Module, attn: Attention, norm2: nnx.Module, mlp: nnx.Module, *, dropout: float = 0.0):
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.dropout = dropout

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        rotation: Rotation | None,
        index: jax.Array | None,
        *,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        k_attn, k1, k2 = split_key(key, 3)
        y, cache = self.attn(self.norm1(x), mask, rotation, key=k_attn, cache=cache, index=index)
        x = keep(x + dropout(y, self.dropout, k1), "residual")
        x = x + dropout(self.mlp(self.norm2(x)), self.dropout, k2)
        return x, cache


MakeBlock = Callable[[nnx.Rngs], Block]
