"""The train step and the evaluation step: pure functions of (state, batch), with no device or mesh in them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from lm.objectives import Loss, Objective, Score
from lm.optim import Optimizer, clip_by_norm, global_norm
from lm.sharding import constrain
from lm.training.state import State

Batch = dict[str, jax.Array]


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optim: Optimizer,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    dtype: DTypeLike,
    microbatches: int,
    seed: int,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """(state, batch) -> (state, metrics): loss, nll and grad_norm are per target, lr is that of this step."""

    def loss_fn(params, batch, key) -> tuple[jax.Array, Loss]:
        with jax.named_scope("loss"):
            loss = objective.loss(nnx.merge(graphdef, params), batch, dtype=dtype, key=key)
        return loss.total, loss

    def gradients(params, batch, key) -> tuple[dict, Loss]:
        """Sums gradients over microbatches; the caller divides once by the number of targets."""
        grad = jax.grad(loss_fn, has_aux=True)
        if microbatches == 1:
            return grad(params, batch, key)

        def body(total, i_and_batch):
            i, microbatch = i_and_batch
            return jax.tree.map(jnp.add, total, grad(params, microbatch, jax.random.fold_in(key, i))), None

        # Strided, so that each device keeps its own rows in every microbatch.
        split = {k: _strided(v, microbatches) for k, v in batch.items()}
        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, params), Loss(zero, zero, zero))
        return jax.lax.scan(body, start, (jnp.arange(microbatches), split))[0]

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        # By the step: a resumed run draws what it would have.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, loss = gradients(state.params, batch, key)
        weight = jnp.maximum(loss.weight, 1.0)  # a batch without a target gives zeros, not NaN
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = global_norm(grads)
        if optim.clip_norm is not None:
            grads = clip_by_norm(grads, norm, optim.clip_norm)
        with jax.named_scope("optimizer"):
            updates, opt = tx.update(grads, state.opt, state.params)
            params = optax.apply_updates(state.params, updates)
        new = State(state.step + 1, params, opt)
        if state.ema is not None:
            decay = optim.ema_decay
            assert decay is not None
            new = new._replace(ema=jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params))
        metrics = {
            "loss": loss.total / weight,
            "nll": loss.nll / weight,
            "grad_norm": norm,
            "lr": schedule(state.step),  # `tx` counts for itself, from 0 as this does
            "tokens": loss.weight,
        }
        return new, metrics

    return train_step


def make_score_step(
    graphdef: nnx.GraphDef, objective: Objective, *, dtype: DTypeLike
) -> Callable[[dict, Batch, jax.Array], Score]:
    """(params, batch, token_bytes [V]) -> sums over the batch."""

    def score(params: dict, batch: Batch, token_bytes: jax.Array) -> Score:
        return objective.score(nnx.merge(graphdef, params), batch, token_bytes, dtype=dtype)

    return score


def _strided(x: jax.Array, n: int) -> jax.Array:
    x = jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)
    return constrain(x, None, "act_batch", *(None,) * (x.ndim - 2))
