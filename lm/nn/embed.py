"""Token embedding and the output head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.nn.param import Init, cast, param
from lm.sharding import constrain


class Embed(nnx.Module):
    """ids [B,S] -> [B,S,D]."""

    def __init__(self, vocab_size: int, d_model: int, *, rngs: nnx.Rngs, init: Init):
        self.table = param(rngs, (vocab_size, d_model), ("vocab", "embed"), init)

    def __call__(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        # Gathered over FSDP first: looked up in a table sharded on D, XLA would rematerialise it in full.
        table = constrain(self.table[...].astype(dtype), "act_vocab", None)
        return constrain(table[ids], "act_batch", "act_seq", "act_embed")

    def logits(self, x: jax.Array) -> jax.Array:
        """The tied head: x [B,S,D] -> float32 [B,S,V]."""
        return _project(x, cast(self.table, x))


class Head(nnx.Module):
    """Hidden states to logits: x [B,S,D] -> float32 [B,S,V]. The table is [V,D], the layout of the embedding."""

    def __init__(self, vocab_size: int, d_model: int, *, rngs: nnx.Rngs, init: Init):
        self.table = param(rngs, (vocab_size, d_model), ("vocab", "embed"), init)

    def logits(self, x: jax.Array) -> jax.Array:
        return _project(x, cast(self.table, x))


def _project(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [B,S,D], table [V,D] -> logits [B,S,V] in float32, accumulated in float32."""
    b, s, d = x.shape
    if 1 < b * s <= 16:
        # Decoding a few rows: XLA on CPU packs a [V,D] right-hand side at twice the cost of the product itself. As the
        # left-hand side it is read once; the barrier keeps XLA from turning it back.
        logits = jnp.einsum("vd,nd->vn", table, x.reshape(b * s, d), preferred_element_type=jnp.float32)
        logits = jax.lax.optimization_barrier(logits).T.reshape(b, s, -1)
    else:
        logits = jnp.einsum("bsd,vd->bsv", x, table, preferred_element_type=jnp.float32)
    return constrain(logits, "act_batch", "act_seq", "act_vocab")
