"""Where a token stands: a learned table added to the embedding, or rotations of q and k."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.nn.param import Init, param


class LearnedPositions(nnx.Module):
    """positions [B,S] -> [B,S,D], added to the embedding (GPT-2)."""

    def __init__(self, max_len: int, d_model: int, *, rngs: nnx.Rngs, init: Init):
        self.table = param(rngs, (max_len, d_model), ("position", "embed"), init, decay=False)

    def __call__(self, positions: jax.Array, dtype: DTypeLike) -> jax.Array:
        return self.table[...].astype(dtype)[positions]


class Rotation(NamedTuple):
    """sin, cos [B,S,K/2] in float32, computed once and shared by all layers."""

    sin: jax.Array
    cos: jax.Array


def rotation(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Angles of rotary position embedding (Su et al., 2021): position * theta^(-2i/K). positions [B,S]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.sin(angles), jnp.cos(angles))


def rotate(x: jax.Array, r: Rotation) -> jax.Array:
    """x [B,S,H,K] rotated in the half-split layout (lane i with lane i + K/2), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = r.sin[:, :, None], r.cos[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
