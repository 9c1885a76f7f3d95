"""Cross entropy of a head over hidden states, with its gradient taken in the forward pass, a chunk at a time.

The loss is a sum, so d loss / d logits is known as soon as a chunk of logits is: the forward pass pulls it back to
the hidden states and the head at once and keeps those. Neither [B,S,V] logits nor their recomputation is needed:
three matmuls of the head in all, as without chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HeadFn = Callable[[Any, jax.Array], jax.Array]  # (params, x [B,C,D]) -> float32 logits [B,C,V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def cross_entropy(
    head: HeadFn,
    params: Any,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """x [B,S,D], targets [B,S] int, weights [B,S] float32 -> (total, nll), float32 sums over weighted tokens.

    total = (1 - e) nll - e mean_v log p_v + z_loss log(Z)^2, e = `label_smoothing` (Szegedy et al., 2016; the
    z-loss keeps log Z near 0: Chowdhery et al., 2022). Only `total` has a gradient. `chunks` divides S.
    """
    return _over_chunks(head, params, x, targets, weights, z_loss, label_smoothing, chunks, with_gradient=False)[0]


def _forward(head, params, x, targets, weights, z_loss, label_smoothing, chunks):
    sums, gradient = _over_chunks(head, params, x, targets, weights, z_loss, label_smoothing, chunks, True)
    return sums, (*gradient, targets)


def _backward(head, z_loss, label_smoothing, chunks, residuals, cotangents):
    d_params, d_x, targets = residuals
    scale = cotangents[0]
    # The cotangent is float32, and x perhaps not.
    d_params, d_x = jax.tree.map(lambda g: (g * scale).astype(g.dtype), (d_params, d_x))
    # `float0` is JAX's gradient of integers; weights have none.
    return d_params, d_x, np.zeros(targets.shape, jax.dtypes.float0), None


cross_entropy.defvjp(_forward, _backward)


def row_nll(
    head: HeadFn, params: Any, x: jax.Array, targets: jax.Array, weights: jax.Array, chunks: int = 1
) -> jax.Array:
    """The nll of `cross_entropy`, summed over the tokens of each row alone: float32 [B]. It has no gradient."""
    return _over_chunks(head, params, x, targets, weights, 0.0, 0.0, chunks, with_gradient=False, axis=-1)[0][1]


def _over_chunks(head, params, x, targets, weights, z_loss, label_smoothing, chunks, with_gradient, axis=None):
    """((total, nll), (d params, d x) or None), summed over `axis` of [B,S], or all of it.

    Chunk c holds the tokens s = c mod chunks: a strided cut, so that a sequence sharded over devices stays sharded
    within each chunk.
    """
    s = x.shape[1]
    if s % chunks:
        raise ValueError(f"cross_entropy: {chunks} chunks do not divide a sequence of {s}")
    one = functools.partial(_chunk, head, params, z_loss, label_smoothing, with_gradient, axis)
    if chunks == 1:
        return one(x, targets, weights)

    def cut(a):
        return jnp.moveaxis(a.reshape(a.shape[0], s // chunks, chunks, *a.shape[2:]), 2, 0)

    def body(carry, chunk):
        sums, gradient = one(*chunk)
        d_x = gradient[1] if with_gradient else None
        carry = jax.tree.map(jnp.add, carry, (sums, gradient[0] if with_gradient else None))
        return carry, d_x

    zero = jnp.zeros(() if axis is None else x.shape[:1], jnp.float32)
    # Parameters are float32, so that the chunks' gradients add up in it.
    start = ((zero, zero), jax.tree.map(jnp.zeros_like, params) if with_gradient else None)
    (sums, d_params), d_x = jax.lax.scan(body, start, (cut(x), cut(targets), cut(weights)))
    if not with_gradient:
        return sums, None
    return sums, (d_params, jnp.moveaxis(d_x, 0, 2).reshape(x.shape))


def _chunk(head, params, z_loss, label_smoothing, with_gradient, axis, x, targets, weights):
    if with_gradient:
        logits, pull_back = jax.vjp(head, params, x)
    else:
        logits, pull_back = head(params, x), None
    vocab = logits.shape[-1]
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exp = jnp.exp(logits - peak)
    z = jnp.sum(exp, axis=-1, keepdims=True)
    log_z = (peak + jnp.log(z))[..., 0]
    # A comparison rather than a gather: it fuses, and it stays local where the vocabulary is sharded.
    hit = targets[..., None] == jnp.arange(vocab)
    nll = log_z - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    per_token = nll + z_loss * log_z**2
    if label_smoothing:
        per_token = per_token + label_smoothing * (log_z - jnp.mean(logits, axis=-1) - nll)
    sums = (jnp.sum(weights * per_token, axis), jnp.sum(weights * nll, axis))
    if pull_back is None:
        return sums, None
    # Softmax and z-loss, from the `exp` that is there already.
    p = exp * ((weights * (1.0 + 2.0 * z_loss * log_z))[..., None] / z)
    d_logits = p - jnp.where(hit, (weights * (1.0 - label_smoothing))[..., None], 0.0)
    if label_smoothing:
        d_logits = d_logits - (label_smoothing / vocab) * weights[..., None]
    return sums, pull_back(d_logits)
