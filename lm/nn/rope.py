"""Rotary positions: rotations of q and k, computed once and shared by all layers."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError


class Rotation(NamedTuple):
    """sin, cos [B,S,R/2] in float32 for the first R lanes of a head, computed once and shared by all layers."""

    sin: jax.Array
    cos: jax.Array


def rotate(x: jax.Array, r: Rotation) -> jax.Array:
    """x [B,S,H,K]: its first R lanes rotated in the half-split layout (lane i with lane i + R/2), in float32."""
    half = r.sin.shape[-1]
    # Halves, as in Hugging Face's files; Meta's own rotate neighbouring lanes.
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    sin, cos = r.sin[:, :, None], r.cos[:, :, None]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """How the frequencies of `Rope` change for rows longer than those a model was first trained on."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None and not isinstance(value, bool) and not value > 0:
                raise UserError(f"model.rope.scaling.{f.name}: expected a positive number, got {value}")

    @property
    def attention(self) -> float:
        """What sin and cos are multiplied with, which scales the logits of attention by its square."""
        return 1.0

    def frequencies(self, theta: float, dim: int, positions: jax.Array) -> np.ndarray | jax.Array:
        """[R/2] radians per position, for R = `dim` lanes and the `positions` [B,S] at hand."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """Positions divided by `factor` (Chen et al., 2023)."""

    factor: float

    def frequencies(self, theta: float, dim: int, positions: jax.Array) -> np.ndarray:
        return lane_frequencies(theta, dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling(Scaling):
    """NTK-aware: theta grows with the length once that is over `max_positions`, the length of the first training.

    The length is the largest position of the batch + 1, so a batch of short rows is not scaled.
    """

    factor: float
    max_positions: int

    def frequencies(self, theta: float, dim: int, positions: jax.Array) -> jax.Array:
        if dim < 4:  # dim - 2 is divided by below
            raise UserError(f"model.rope: dynamic scaling needs at least 4 rotated lanes, got {dim}; raise fraction")
        length = jnp.maximum(jnp.max(positions) + 1, self.max_positions).astype(jnp.float32)
        growth = self.factor * (length / self.max_positions) - (self.factor - 1)
        # (theta growth^(dim / (dim - 2)))^(-2i / dim), with the growth, which is traced, as a factor of its own.
        exponents = (-np.arange(0, dim, 2) / (dim - 2)).astype(np.float32)
        return growth**exponents * lane_frequencies(theta, dim).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Scaling):
    """Lanes that turn less than `low_freq_factor` times in the first training's length are slowed by `factor`, those
    above `high_freq_factor` are left, and those between are interpolated (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"model.rope.scaling.high_freq_factor: expected more than low_freq_factor {self.low_freq_factor}, "
                f"got {self.high_freq_factor}; swap them"
            )

    def frequencies(self, theta: float, dim: int, positions: jax.Array) -> np.ndarray:
        fast = lane_frequencies(theta, dim)
        turns = self.original_max_positions * fast / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(fast / self.factor, fast, smooth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al., 2023): between `beta_slow` and `beta_fast` turns in the first training's length, a ramp over
    the lanes from slowed by `factor` to left alone, and sharper attention.

    `attention_factor` None: 0.1 ln(factor) + 1, or where both are given the quotient of that with `mscale` and
    `mscale_all_dim` before the logarithm (DeepSeek-V2). `truncate`: the ramp starts and ends at whole lanes.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            raise UserError(
                f"model.rope.scaling.beta_fast: expected at least beta_slow {self.beta_slow}, got {self.beta_fast}; "
                f"swap them"
            )

    @property
    def attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(max(self.factor, 1.0))  # a factor below 1 does not soften attention
        if self.mscale is not None and self.mscale_all_dim is not None:
            return (log * self.mscale + 1) / (log * self.mscale_all_dim + 1)
        return log + 1

    def frequencies(self, theta: float, dim: int, positions: jax.Array) -> np.ndarray:
        def lane(turns: float) -> float:
            return dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = lane(self.beta_fast), lane(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001  # as in the authors' code: both ends may be one lane
        fast = lane_frequencies(theta, dim)
        return _blend(fast / self.factor, fast, 1 - (np.arange(dim // 2) - low) / width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al., 2021): lane i turns by position * theta^(-2i/R).

    `fraction` of a head's lanes are rotated, the first R = int(head_dim * fraction) of them (GPT-NeoX).
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    def __post_init__(self):
        if not self.theta > 1:
            raise UserError(f"model.rope.theta: expected a number over 1, got {self.theta}; the usual one is 10000")
        if not 0 < self.fraction <= 1:
            raise UserError(f"model.rope.fraction: expected a part of the head in (0, 1], got {self.fraction}")

    def dim(self, head_dim: int) -> int:
        """R, how many lanes of a head are rotated."""
        dim = int(head_dim * self.fraction)  # truncated, as in transformers
        if dim < 2 or dim % 2:
            raise UserError(
                f"model.rope: expected an even number of rotated lanes, got int({head_dim} * {self.fraction}) = {dim}; "
                f"set another model.head_dim or model.rope.fraction"
            )
        return dim

    def __call__(self, positions: jax.Array, head_dim: int) -> Rotation:
        """positions [B,S] -> sin, cos [B,S,R/2] in float32."""
        dim, scaling = self.dim(head_dim), self.scaling
        frequencies = scaling.frequencies(self.theta, dim, positions) if scaling else lane_frequencies(self.theta, dim)
        # Float32 in any precision of the compute: bfloat16 cannot tell position 257 from 256.
        angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
        factor = scaling.attention if scaling else 1.0
        return Rotation(jnp.sin(angles) * factor, jnp.cos(angles) * factor)


def lane_frequencies(theta: float, dim: int) -> np.ndarray:
    """theta^(-2i/dim) on the host: a float32 power on an accelerator is off by several units in the last place."""
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _blend(slow: np.ndarray, fast: np.ndarray, share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 0, 1)
    return slow * (1 - share) + fast * share
