"""One layer: attention, feed-forward and, over an encoder's output, cross-attention, with their norms and residuals.

Three shapes of residual: before each part (`Block`), after it (`PostNormBlock`), and both parts at once
(`ParallelBlock`). All are called alike, so that a stack need not know which it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from lm.nn.attention import Attention, KVCache
from lm.nn.compute import Compute
from lm.nn.dropout import dropout, split_key
from lm.nn.mask import Mask
from lm.nn.param import attach, keep
from lm.nn.rope import Rotation


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is fixed about one layer when it is compiled.

    block, index: which of the stack's blocks holds its parameters, and where in it. window: see `Mask`. rotation:
    which of the context's rotations. scale: multiplies the attention scores.
    """

    block: int = 0
    index: int = 0
    window: int | None = None
    rotation: int = 0
    scale: float = 1.0


class Context(NamedTuple):
    """What all layers of a stack see besides their input.

    bias [B or 1,H,S,T]: added to the scores of self-attention. cache_index: where in the cache to write. memory
    [B,T,D]: an encoder's output, seen under cross_mask. valid bool [B,S]: the tokens that count for a router.
    compute: set by what runs the layers.
    """

    mask: Mask
    rotations: tuple[Rotation, ...] = ()
    bias: jax.Array | None = None
    cache_index: jax.Array | None = None
    memory: jax.Array | None = None
    cross_mask: Mask | None = None
    valid: jax.Array | None = None
    compute: Compute = Compute()


class CrossCache(NamedTuple):
    """The cache of a decoder layer over an encoder: its own keys and values, and those of the memory."""

    own: KVCache
    memory: KVCache


Cache = KVCache | CrossCache | None


class _Layers(nnx.Module):
    """The parts of a layer. post_norm1, post_norm2: norms of what attention and mlp add (Gemma 2)."""

    cross: Attention
    cross_norm: Any

    def __init__(
        self,
        norm1: nnx.Module,
        attn: Attention,
        norm2: nnx.Module,
        mlp: nnx.Module,
        *,
        cross_norm: nnx.Module | None = None,
        cross: Attention | None = None,
        post_norm1: nnx.Module | None = None,
        post_norm2: nnx.Module | None = None,
        dropout: float = 0.0,
    ):
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        assert (cross is None) == (cross_norm is None)
        cross = None if cross is None else cross.over_memory()  # its keys are counted at the places of the encoder
        attach(self, cross_norm=cross_norm, cross=cross, post_norm1=post_norm1, post_norm2=post_norm2)
        self.dropout = dropout

    @jax.named_scope("attention")
    def _attention(self, x, context: Context, layer: Layer, key, cache: Cache):
        k_attn, k_drop = split_key(key, 2)
        y, own = self.attn(
            x,
            context.mask.within(layer.window),  # the context's mask has none: layers may differ in it
            context.rotations[layer.rotation] if context.rotations else None,
            bias=context.bias,
            scale=layer.scale,
            key=k_attn,
            cache=cache.own if isinstance(cache, CrossCache) else cache,
            index=context.cache_index,
            compute=context.compute,
        )
        if hasattr(self, "post_norm1"):
            y = self.post_norm1(y)
        if isinstance(cache, CrossCache):
            assert own is not None
            return dropout(y, self.dropout, k_drop), cache._replace(own=own)
        return dropout(y, self.dropout, k_drop), own

    @jax.named_scope("cross_attention")
    def _cross_attention(self, x, context: Context, key, cache: Cache):
        k_attn, k_drop = split_key(key, 2)
        if isinstance(cache, CrossCache):
            memory = cache.memory  # made once from the encoder's output, for all tokens to come
        else:
            assert context.memory is not None
            memory = self.cross.keys_values(context.memory, compute=context.compute)
        assert context.cross_mask is not None
        y, _ = self.cross(x, context.cross_mask, key=k_attn, memory=memory, compute=context.compute)
        return dropout(y, self.dropout, k_drop)

    @jax.named_scope("mlp")
    def _feed_forward(self, x, context: Context, key):
        k_inner, k_drop = split_key(key, 2)
        y, router = self.mlp(x, valid=context.valid, key=k_inner, compute=context.compute)
        if hasattr(self, "post_norm2"):
            y = self.post_norm2(y)
        return dropout(y, self.dropout, k_drop), router


class Block(_Layers):
    """Pre-norm: x + attn(norm1(x)), x + cross(cross_norm(x)), x + mlp(norm2(x)). x [B,S,D] -> [B,S,D]."""

    @jax.named_scope("block")
    def __call__(
        self, x: jax.Array, context: Context, layer: Layer, *, key: jax.Array | None = None, cache: Cache = None
    ) -> tuple[jax.Array, Cache, Any]:
        k_attn, k_cross, k_mlp = split_key(key, 3)
        y, cache = self._attention(self.norm1(x), context, layer, k_attn, cache)
        # Kept, so that the backward pass of what follows need not run the attention again.
        x = keep(x + y, "residual")
        if hasattr(self, "cross"):
            x = keep(x + self._cross_attention(self.cross_norm(x), context, k_cross, cache), "residual")
        y, router = self._feed_forward(self.norm2(x), context, k_mlp)
        return x + y, cache, router


class PostNormBlock(_Layers):
    """Post-norm, as the original Transformer: norm1(x + attn(x)), and so on. x [B,S,D] -> [B,S,D]."""

    @jax.named_scope("block")
    def __call__(
        self, x: jax.Array, context: Context, layer: Layer, *, key: jax.Array | None = None, cache: Cache = None
    ) -> tuple[jax.Array, Cache, Any]:
        k_attn, k_cross, k_mlp = split_key(key, 3)
        y, cache = self._attention(x, context, layer, k_attn, cache)
        x = self.norm1(keep(x + y, "residual"))
        if hasattr(self, "cross"):
            x = self.cross_norm(keep(x + self._cross_attention(x, context, k_cross, cache), "residual"))
        y, router = self._feed_forward(x, context, k_mlp)
        return self.norm2(keep(x + y, "residual")), cache, router


class ParallelBlock(_Layers):
    """x + attn(norm1(x)) + mlp(norm2(x)) (GPT-J and GPT-NeoX). x [B,S,D] -> [B,S,D]."""

    @jax.named_scope("block")
    def __call__(
        self, x: jax.Array, context: Context, layer: Layer, *, key: jax.Array | None = None, cache: Cache = None
    ) -> tuple[jax.Array, Cache, Any]:
        k_attn, k_mlp = split_key(key, 2)
        y, cache = self._attention(self.norm1(x), context, layer, k_attn, cache)
        z, router = self._feed_forward(self.norm2(x), context, k_mlp)
        return x + y + z, cache, router


AnyBlock = Block | PostNormBlock | ParallelBlock
MakeBlock = Callable[[nnx.Rngs], AnyBlock]
