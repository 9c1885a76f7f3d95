"""Normalisation over the last axis, computed in float32 and returned in the dtype of the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.param import ones, param, zeros


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich, 2019). x [..., d] -> [..., d].

    centered: the parameter is the scale's distance from 1, so that weight decay and zeros mean scale 1 (Gemma).
    """

    def __init__(self, d: int, *, rngs: nnx.Rngs, eps: float = 1e-6, centered: bool = False):
        self.eps, self.centered = eps, centered
        self.scale = param(rngs, (d,), ("norm",), zeros if centered else ones, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = 1.0 + self.scale[...] if self.centered else self.scale[...]
        return (y * scale).astype(x.dtype)  # rounded once, behind the scale


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias (Ba et al., 2016). x [..., d] -> [..., d]."""

    def __init__(self, d: int, *, rngs: nnx.Rngs, eps: float = 1e-5):
        self.eps = eps
        self.scale = param(rngs, (d,), ("norm",), ones, decay=False)
        self.bias = param(rngs, (d,), ("norm",), zeros, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)  # two passes: E[x^2] - mean^2 loses digits where the mean is large
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)
