from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.models import Llama
from lm.models.base import abstract
from lm.nn.dropout import dropout
from lm.nn.param import ones, param
from lm.nn.stack import Remat, Stack, unstack
from tests.models.reference import random_params
from tests.tolerances import assert_close

MODEL = Llama(vocab_size=53, d_model=12, n_layers=2, n_heads=2, d_ff=20)
PARAMS = random_params(MODEL)
TOKENS = np.random.default_rng(0).integers(0, 53, (2, 7)).astype(np.int32)
WEIGHT = np.random.default_rng(1).normal(size=(2, 7, 12)).astype(np.float32)


def hidden_fn(**how):
    """params -> hidden states [2,7,12], with dropout where the model has it."""
    graphdef = abstract(dataclasses.replace(MODEL, **how)).graphdef
    return lambda params: nnx.merge(graphdef, params)(TOKENS, dtype=jnp.float32, key=jax.random.key(0)).hidden


@functools.cache
def run(scan: bool, remat: str):
    """(gradient of the parameters, hidden states)"""
    hidden = hidden_fn(scan=scan, remat=remat)

    def f(params):
        x = hidden(params)
        return jnp.sum(x * WEIGHT), x

    return jax.jit(jax.grad(f, has_aux=True))(PARAMS)


# Unrolled, a policy differs only in what stands against common subexpressions: the default stands for all.
HOW = [(True, remat) for remat in get_args(Remat) if remat != "none"] + [(False, "none"), (False, MODEL.remat)]


@pytest.mark.parametrize("scan, remat", HOW)
def test_values_and_gradients_do_not_depend_on_scan_and_remat(scan, remat):
    assert_close(run(scan, remat), run(True, "none"))


def test_dropout_does_not_depend_on_scan():
    scanned, unrolled = (jax.jit(hidden_fn(scan=scan, dropout=0.4))(PARAMS) for scan in (True, False))
    assert_close(unrolled, scanned)
    assert np.abs(scanned - jax.jit(hidden_fn())(PARAMS)).max() > 0.1


class Digit(nnx.Module):
    """A layer that adds its own power of ten where dropout keeps."""

    def __init__(self, rngs: nnx.Rngs):
        self.power = param(rngs, (), (), ones)

    def __call__(self, x, context, layer, *, key, cache):
        return x + self.power[...] * (dropout(jnp.ones_like(x), 0.5, key) != 0), cache, None


@pytest.mark.parametrize("scan", [True, False])
def test_each_layer_drops_by_itself(scan):
    stack = Stack(3, scan=scan)
    layers = stack.init(Digit, nnx.Rngs(0))
    layers.power[...] = jnp.array([1.0, 10.0, 100.0])
    sums = np.asarray(jax.jit(lambda: stack([layers], jnp.zeros(200), None, key=jax.random.key(0)).x)()).astype(int)
    kept = np.array([sums // power % 10 for power in (1, 10, 100)])
    assert set(kept.flat) == {0, 1}
    assert (np.abs(np.corrcoef(kept) - np.eye(3)) < 4 / 200**0.5).all()


def test_parameters_do_not_depend_on_scan_and_remat():
    trees = [abstract(dataclasses.replace(MODEL, **how)) for how in ({}, dict(scan=False), dict(remat="none"))]
    assert trees[0].params == trees[1].params == trees[2].params
    assert trees[0].infos == trees[1].infos == trees[2].infos


def test_unstack_gives_the_rows_and_its_gradient_stacks_theirs():
    x, weights = WEIGHT[0], np.arange(1.0, 8.0, dtype=np.float32)
    rows = unstack(x, 7)
    np.testing.assert_array_equal(np.stack(rows), x)
    grad = jax.grad(lambda x: sum(w * jnp.sum(row**2) for w, row in zip(weights, unstack(x, 7))))(x)
    assert_close(grad, 2 * weights[:, None] * x)
    # A row that is not used has a gradient of zero.
    grad = jax.grad(lambda x: jnp.sum(unstack(x, 7)[2]))(x)
    np.testing.assert_array_equal(grad, np.eye(7)[2][:, None] * np.ones_like(x))
