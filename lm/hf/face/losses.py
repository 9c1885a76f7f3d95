"""The losses of the classes of transformers: means over what is labelled, with -100 for what is not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

IGNORED = -100


def cross_entropy(logits: jax.Array, labels: jax.Array, ignored: int | jax.Array = IGNORED) -> jax.Array:
    """logits [...,V], labels int [...] -> the mean of -log p over labels that are not `ignored`."""
    counted = labels != ignored
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(log_p, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(counted, nll, 0.0)) / jnp.sum(counted)


def next_token(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits [B,S,V], labels [B,S] at the places of their tokens -> the mean loss of the next token."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def sequence_labels(logits: jax.Array, labels: jax.Array, problem: str | None) -> jax.Array:
    """logits [B,n]; problem as `problem_type` of config.json; None: regression of one number, else by the dtype."""
    if problem is None:
        integer = jnp.issubdtype(labels.dtype, jnp.integer)
        one = logits.shape[-1] == 1
        problem = "regression" if one else "single_label_classification" if integer else "multi_label_classification"
    if problem == "regression":
        return jnp.mean((logits.reshape(labels.shape) - labels.astype(logits.dtype)) ** 2)
    if problem == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    y = labels.astype(logits.dtype)
    # Binary cross entropy, in the form that cannot overflow.
    return jnp.mean(jnp.maximum(logits, 0) - logits * y + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def spans(start: jax.Array, end: jax.Array, starts: jax.Array, ends: jax.Array) -> jax.Array:
    """start, end logits [B,S]; starts, ends int [B]. Places behind the row count as unlabelled."""
    s = start.shape[1]
    first, last = (cross_entropy(x, jnp.clip(at.reshape(-1), 0, s), s) for x, at in ((start, starts), (end, ends)))
    return (first + last) / 2
