"""Adafactor's update (Shazeer & Stern, 2018, algorithms 4 to 6), for each layer of a stack by itself.

optax.adafactor factors the two largest dimensions of an array and takes its RMS over the whole array. With stacked
layers that is another algorithm: `q` [L,D,H,K] would keep a second moment per head, a deep narrow model would factor
its layers axis, and one layer's large update would clip all the others. Here the logical axes say what a matrix is,
as T5X's `logical_factor_rules` do; on one unstacked matrix the two agree, which a test holds.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.optim.matrices import Matrix, as_matrix, map_axes, n_stacked

EPS_GRAD = 1e-30  # epsilon_1 and epsilon_2 of the paper, section 9
EPS_SCALE = 1e-3  # a parameter of zeros moves by this


class AdafactorState(NamedTuple):
    """A parameter has `v_row` and `v_col`, or `v`, and `MaskedNode` for what it lacks.

    All keep the parameter's rank, with size 1 where they were averaged: `q` [L,D,H,K] has v_row [L,D,1,1] and v_col
    [L,1,H,K]. (TPU layouts do not pad those ones.)
    """

    count: jax.Array  # type: ignore[assignment]  # the name optax gives it
    v_row: Any
    v_col: Any
    v: Any


class _Moments(NamedTuple):
    row: Any = optax.MaskedNode()
    col: Any = optax.MaskedNode()
    full: Any = optax.MaskedNode()


def scale_by_adafactor(
    axes: Any, *, decay_rate: float, update_clip: float, min_dim_size_to_factor: int
) -> optax.GradientTransformation:
    """Updates in units of relative step size: RMS at most `update_clip` * max(EPS_SCALE, RMS(parameter)) per layer.

    With t = 1, 2, ..., b = 1 - t^-decay_rate, and a matrix G of gradients with means over rows R and columns C::

        v_row = b v_row + (1-b) mean_C(G^2 + EPS_GRAD)      v_col = b v_col + (1-b) mean_R(G^2 + EPS_GRAD)
        U = G / sqrt(v_row v_col / mean_R(v_row))           or  G / sqrt(v)  where it is not factored
        update = U / max(1, RMS(U) / update_clip) * max(EPS_SCALE, RMS(W))

    Factored: matrices (`as_matrix`) of at least `min_dim_size_to_factor` rows and columns. `axes` is a tree of axis
    names with the structure of the parameters.
    """
    matrices = map_axes(as_matrix, axes)
    stacked = map_axes(lambda names, _: n_stacked(names), axes)

    def factored(x, matrix: Matrix | None) -> bool:
        sizes = [math.prod(x.shape[i] for i in dims) for dims in matrix or ()]
        return bool(sizes) and min(sizes) >= min_dim_size_to_factor

    def start(p, matrix) -> _Moments:
        if not factored(p, matrix):
            return _Moments(full=jnp.zeros_like(p))
        row, col = ([1 if i in dims else n for i, n in enumerate(p.shape)] for dims in (matrix.cols, matrix.rows))
        return _Moments(row=jnp.zeros(row, p.dtype), col=jnp.zeros(col, p.dtype))

    def step(b, g, p, row, col, full, matrix, n_stack) -> tuple[jax.Array, _Moments]:
        g2 = jnp.square(g) + EPS_GRAD
        if factored(p, matrix):
            row = b * row + (1 - b) * jnp.mean(g2, axis=matrix.cols, keepdims=True)
            col = b * col + (1 - b) * jnp.mean(g2, axis=matrix.rows, keepdims=True)
            mean = jnp.mean(row, axis=matrix.rows, keepdims=True)
            # `row * col` would underflow: EPS_GRAD^2 is no float32.
            u = g * jax.lax.rsqrt(row / mean) * jax.lax.rsqrt(col)
            moments = _Moments(row=row, col=col)
        else:
            full = b * full + (1 - b) * g2
            u = g * jax.lax.rsqrt(full)
            moments = _Moments(full=full)
        within = tuple(range(n_stack, p.ndim))
        clip = jnp.maximum(1.0, _rms(u, within) / update_clip)
        return u * (jnp.maximum(EPS_SCALE, _rms(p, within)) / clip), moments

    def pack(count, treedef, moments) -> AdafactorState:
        return AdafactorState(count, *(treedef.unflatten(field) for field in zip(*moments, strict=True)))

    def init(params):
        leaves, treedef = jax.tree.flatten(params)
        return pack(jnp.zeros((), jnp.int32), treedef, map(start, leaves, treedef.flatten_up_to(matrices)))

    def update(updates, state, params=None):
        assert params is not None, "Adafactor scales its updates by the parameters"
        count = jnp.asarray(optax.safe_increment(state.count))
        b = 1 - count.astype(jnp.float32) ** -decay_rate  # 0 at first: the moments begin with a gradient
        grads, treedef = jax.tree.flatten(updates)
        rest = [treedef.flatten_up_to(t) for t in (params, state.v_row, state.v_col, state.v, matrices, stacked)]
        new = [step(b, *leaf) for leaf in zip(grads, *rest, strict=True)]
        return treedef.unflatten([u for u, _ in new]), pack(count, treedef, [moments for _, moments in new])

    return optax.GradientTransformation(init, update)


def _rms(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))
