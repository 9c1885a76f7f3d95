"""What stands on top of hidden states: linear maps, poolers, and the transform before a masked-LM head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.activation import Activation
from lm.nn.dot import dot
from lm.nn.dropout import dropout, split_key
from lm.nn.param import Init, Used, cast, param, place, zeros


class Linear(nnx.Module):
    """x kernel + bias. x [..., d_in] -> [..., d_out]. `axes` are the logical axes of the kernel [d_in, d_out]."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        rngs: nnx.Rngs,
        init: Init,
        bias: bool = True,
        axes: tuple[str | None, str | None] = ("embed", None),
    ):
        self.kernel = param(rngs, (d_in, d_out), axes, init)
        if bias:
            self.bias = param(rngs, (d_out,), (axes[1],), zeros, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = dot("...d,de->...e", x, self.kernel)
        return y + cast(self.bias, x) if hasattr(self, "bias") else y


class Pooler(nnx.Module):
    """One token's state through a dense layer and tanh: x [B,D] -> [B,D] (BERT)."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, init: Init):
        self.dense = Linear(d_model, d_model, rngs=rngs, init=init)
        # It runs once a row, and its FLOPs are counted so.
        place(self, "row")

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x))


class DenseHead(nnx.Module):
    """dropout, dense, tanh, dropout, out: x [..., D] -> [..., n] (RoBERTa's, BART's and T5's classification head)."""

    def __init__(self, d_model: int, n: int, *, rngs: nnx.Rngs, init: Init, dropout: float):
        self.dense = Linear(d_model, d_model, rngs=rngs, init=init)
        self.out = Linear(d_model, n, rngs=rngs, init=init)
        self.dropout = dropout
        place(self, "row")

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        k1, k2 = split_key(key, 2)
        x = jnp.tanh(self.dense(dropout(x, self.dropout, k1)))
        return self.out(dropout(x, self.dropout, k2))


class LinearHead(nnx.Module):
    """dropout, then a linear map: x [..., D] -> [..., n]. used: at every token, or once a row."""

    def __init__(
        self,
        d_model: int,
        n: int,
        *,
        rngs: nnx.Rngs,
        init: Init,
        dropout: float,
        bias: bool = True,
        used: Used = "token",
    ):
        self.out = Linear(d_model, n, rngs=rngs, init=init, bias=bias)
        self.dropout = dropout
        place(self, used)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.out(dropout(x, self.dropout, key))


class Transform(nnx.Module):
    """norm(activation(dense(x))): x [..., D] -> [..., E], before the vocabulary (BERT's masked-LM head)."""

    def __init__(
        self, d_model: int, d_out: int, activation: Activation, norm: nnx.Module, *, rngs: nnx.Rngs, init: Init
    ):
        self.dense = Linear(d_model, d_out, rngs=rngs, init=init)
        self.norm, self.activation = norm, activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.activation(self.dense(x)))
