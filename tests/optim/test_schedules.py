from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.optim import WSD, Constant, Cosine, InverseSqrt, Linear, Schedule

PEAK, TOTAL = 0.3, 41
ALL = [
    Constant(warmup_steps=7),
    Cosine(warmup_steps=7),
    Linear(warmup_steps=7),
    InverseSqrt(warmup_steps=7),
    WSD(warmup_steps=7, decay_steps=11),
]
each = pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)


def values(schedule: Schedule, total: int = TOTAL, steps: int | None = None) -> np.ndarray:
    return np.asarray(jax.vmap(schedule.make(PEAK, total))(jnp.arange(steps or total)), np.float64)


def ramp(s: int, warmup: int) -> float:
    return min(1.0, (s + 1) / warmup) if warmup else 1.0


@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_and_linear_follow_their_closed_forms(warmup, final):
    t = [min(max((s - warmup) / max(TOTAL - warmup, 1), 0.0), 1.0) for s in range(TOTAL)]
    cosine = [
        PEAK * ramp(s, warmup) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t[s]))) for s in range(TOTAL)
    ]
    linear = [PEAK * ramp(s, warmup) * (final + (1 - final) * (1 - t[s])) for s in range(TOTAL)]
    np.testing.assert_allclose(values(Cosine(warmup_steps=warmup, final_fraction=final)), cosine, rtol=2e-6, atol=1e-8)
    np.testing.assert_allclose(values(Linear(warmup_steps=warmup, final_fraction=final)), linear, rtol=2e-6, atol=1e-8)


def test_constant_stays_at_the_peak():
    np.testing.assert_array_equal(values(Constant()), np.float32(PEAK))


def test_inverse_sqrt_is_t5s_without_a_ramp_and_the_transformers_with_one():
    t5 = [PEAK * math.sqrt(10) / math.sqrt(max(s, 10)) for s in range(TOTAL)]
    np.testing.assert_allclose(values(InverseSqrt(timescale=10)), t5, rtol=1e-6)
    transformer = [PEAK * ramp(s, 7) * math.sqrt(7) / math.sqrt(max(s, 7)) for s in range(TOTAL)]
    np.testing.assert_allclose(values(InverseSqrt(warmup_steps=7)), transformer, rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_wsd_is_flat_then_cools_down(final):
    t = [max(s - 30, 0) / 11 for s in range(TOTAL)]
    linear = [PEAK * ramp(s, 7) * (final + (1 - final) * (1 - t[s])) for s in range(TOTAL)]
    sqrt = [PEAK * ramp(s, 7) * (final + (1 - final) * (1 - math.sqrt(t[s]))) for s in range(TOTAL)]
    common = dict(warmup_steps=7, decay_steps=11, final_fraction=final)
    np.testing.assert_allclose(values(WSD(**common, cooldown="linear")), linear, rtol=2e-6)
    np.testing.assert_allclose(values(WSD(**common, cooldown="1-sqrt")), sqrt, rtol=2e-6)


@each
def test_warmup_starts_above_zero_and_peaks_after_warmup_steps(schedule):
    lr = values(schedule)
    np.testing.assert_allclose(lr[:7], [PEAK * k / 7 for k in range(1, 8)], rtol=1e-6)
    assert lr[6] == lr[7] == np.float32(PEAK)


@each
def test_no_update_has_a_rate_of_zero_and_none_exceeds_the_peak(schedule):
    lr = values(schedule)
    assert np.all(lr > 0) and np.all(lr <= np.float32(PEAK)) and np.all(np.diff(lr[7:]) <= 0)


@pytest.mark.parametrize("kind", [Cosine, Linear, WSD])
def test_the_final_rate_is_reached_at_total_steps_and_kept(kind):
    extra = dict(decay_steps=11) if kind is WSD else {}
    lr = values(kind(final_fraction=0.25, **extra), steps=TOTAL + 5)
    np.testing.assert_allclose(lr[TOTAL:], 0.25 * PEAK, rtol=1e-6)
    assert lr[TOTAL - 1] > lr[TOTAL]


def test_wsd_runs_of_different_lengths_share_their_stable_part():
    short, long = (values(WSD(warmup_steps=7, decay_steps=11), total) for total in (41, 97))
    np.testing.assert_array_equal(short[:30], long[:30])


@each
def test_a_python_step_an_array_step_and_a_traced_step_agree(schedule):
    lr = schedule.make(PEAK, TOTAL)
    for step in (0, 6, 23):
        assert lr(step) == lr(jnp.int32(step)) and lr(step).dtype == jnp.float32
        np.testing.assert_allclose(jax.jit(lr)(step), lr(step), rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Cosine(warmup_steps=-1), "optim.schedule.warmup_steps: expected >= 0, got -1"),
        (lambda: Cosine(final_fraction=1.5), "optim.schedule.final_fraction: expected 0 to 1, got 1.5"),
        (lambda: Linear(final_fraction=-0.1), "optim.schedule.final_fraction: expected 0 to 1, got -0.1"),
        (lambda: WSD(decay_steps=0), "optim.schedule.decay_steps: expected > 0, got 0"),
        (lambda: WSD(decay_steps=3, cooldown="cosine"), "optim.schedule.cooldown: expected 'linear' or '1-sqrt'"),
        (lambda: InverseSqrt(), "optim.schedule.timescale: expected > 0 where warmup_steps is 0, got None"),
        (lambda: InverseSqrt(timescale=0), "optim.schedule.timescale: expected > 0, got 0"),
        (lambda: InverseSqrt(timescale=5, warmup_steps=6), "optim.schedule.timescale: expected >= warmup_steps, got 5"),
        (lambda: Cosine(warmup_steps=42).make(PEAK, 41), "optim.schedule.warmup_steps: expected <= the run's 41 steps"),
        (
            lambda: WSD(warmup_steps=7, decay_steps=35).make(PEAK, 41),
            "optim.schedule.decay_steps: expected <= the 34 steps after warm-up, got 35",
        ),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_path(make, message):
    with pytest.raises(ValueError) as e:
        make()
    assert str(e.value).startswith(message)
