"""Position-wise feed-forward layers. Each returns its result and None, where `lm.nn.moe` has what its router did."""

from __future__ import annotations

import jax
from flax import nnx

from lm.nn.activation import Activation
from lm.nn.compute import DEFAULT, Compute
from lm.nn.dot import dot
from lm.nn.dropout import dropout
from lm.nn.param import Init, cast, keep, param, zeros
from lm.sharding import constrain


class MLP(nnx.Module):
    """activation(x up + b) down + b. x [B,S,D] -> ([B,S,D], None). `dropout` is of the inner activations."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Activation,
        *,
        rngs: nnx.Rngs,
        init: Init,
        out_init: Init,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        self.activation, self.bias, self.dropout = activation, bias, dropout
        self.up = param(rngs, (d_model, d_ff), ("embed", "mlp"), init)
        self.down = param(rngs, (d_ff, d_model), ("mlp", "embed"), out_init)
        if bias:
            self.up_bias = param(rngs, (d_ff,), ("mlp",), zeros, decay=False)
            self.down_bias = param(rngs, (d_model,), ("norm",), zeros, decay=False)

    def __call__(
        self,
        x: jax.Array,
        *,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        compute: Compute = DEFAULT,
    ) -> tuple[jax.Array, None]:
        y = dot("bsd,df->bsf", x, self.up, compute.dot)
        # Before the activation, which is cheap to make again.
        y = keep(y + cast(self.up_bias, x) if self.bias else y, "up")
        y = constrain(self.activation(y), "act_batch", "act_seq", "act_mlp")
        y = dot("bsf,fd->bsd", dropout(y, self.dropout, key), self.down, compute.dot)
        y = y + cast(self.down_bias, x) if self.bias else y
        return constrain(y, "act_batch", "act_seq", "act_embed"), None


class GatedMLP(nnx.Module):
    """(activation(x gate) * (x up)) down: SwiGLU with silu (Shazeer, 2020). x [B,S,D] -> ([B,S,D], None)."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Activation,
        *,
        rngs: nnx.Rngs,
        init: Init,
        out_init: Init,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        self.activation, self.bias, self.dropout = activation, bias, dropout
        self.gate = param(rngs, (d_model, d_ff), ("embed", "mlp"), init)
        self.up = param(rngs, (d_model, d_ff), ("embed", "mlp"), init)
        self.down = param(rngs, (d_ff, d_model), ("mlp", "embed"), out_init)
        if bias:
            self.gate_bias = param(rngs, (d_ff,), ("mlp",), zeros, decay=False)
            self.up_bias = param(rngs, (d_ff,), ("mlp",), zeros, decay=False)
            self.down_bias = param(rngs, (d_model,), ("norm",), zeros, decay=False)

    def __call__(
        self,
        x: jax.Array,
        *,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        compute: Compute = DEFAULT,
    ) -> tuple[jax.Array, None]:
        gate = dot("bsd,df->bsf", x, self.gate, compute.dot)
        up = dot("bsd,df->bsf", x, self.up, compute.dot)
        if self.bias:
            gate, up = gate + cast(self.gate_bias, x), up + cast(self.up_bias, x)
        y = constrain(self.activation(keep(gate, "gate")) * keep(up, "up"), "act_batch", "act_seq", "act_mlp")
        y = dot("bsf,fd->bsd", dropout(y, self.dropout, key), self.down, compute.dot)
        y = y + cast(self.down_bias, x) if self.bias else y
        return constrain(y, "act_batch", "act_seq", "act_embed"), None
