from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.models import GPT2, Gemma2, Gemma3, Llama, Qwen3Moe
from lm.models.base import abstract
from lm.nn.block import Context, Layer
from lm.nn.compute import Compute, Remat
from lm.nn.dropout import dropout
from lm.nn.mask import causal_mask
from lm.nn.param import ones, param
from lm.nn.stack import Stack, segments, unstack
from tests.halves import slow_but
from tests.models.reference import random_params
from tests.tolerances import assert_close

MODEL = Llama(vocab_size=53, d_model=12, n_layers=2, n_heads=2, d_ff=20)
PARAMS = random_params(MODEL)
TOKENS = np.random.default_rng(0).integers(0, 53, (2, 7)).astype(np.int32)
WEIGHT = np.random.default_rng(1).normal(size=(2, 7, 12)).astype(np.float32)


def hidden_fn(dropout=0.0, **how):
    """params -> hidden states [2,7,12], with dropout where the model has it."""
    graphdef = abstract(dataclasses.replace(MODEL, dropout=dropout, compute=Compute(**how))).graphdef
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
HOW = [(True, remat) for remat in get_args(Remat) if remat != "none"] + [(False, "none"), (False, MODEL.compute.remat)]


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
    stack = Stack(3, Compute(scan=scan, remat="none"))
    layers = stack.init(Digit, nnx.Rngs(0))
    layers.power[...] = jnp.array([1.0, 10.0, 100.0])
    sums = np.asarray(
        jax.jit(lambda: stack([layers], jnp.zeros(200), Context(causal_mask(1)), key=jax.random.key(0)).x)()
    ).astype(int)
    kept = np.array([sums // power % 10 for power in (1, 10, 100)])
    assert set(kept.flat) == {0, 1}
    assert (np.abs(np.corrcoef(kept) - np.eye(3)) < 4 / 200**0.5).all()


def test_parameters_do_not_depend_on_scan_and_remat():
    trees = [
        abstract(dataclasses.replace(MODEL, compute=how))
        for how in (Compute(), Compute(scan=False), Compute(remat="none"))
    ]
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


S, F, R = Layer(window=4), Layer(), Layer(rotation=1)


def numbered(*layers: Layer) -> tuple[Layer, ...]:
    counts: dict[int, int] = {}
    out = []
    for layer in layers:
        out.append(dataclasses.replace(layer, index=counts.setdefault(layer.block, 0)))
        counts[layer.block] += 1
    return tuple(out)


@pytest.mark.parametrize(
    "order, shapes",
    [
        (numbered(*[F] * 12), [(1, 12)]),
        (numbered(*[S, F] * 5), [(2, 5)]),
        (numbered(*[S, S, S, S, S, F] * 4, S), [(6, 4), (1, 1)]),
        (numbered(*[F] * 3, *[S] * 5), [(1, 3), (1, 5)]),
        (numbered(*[Layer(scale=1 / (i + 1)) for i in range(3)]), [(1, 1)] * 3),
        (numbered(*[Layer(), Layer(block=1)] * 3), [(2, 3)]),
        ((Layer(),) * 6, [(1, 6)]),
        ((Layer(index=0), Layer(index=1)) * 2 + (Layer(index=2), Layer(index=3)) * 2, [(2, 2), (2, 2)]),
    ],
    ids=["equal", "alternating", "five to one", "two runs", "all differ", "two blocks", "one shared", "shared groups"],
)
def test_a_scan_runs_over_the_shortest_unit_that_repeats(order, shapes):
    found = segments(order)
    assert [(len(s.unit), s.repeats) for s in found] == shapes
    run = []
    for s in found:
        for k in range(s.repeats):
            for layer in s.unit:
                step = 0 if s.shared else k * sum(o.block == layer.block for o in s.unit)
                run.append(dataclasses.replace(layer, index=layer.index + step))
    assert tuple(run) == order


SHAPE = {"vocab_size": 53, "d_model": 12, "n_heads": 2, "d_ff": 20}
MIXED = {
    "windows": lambda **how: Gemma2(n_layers=5, window=3, **SHAPE, **how),
    "two rotations": lambda **how: Gemma3(n_layers=7, window=3, **SHAPE, **how),
    "routed and dense": lambda **how: Qwen3Moe(
        n_layers=5, n_experts=3, top_k=2, expert_d_ff=7, dense=(1, 3), **SHAPE, **how
    ),
    "scales": lambda **how: GPT2(n_layers=3, scale_by_layer=True, **SHAPE, **how),
}


@pytest.mark.parametrize("name", slow_but(["windows"], MIXED))
def test_layers_that_differ_are_the_same_scanned_and_unrolled_with_their_gradients(name):
    make, outs = MIXED[name], []
    params = random_params(make())
    for how in (Compute(), Compute(scan=False, remat="none")):
        graphdef = abstract(make(compute=how)).graphdef

        def f(params, graphdef=graphdef):
            out = nnx.merge(graphdef, params)(TOKENS, dtype=jnp.float32, record=True)
            router = 0.0 if out.router is None else jnp.mean(out.router.probs**2)
            return jnp.mean(out.hidden * WEIGHT) + jnp.mean(out.states**2) + router, (out.states, out.router)

        outs.append(jax.jit(jax.grad(f, has_aux=True))(params))
    assert_close(outs[0], outs[1])
    assert outs[0][1][0].shape == (make().n_layers + 1, 2, 7, 12)
