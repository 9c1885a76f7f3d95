"""The decoder-only Transformer that GPT-2 and LLaMA compose with their own parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.nn.attention import KVCache
from lm.nn.block import Block
from lm.nn.dropout import dropout, split_key
from lm.nn.embed import Embed, Head
from lm.nn.mask import Mask, causal_mask
from lm.nn.position import LearnedPositions, Rotation
from lm.nn.stack import Stack


class Decoder(nnx.Module):
    """Embedding, layers run by `stack`, final norm and head. `head=None` ties the head to the embedding."""

    def __init__(
        self,
        embed: Embed,
        stack: Stack,
        layers: Block,
        norm: nnx.Module,
        *,
        positions: LearnedPositions | None = None,
        rotation: Callable[[jax.Array], Rotation] | None = None,
        head: Head | None = None,
        dropout: float = 0.0,
    ):
        self.embed, self.stack, self.layers, self.norm = embed, stack, layers, norm
        if positions is not None:
            self.positions = positions
        if head is not None:
            self.head = head
        self.rotation, self.dropout = rotation, dropout

    def __call__(
        self,
        tokens: jax.Array,
        *,
        dtype: DTypeLike,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        mask: Mask | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """tokens [B,S] -> (hidden [B,S,D] after the final norm, the cache with the new keys and values).

        positions [B,S] default to 0..S-1; segments [B,S] keep packed documents apart; `key` turns dropout on.
        With a cache [L,B,T,G,K], `mask` says which of its T slots each query sees, and `index` where to write.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        k_embed, k_layers = split_key(key, 2)
        x = self.embed(tokens, dtype)
        if hasattr(self, "positions"):
            x = x + self.positions(positions, dtype)
        x = dropout(x, self.dropout, k_embed)
        rotation = None if self.rotation is None else self.rotation(positions)
        mask = causal_mask(tokens.shape[1], segments) if mask is None else mask
        x, cache = self.stack(self.layers, x, mask, rotation, index, key=k_layers, cache=cache)
        return self.norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """hidden [B,S,D] -> float32 [B,S,V]."""
        head, params = self.head_fn()
        return head(params, x)

    def head_fn(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """(f, params) with f(params, hidden) = logits: the head alone, for a loss that differentiates it by itself."""
        graphdef, params = nnx.split(self.head if hasattr(self, "head") else self.embed)
        return lambda params, x: nnx.merge(graphdef, params).logits(x), params
