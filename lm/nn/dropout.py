"""Dropout as a function of a key: no key, no dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of `x` and scales the rest by 1 / (1 - rate) (Srivastava et al., 2014)."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))  # scaled in training, so that evaluation does nothing


def split_key(key: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """`n` keys, or `n` times None."""
    return (None,) * n if key is None else tuple(jax.random.split(key, n))
