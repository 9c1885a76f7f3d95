"""Token embedding and the map back to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.nn.dot import dot
from lm.nn.param import Init, cast, param, place, zeros
from lm.sharding import constrain


def look_up(table: jax.Array, rows: jax.Array, axis: str | None = None) -> jax.Array:
    """table [N,D], rows [B,S] -> [B,S,D]. axis: the activation axis of N.

    The table is gathered over FSDP first: what is looked up in one sharded on D, XLA would rematerialise in full.
    """
    table = constrain(table, axis, None)
    return constrain(table[rows], "act_batch", "act_seq", "act_embed")


class Embed(nnx.Module):
    """ids [B,S] -> [B,S,D]. `scale` multiplies what is looked up (sqrt(D) in the original Transformer and in Gemma).

    pad_id: a token that learns nothing from being looked up.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init: Init,
        scale: float = 1.0,
        pad_id: int | None = None,
    ):
        self.scale, self.pad_id = scale, pad_id
        self.table = param(rngs, (vocab_size, d_model), ("vocab", "embed"), init, used="lookup")

    def __call__(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        x = look_up(self.table[...].astype(dtype), ids, "act_vocab")  # cast before it is gathered: fewer bytes travel
        if self.pad_id is not None:  # as torch's padding_idx: the row is read and learns nothing
            x = jnp.where((ids == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
        # The scale is rounded to the compute dtype, as the models that have one were trained (Gemma in bfloat16).
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, dtype)


class Types(nnx.Module):
    """token types [B,S] -> [B,S,D]: which sentence of a pair a token is of (BERT)."""

    def __init__(self, n_types: int, d_model: int, *, rngs: nnx.Rngs, init: Init):
        self.table = param(rngs, (n_types, d_model), ("position", "embed"), init, decay=False, used="lookup")

    def __call__(self, types: jax.Array, dtype: DTypeLike) -> jax.Array:
        return look_up(self.table[...].astype(dtype), types)


class Head(nnx.Module):
    """Hidden states to logits: x [B,S,D] -> float32 [B,S,V]. The table is [V,D], the layout of the embedding.

    tied: the embedding's table serves, and `logits` is given it. transform: before the table (BERT). bias: "trained",
    or "fixed" to whatever a checkpoint brought (BART's final_logits_bias). scale: multiplies the hidden states (T5:
    D^-1/2). softcap: c tanh(logits / c) (Gemma 2).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init: Init,
        tied: bool = False,
        transform: nnx.Module | None = None,
        bias: Literal["trained", "fixed"] | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ):
        if transform is not None:
            place(transform, "target")
            self.transform = transform
        if not tied:
            self.table = param(rngs, (vocab_size, d_model), ("vocab", "embed"), init, used="target")
        if bias is not None:
            self.bias = param(rngs, (vocab_size,), ("vocab",), zeros, decay=False, used="target")
        self.tied, self.fixed_bias, self.scale, self.softcap = tied, bias == "fixed", scale, softcap

    @jax.named_scope("head")
    def logits(self, x: jax.Array, embed: Embed | None = None) -> jax.Array:
        if hasattr(self, "transform"):
            x = self.transform(x)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)  # as T5 does: before the product, rounded to the compute dtype
        assert not self.tied or embed is not None
        logits = _project(x, embed.table if self.tied and embed is not None else self.table)
        if hasattr(self, "bias"):
            bias = self.bias[...].astype(jnp.float32)
            # Fixed, it is a buffer in torch: loaded, stored and never trained.
            logits = logits + (jax.lax.stop_gradient(bias) if self.fixed_bias else bias)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def tie(head: object, embed: Embed) -> None:
    """Declares that the embedding's table serves as that of the head too, where it does."""
    if isinstance(head, Head) and head.tied:
        place(embed.table, "target", was="lookup")


def head_fn(head: Head, embed: Embed) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """(f, params) with f(params, hidden) = logits: the head alone, for a loss that differentiates it by itself."""
    graphdef, params = nnx.split(head)
    if not head.tied:
        return lambda params, x: nnx.merge(graphdef, params).logits(x), params
    embed_graphdef, table = nnx.split(embed)

    def f(params, x):
        own, table = params
        return nnx.merge(graphdef, own).logits(x, nnx.merge(embed_graphdef, table))

    return f, (params, table)  # the gradients of a tied table's two uses add up


def _project(x: jax.Array, table: nnx.Param) -> jax.Array:
    """x [B,S,D], table [V,D] -> logits [B,S,V] in float32, accumulated in float32."""
    b, s, d = x.shape
    if 1 < b * s <= 16:
        # Decoding a few rows: XLA on CPU packs a [V,D] right-hand side at twice the cost of the product itself. As the
        # left-hand side it is read once; the barrier keeps XLA from turning it back.
        logits = jnp.einsum("vd,nd->vn", cast(table, x), x.reshape(b * s, d), preferred_element_type=jnp.float32)
        logits = jax.lax.optimization_barrier(logits).T.reshape(b, s, -1)
    else:
        logits = dot("bsd,vd->bsv", x, table, preferred_element_type=jnp.float32)
    return constrain(logits, "act_batch", "act_seq", "act_vocab")
