"""Learning-rate schedules: a linear warm-up times a decay, functions of the step alone.

Conventions, for every class here. `step` counts updates already made, so the first update sees 0 and the last sees
`total_steps - 1`. Warm-up is `min(1, (step + 1) / warmup_steps)`: never zero, and the `warmup_steps`-th update is the
first at the peak. Decay starts there and would reach its end at `step == total_steps`, one past the last update, so
that no update is spent at a rate of zero; later steps keep the final rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError


def expect(ok: bool, field: str, expected: str, got: object) -> None:
    """Raises unless `ok`; `field` is the path below `optim`."""
    if not ok:
        raise UserError(f"optim.{field}: expected {expected}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then what the subclass says: the fraction of the peak at a float32 `step`, 1 up to `warmup_steps`."""

    warmup_steps: int = 0

    def __post_init__(self):
        expect(self.warmup_steps >= 0, "schedule.warmup_steps", ">= 0", self.warmup_steps)

    def make(self, peak_lr: float, total_steps: int) -> optax.Schedule:
        """step (integer array or int) -> learning rate (float32 scalar); traceable. Raises if the run is too short."""
        if self.warmup_steps > total_steps:
            raise UserError(
                f"optim.schedule.warmup_steps: expected <= the run's {total_steps} steps, got {self.warmup_steps}; "
                "shorten the warm-up or train longer"
            )
        self._check(total_steps)

        def lr(step: jax.typing.ArrayLike) -> jax.Array:
            step = jnp.asarray(step, jnp.float32)  # exact below 2^24 steps
            warmup = jnp.minimum(1.0, (step + 1) / max(self.warmup_steps, 1))
            return peak_lr * warmup * self._decay(step, total_steps)

        return lr

    def _check(self, total_steps: int) -> None:
        """Hook for a subclass whose fields can disagree with the length of the run."""

    def _decay(self, step: jax.Array, total_steps: int) -> jax.Array:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """f = 1."""

    def _decay(self, step, total_steps):
        return jnp.ones_like(step)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """f = final + (1 - final) (1 + cos(pi t)) / 2, t from 0 to 1 after warm-up (Loshchilov & Hutter, 2017, eq. 5).

    `final_fraction` 0.1 is the usual choice for language models (Hoffmann et al., 2022, appendix B).
    """

    final_fraction: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _check_fraction(self.final_fraction)

    def _decay(self, step, total_steps):
        t = _progress(step, self.warmup_steps, total_steps)
        return _blend(self.final_fraction, (1 + jnp.cos(math.pi * t)) / 2)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """f = final + (1 - final) (1 - t), t from 0 to 1 after warm-up; to zero as in BERT (Devlin et al., 2019, A.2)."""

    final_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _check_fraction(self.final_fraction)

    def _decay(self, step, total_steps):
        return _blend(self.final_fraction, 1 - _progress(step, self.warmup_steps, total_steps))


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """f = sqrt(k) / sqrt(max(step, k)), with k = `timescale`, or `warmup_steps` if that is None.

    T5's 1 / sqrt(max(step, 10^4)) has no ramp (Raffel et al., 2020, section 3.1.2): `InverseSqrt(timescale=10_000)` and
    a peak of 0.01. The Transformer's has one (Vaswani et al., 2017, section 5.3): `InverseSqrt(warmup_steps=4000)`.
    """

    timescale: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.timescale is None:
            expect(self.warmup_steps > 0, "schedule.timescale", "> 0 where warmup_steps is 0", None)
        else:
            expect(self.timescale > 0, "schedule.timescale", "> 0", self.timescale)
            expect(self.timescale >= self.warmup_steps, "schedule.timescale", ">= warmup_steps", self.timescale)

    def _decay(self, step, total_steps):
        k = self.timescale or self.warmup_steps
        return jnp.sqrt(k / jnp.maximum(step, k))


@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    """f = 1, then over the last `decay_steps` final + (1 - final) c(t), t from 0 to 1 (Hu et al., 2024, section 4).

    c(t) is 1 - t or 1 - sqrt(t), the better of the two in Hägele et al., 2024 (section 3). Runs that differ only in
    `total_steps` share their stable part, so one can be continued as another.
    """

    decay_steps: int
    final_fraction: float = 0.0
    cooldown: Literal["linear", "1-sqrt"] = "1-sqrt"

    def __post_init__(self):
        super().__post_init__()
        _check_fraction(self.final_fraction)
        expect(self.decay_steps > 0, "schedule.decay_steps", "> 0", self.decay_steps)
        expect(self.cooldown in ("linear", "1-sqrt"), "schedule.cooldown", "'linear' or '1-sqrt'", self.cooldown)

    def _check(self, total_steps):
        room = total_steps - self.warmup_steps
        if self.decay_steps > room:
            raise UserError(
                f"optim.schedule.decay_steps: expected <= the {room} steps after warm-up, got {self.decay_steps}; "
                "shorten the decay or train longer"
            )

    def _decay(self, step, total_steps):
        t = _progress(step, total_steps - self.decay_steps, total_steps)
        return _blend(self.final_fraction, 1 - (t if self.cooldown == "linear" else jnp.sqrt(t)))


def _progress(step: jax.Array, start: int, end: int) -> jax.Array:
    """Rises from 0 at `start` to 1 at `end`; flat outside."""
    return jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)  # a run may be warm-up alone


def _blend(final: float, shape: jax.Array) -> jax.Array:
    return final + (1 - final) * shape


def _check_fraction(value: float) -> None:
    expect(0 <= value <= 1, "schedule.final_fraction", "0 to 1", value)
