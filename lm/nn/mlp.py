"""Position-wise feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.param import Init, cast, keep, param, zeros
from lm.sharding import constrain

Activation = Callable[[jax.Array], jax.Array]


class MLP(nnx.Module):
    """activation(x up + b) down + b. x [B,S,D] -> [B,S,D]."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation, *, rngs: nnx.Rngs, init: Init, out_init: Init):
        self.activation = activation
        self.up = param(rngs, (d_model, d_ff), ("embed", "mlp"), init)
        self.up_bias = param(rngs, (d_ff,), ("mlp",), zeros, decay=False)
        self.down = param(rngs, (d_ff, d_model), ("mlp", "embed"), out_init)
        self.down_bias = param(rngs, (d_model,), ("norm",), zeros, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = keep(jnp.einsum("bsd,df->bsf", x, cast(self.up, x)) + cast(self.up_bias, x), "up")
        y = constrain(self.activation(y), "act_batch", "act_seq", "act_mlp")
        y = jnp.einsum("bsf,fd->bsd", y, cast(self.down, x)) + cast(self.down_bias, x)
        return constrain(y, "act_batch", "act_seq", "act_embed")


class GatedMLP(nnx.Module):
    """(activation(x gate) * (x up)) down: SwiGLU with silu (Shazeer, 2020). x [B,S,D] -> [B,S,D]."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation, *, rngs: nnx.Rngs, init: Init, out_init: Init):
        self.activation = activation
        self.gate = param(rngs, (d_model, d_ff), ("embed", "mlp"), init)
        self.up = param(rngs, (d_model, d_ff), ("embed", "mlp"), init)
        self.down = param(rngs, (d_ff, d_model), ("mlp", "embed"), out_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = keep(jnp.einsum("bsd,df->bsf", x, cast(self.gate, x)), "gate")
        up = keep(jnp.einsum("bsd,df->bsf", x, cast(self.up, x)), "up")
        y = constrain(self.activation(gate) * up, "act_batch", "act_seq", "act_mlp")
        return constrain(jnp.einsum("bsf,fd->bsd", y, cast(self.down, x)), "act_batch", "act_seq", "act_embed")
