from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from lm.mesh import Mesh
from lm.optim import Constant
from lm.training.state import State
from tests.models import reference
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal
from tests.training.runs import LLAMA, PAD, SGD_, START, S, batch, config, make_setup, put, run, start

MESHES = [
    ("llama", Mesh(data=8, fsdp=1)),
    ("llama", Mesh(fsdp=4, tensor=2)),
    ("llama", Mesh(data=2, fsdp=1, seq=2, tensor=2)),
    ("llama, 2 microbatches", Mesh(data=2, fsdp=2, seq=2)),
]


@pytest.mark.parametrize("name, mesh", [*MESHES[2:], *(pytest.param(*m, marks=pytest.mark.slow) for m in MESHES[:2])])
def test_any_mesh_computes_what_one_device_does(name, mesh):
    assert_close(dataclasses.astuple(run(name, mesh)), dataclasses.astuple(run("llama")))


@pytest.mark.slow
def test_adamw_on_a_mesh_computes_what_it_does_on_one_device():
    assert_close(
        dataclasses.astuple(run("gpt2, adamw", Mesh(fsdp=4, tensor=2))), dataclasses.astuple(run("gpt2, adamw"))
    )


def test_accumulation_is_as_one_batch_when_microbatches_count_different_targets():
    counts = (batch(0)["tokens"][:, 1:] != PAD).sum(axis=1).reshape(2, 4).sum(axis=0)  # row r is in microbatch r mod 4
    assert len(set(counts)) > 1
    assert_close(dataclasses.astuple(run("llama, 4 microbatches")), dataclasses.astuple(run("llama")))


def test_loss_and_nll_are_means_over_targets_and_agree_with_numpy():
    tokens, metrics = batch(0)["tokens"], run("llama").metrics[0]
    segments = np.cumsum(tokens[:, :-1] == START, axis=1)
    positions = np.array([[(r[:i] == r[i]).sum() for i in range(S)] for r in segments])
    _, logits = reference.llama(
        random_params(LLAMA), tokens[:, :-1], eps=LLAMA.norm_eps, theta=50.0, positions=positions, segments=segments
    )
    weights = (tokens[:, 1:] != PAD) * 1.0
    total, nll = reference.cross_entropy(logits, tokens[:, 1:], weights, z_loss=0.01)
    n = weights.sum()
    assert_close((metrics["loss"], metrics["nll"], metrics["tokens"]), (total / n, nll / n, n))


def test_parameters_move_by_lr_against_the_gradient():
    """SGD by hand over two steps, from the momentum that the state holds."""
    r = run("llama")
    for before, after, m in zip(r.states, r.states[1:], r.metrics):
        step = jax.tree.map(lambda t: m["lr"] * t, trace(after))  # noqa: B023, called at once
        assert_close(after.params, jax.tree.map(np.subtract, before.params, step))
    gradient = jax.tree.map(lambda new, old: new - 0.9 * old, trace(r.states[2]), trace(r.states[1]))
    for g, m in zip((trace(r.states[1]), gradient), r.metrics):
        assert_close(m["grad_norm"], norm(g))


def test_clipping_scales_the_gradient_to_the_norm_and_reports_it_unclipped():
    free, clipped = run("llama"), run("llama, clipped")
    g = trace(free.states[1])
    assert norm(g) > 0.1
    assert_close(trace(clipped.states[1]), jax.tree.map(lambda g_: g_ * 0.1 / norm(g), g))
    assert clipped.metrics[0]["grad_norm"] == free.metrics[0]["grad_norm"]


def test_ema_is_the_mean_of_the_parameters_with_exponential_weights():
    states = run("llama").states
    ema = states[0].params
    for state in states[1:]:
        ema = jax.tree.map(lambda e, p: 0.8 * e + 0.2 * p, ema, state.params)
        assert_close(state.ema, ema)


def test_lr_is_that_of_the_schedule_and_steps_are_counted():
    r = run("llama", steps=4)
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * t / 8)) / 2 for t in (0, 1)]  # 2 steps of warm-up, then 8
    np.testing.assert_allclose([m["lr"] for m in r.metrics], [0.15, 0.3, 0.3 * cosine[0], 0.3 * cosine[1]], rtol=1e-6)
    assert [int(s.step) for s in r.states] == [0, 1, 2, 3, 4]


def test_bfloat16_computes_near_float32_and_keeps_the_state_in_float32():
    low, full = run("llama, bfloat16"), run("llama")
    assert {a.dtype for a in jax.tree.leaves(low.states[1])} == {np.dtype("float32"), np.dtype("int32")}
    assert_close(low.metrics[0], full.metrics[0], "bfloat16")
    assert low.metrics[0]["loss"] != full.metrics[0]["loss"]
    # Single entries of a gradient may cancel; its direction may not.
    for a, b in zip(jax.tree.leaves(trace(low.states[1])), jax.tree.leaves(trace(full.states[1]))):
        assert (a * b).sum() > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


def test_dropout_is_drawn_from_the_step_and_the_old_state_is_given_up():
    model = dataclasses.replace(LLAMA, n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, d_ff=12, dropout=0.3)
    optim = dataclasses.replace(SGD_, schedule=Constant(), ema_decay=None)
    setup = make_setup(config(model=model, optim=optim))

    def gradient(step: int) -> dict:
        state, rows = start(setup, step), put(batch(0), setup.batch_shardings)
        new, _ = setup.step(state, rows)
        assert all(a.is_deleted() for a in jax.tree.leaves(state))
        assert not rows["tokens"].is_deleted()
        return trace(jax.tree.map(np.array, new))

    first, again, later = gradient(0), gradient(0), gradient(1)
    assert_equal(again, first)
    assert norm(jax.tree.map(np.subtract, later, first)) > 0.1 * norm(first)


def trace(state: State) -> dict:
    """The momentum in SGD's state."""
    is_trace = lambda x: isinstance(x, optax.TraceState)
    (found,) = filter(is_trace, jax.tree.leaves(state.opt, is_leaf=is_trace))
    return found.trace


def norm(tree: dict) -> float:
    return float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree))))
