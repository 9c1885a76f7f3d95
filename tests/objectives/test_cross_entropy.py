from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.objectives.cross_entropy import cross_entropy, row_nll
from tests.models import reference
from tests.tolerances import assert_close

B, S, D, V = 2, 6, 5, 11
rng = np.random.default_rng(0)
PARAMS = {k: rng.normal(size=s).astype(np.float32) for k, s in {"w": (D, V), "b": (V,)}.items()}
X = rng.normal(size=(B, S, D)).astype(np.float32)
TARGETS = rng.integers(0, V, (B, S)).astype(np.int32)
WEIGHTS = np.array([[1, 0, 0.5, 2, 1, 0], [0, 0, 1, 1, 3, 0.25]], np.float32)
TERMS = [(0.0, 0.0), (0.03, 0.0), (0.0, 0.2), (0.03, 0.2)]  # z_loss, label_smoothing


def head(params, x):
    return (x @ params["w"].astype(x.dtype) + params["b"].astype(x.dtype)).astype(jnp.float32)


@functools.cache
def compiled(z_loss, label_smoothing, chunks=1):
    """(params, x) -> ((3 total, (total, nll)), gradients of 3 total): the cotangent is not one."""

    def f(params, x):
        total, nll = cross_entropy(head, params, x, TARGETS, WEIGHTS, z_loss, label_smoothing, chunks)
        return 3 * total, (total, nll)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))


def in_numpy(params, x, z_loss, label_smoothing):
    logits = np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64) + params["b"]
    return reference.cross_entropy(logits, TARGETS, WEIGHTS, z_loss, label_smoothing)


@pytest.mark.parametrize("terms", TERMS)
def test_sums_agree_with_numpy(terms):
    (_, sums), _ = compiled(*terms)(PARAMS, X)
    assert_close(sums, in_numpy(PARAMS, X, *terms))


@pytest.mark.parametrize("terms", TERMS)
def test_gradient_agrees_with_that_of_the_formula(terms):
    z_loss, label_smoothing = terms

    def naive(params, x):
        logits = head(params, x)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        aim = (1 - label_smoothing) * jax.nn.one_hot(TARGETS, V) + label_smoothing / V
        per_token = -jnp.sum(aim * jax.nn.log_softmax(logits), axis=-1) + z_loss * log_z**2
        return 3 * jnp.sum(WEIGHTS * per_token)

    assert_close(compiled(*terms)(PARAMS, X)[1], jax.jit(jax.grad(naive, argnums=(0, 1)))(PARAMS, X))


def test_gradient_agrees_with_finite_differences_in_float64():
    terms, h = TERMS[-1], 1e-5
    d_params, d_x = compiled(*terms)(PARAMS, X)[1]
    for _ in range(3):  # along random directions, all inputs at once
        v = {k: rng.normal(size=p.shape) for k, p in PARAMS.items()}
        v_x = rng.normal(size=X.shape)
        at = lambda t: in_numpy({k: PARAMS[k] + t * v[k] for k in v}, X + t * v_x, *terms)[0]  # noqa: B023
        slope = sum((np.asarray(d_params[k]) * v[k]).sum() for k in v) + (np.asarray(d_x) * v_x).sum()
        np.testing.assert_allclose(slope, 3 * (at(h) - at(-h)) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize("chunks", [2, 3, 6])
def test_any_number_of_chunks_gives_the_same(chunks):
    assert_close(compiled(*TERMS[-1], chunks)(PARAMS, X), compiled(*TERMS[-1])(PARAMS, X))


@pytest.mark.parametrize("chunks", [1, 3])
def test_without_a_gradient_the_sums_are_the_same(chunks):
    sums = jax.jit(lambda: cross_entropy(head, PARAMS, X, TARGETS, WEIGHTS, *TERMS[-1], chunks))()
    assert_close(sums, in_numpy(PARAMS, X, *TERMS[-1]))


@pytest.mark.parametrize("chunks", [1, 3])
def test_each_row_has_the_nll_it_has_alone(chunks):
    rows = jax.jit(lambda: row_nll(head, PARAMS, X, TARGETS, WEIGHTS, chunks))()
    logits = X.astype(np.float64) @ PARAMS["w"] + PARAMS["b"]
    alone = [reference.cross_entropy(*(a[i : i + 1] for a in (logits, TARGETS, WEIGHTS)), 0.0, 0.0)[1] for i in (0, 1)]
    assert_close(rows, np.array(alone))


def test_only_the_total_has_a_gradient_and_only_to_params_and_x():
    weigh = lambda weights: cross_entropy(head, PARAMS, X, TARGETS, weights, 0.03)[0]
    np.testing.assert_array_equal(jax.grad(weigh)(WEIGHTS), np.zeros((B, S)))
    nll = lambda x: cross_entropy(head, PARAMS, x, TARGETS, WEIGHTS, 0.03)[1]
    np.testing.assert_array_equal(jax.grad(nll)(X), np.zeros(X.shape))


def test_a_weight_of_zero_hides_whatever_stands_there():
    x = np.where(WEIGHTS[..., None] == 0, 1e3, X).astype(np.float32)
    (_, sums), (_, d_x) = compiled(*TERMS[-1])(PARAMS, x)
    assert_close(sums, in_numpy(PARAMS, X, *TERMS[-1]))
    np.testing.assert_array_equal(np.asarray(d_x)[WEIGHTS == 0], 0)


def test_large_logits_do_not_overflow():
    (_, sums), grads = compiled(0.0, 0.0)(PARAMS, 1e4 * X)
    assert_close(sums, in_numpy(PARAMS, 1e4 * X.astype(np.float64), 0.0, 0.0))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_have_the_dtype_of_what_they_belong_to(chunks):
    x = jnp.asarray(X, jnp.bfloat16)
    (_, sums), (d_params, d_x) = compiled(*TERMS[-1], chunks)(PARAMS, x)
    assert d_x.dtype == jnp.bfloat16 and d_params["w"].dtype == jnp.float32
    assert sums[0].dtype == sums[1].dtype == jnp.float32
    assert_close(
        ((d_params, d_x), sums), (compiled(*TERMS[-1])(PARAMS, X)[1], in_numpy(PARAMS, X, *TERMS[-1])), "bfloat16"
    )


def test_chunks_that_do_not_divide_the_sequence_are_refused():
    with pytest.raises(ValueError, match="4 chunks do not divide a sequence of 6"):
        cross_entropy(head, PARAMS, X, TARGETS, WEIGHTS, 0.0, 0.0, 4)
