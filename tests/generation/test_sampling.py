import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.generation import Sampling
from lm.generation.sampling import draw, knobs, repetition_penalty, row_keys, warp

SETTINGS = [
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_k=100),
    dict(top_p=0.6),
    dict(top_p=1e-6),
    dict(min_p=0.2),
    dict(temperature=1.7, top_k=11, top_p=0.8, min_p=0.05),
]


def reference(scores, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """float64, by sorting, one row at a time: the definitions of `transformers`' warpers."""
    scores = np.asarray(scores, np.float64) / temperature

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    for row in scores:
        if top_k:
            row[row < np.sort(row)[-min(top_k, row.size)]] = -np.inf
        if top_p < 1.0:
            order = np.argsort(row)
            low = np.cumsum(softmax(row)[order]) <= 1.0 - top_p
            low[-1] = False
            row[order[low]] = -np.inf
        p = softmax(row)
        row[p < min_p * p.max()] = -np.inf
    return scores


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_equal_a_float64_reference(settings):
    scores = np.random.default_rng(0).normal(size=(7, 53)).astype(np.float32) * 3
    got = np.asarray(jax.jit(warp)(scores, knobs(Sampling(**settings))))
    want = reference(scores, **settings)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_filters_keep_ties_and_never_revive_banned_ids():
    scores = jnp.array([[2.0, -jnp.inf, 2.0, -1.0, 0.0, -0.5, 2.0]])
    keep = lambda **s: np.flatnonzero(np.isfinite(np.asarray(warp(scores, knobs(Sampling(**s))))[0])).tolist()
    assert keep(top_k=1) == keep(top_k=3) == keep(top_p=0.1) == keep(min_p=1.0) == [0, 2, 6]
    assert keep(top_k=4) == [0, 2, 4, 6]
    assert keep() == keep(top_k=50) == keep(top_p=0.9999999) == [0, 2, 3, 4, 5, 6]


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    rng = np.random.default_rng(1)
    scores, seen = rng.normal(size=(3, 17)).astype(np.float32), rng.random((3, 17)) < 0.4
    want = np.array([[(s / 1.3 if s > 0 else s * 1.3) if r else s for s, r in zip(*x)] for x in zip(scores, seen)])
    np.testing.assert_allclose(repetition_penalty(scores, seen, jnp.float32(1.3)), want, rtol=1e-6)


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.6, top_k=5), dict(top_p=0.7)], ids=str)
def test_draws_follow_the_filtered_softmax(settings):
    """Chi-square over 8000 draws; 27.9 is the 0.1 % point of 9 degrees of freedom, 10 ids minus one."""
    n = 8000
    scores = np.random.default_rng(2).normal(size=(1, 10)).astype(np.float32)
    k = knobs(Sampling(**settings))
    keys = row_keys(jnp.uint32(5), jnp.arange(n))
    args = jnp.broadcast_to(scores, (n, 10)), jnp.zeros((n, 10), bool), keys, jnp.int32(3), k
    counts = np.bincount(np.asarray(jax.jit(draw)(*args)), minlength=10)
    p = np.exp(reference(scores, **settings)[0])
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    chi2 = ((counts - n * p)[p > 0] ** 2 / (n * p)[p > 0]).sum()
    assert chi2 < 27.9


def test_noise_differs_by_seed_row_and_step():
    scores, seen = jnp.zeros((4, 1009)), jnp.zeros((4, 1009), bool)
    k = knobs(Sampling())
    draws = [
        tuple(np.asarray(draw(scores, seen, row_keys(jnp.uint32(seed), jnp.arange(4)), jnp.int32(step), k)).tolist())
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert len({x for row in draws for x in row}) > 12


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(max_new_tokens=0), "generate.max_new_tokens: expected at least 1, got 0"),
        (dict(temperature=-0.1), "generate.temperature"),
        (dict(temperature=float("nan")), "generate.temperature"),
        (dict(top_k=-1), "generate.top_k"),
        (dict(top_p=0.0), r"generate.top_p: expected a probability in \(0, 1\]"),
        (dict(top_p=1.1), "generate.top_p"),
        (dict(min_p=-0.1), "generate.min_p"),
        (dict(repetition_penalty=0.0), "generate.repetition_penalty"),
        (dict(seed=-1), "generate.seed"),
        (dict(seed=2**32), "generate.seed"),
        (dict(stop="ab"), "generate.stop: expected a tuple"),
        (dict(stop=("",)), "generate.stop"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        Sampling(**bad)
