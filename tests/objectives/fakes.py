"""Models of a few products, which a test can do again in numpy."""

from __future__ import annotations

import types

import jax.numpy as jnp


class EncoderDecoder:
    """Hidden states of the decoder: the token it reads plus the mean of the valid source tokens."""

    def __init__(self, p):
        self.p = p

    def __call__(self, inputs, targets_in, *, dtype, valid=None, key=None):
        n = jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None]
        source = jnp.sum(jnp.where(valid[..., None], self.p["source"][inputs], 0.0), axis=1) / n
        return types.SimpleNamespace(hidden=(self.p["target"][targets_in] + source[:, None]).astype(dtype))

    def head_fn(self):
        return lambda params, x: (x @ params).astype(jnp.float32), self.p["head"]
