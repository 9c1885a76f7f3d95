"""Where a token stands: tables, sinusoids or biases by distance, and rotations of q and k.

Nothing here grows with the longest sequence but `LearnedPositions`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.nn.embed import look_up
from lm.nn.param import Init, param


class LearnedPositions(nnx.Module):
    """positions [B,S] -> [B,S,D], added to the embedding (GPT-2).

    Position p reads row p + `offset`: BART, OPT and RoBERTa keep their first two rows for padding. pad_row: a row that
    learns nothing from being looked up (RoBERTa).
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init: Init,
        offset: int = 0,
        pad_row: int | None = None,
    ):
        self.offset, self.pad_row = offset, pad_row
        self.table = param(rngs, (max_len + offset, d_model), ("position", "embed"), init, decay=False)

    def __call__(self, positions: jax.Array, dtype: DTypeLike) -> jax.Array:
        rows = positions + self.offset
        x = look_up(self.table[...].astype(dtype), rows)
        return x if self.pad_row is None else jnp.where((rows == self.pad_row)[..., None], jax.lax.stop_gradient(x), x)


def sinusoids(positions: jax.Array, d_model: int) -> jax.Array:
    """positions [B,S] -> [B,S,D] in float32: sines in the first half, cosines in the second (Marian).

    The frequencies are those of Vaswani et al. (2017), 10000^(-2i/D), which alternates the two. An odd D has one more
    sine.
    """
    angles = positions[..., None].astype(jnp.float32) * _frequencies(10_000.0, d_model).astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles[..., : d_model // 2])], axis=-1)


class Sinusoids(nnx.Module):
    """`sinusoids` in the place of a `LearnedPositions`: nothing to learn, no longest sequence."""

    def __init__(self, d_model: int):
        self.d_model = d_model

    def __call__(self, positions: jax.Array, dtype: DTypeLike) -> jax.Array:
        return sinusoids(positions, self.d_model).astype(dtype)


class RelativeBias(nnx.Module):
    """A score per head and distance, added to the logits of attention (Raffel et al., 2020, T5).

    Half of the buckets hold one distance each, the rest grow in logarithmic steps up to `max_distance`, and the last
    holds all beyond. `bidirectional` gives half of the buckets to keys behind the query; else those all count as
    distance 0. A stack of layers shares one.
    """

    def __init__(
        self, n_heads: int, n_buckets: int, max_distance: int, bidirectional: bool, *, rngs: nnx.Rngs, init: Init
    ):
        least = 4 if bidirectional else 2
        if n_buckets < least:
            raise UserError(f"model.relative_buckets: expected at least {least}, got {n_buckets}; raise it")
        one_side = n_buckets // 2 if bidirectional else n_buckets
        if max_distance <= one_side // 2:
            raise UserError(
                f"model.relative_max_distance: expected more than the {one_side // 2} distances that have a bucket of "
                f"their own, got {max_distance}; raise it or lower model.relative_buckets"
            )
        self.one_side, self.max_distance, self.bidirectional = one_side, max_distance, bidirectional
        self.table = param(rngs, (n_buckets, n_heads), ("position", "heads"), init, decay=False)

    def __call__(self, q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
        """q_index [S], kv_index [T], places in the row -> float32 [1,H,S,T]."""
        bias = self.table[...].astype(jnp.float32)[self.buckets(kv_index[None, :] - q_index[:, None])]
        return jnp.transpose(bias, (2, 0, 1))[None]

    def buckets(self, relative: jax.Array) -> jax.Array:
        """relative = key's place - query's place, any shape -> the bucket, int32."""
        distance = jnp.abs(relative) if self.bidirectional else jnp.maximum(-relative, 0)
        bucket = jnp.asarray(_distance_buckets(self.one_side, self.max_distance))[
            jnp.minimum(distance, self.max_distance)
        ]
        return bucket + jnp.where(relative > 0, self.one_side, 0) if self.bidirectional else bucket


def _distance_buckets(n_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0..max_distance, int32; in float32, which decides at the edge of a bucket."""
    exact = n_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio.astype(np.float64)).astype(np.float32)
    steps = steps / np.float32(math.log(max_distance / exact)) * np.float32(n_buckets - exact)
    far = np.minimum(exact + steps.astype(np.int32), n_buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


# --- rotary -----------------------------------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """sin, cos [B,S,R/2] in float32 for the first R lanes of a head, computed once and shared by all layers."""

    sin: jax.Array
    cos: jax.Array


def rotate(x: jax.Array, r: Rotation) -> jax.Array:
    """x [B,S,H,K]: its first R lanes rotated in the half-split layout (lane i with lane i + R/2), in float32."""
    half = r.sin.shape[-1]
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
        return _frequencies(theta, dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling(Scaling):
    """NTK-aware: theta grows with the length once that is over `max_positions`, the length of the first training.

    The length is the largest position of the batch + 1, so a batch of short rows is not scaled.
    """

    factor: float
    max_positions: int

    def frequencies(self, theta: float, dim: int, positions: jax.Array) -> jax.Array:
        if dim < 4:
            raise UserError(f"model.rope: dynamic scaling needs at least 4 rotated lanes, got {dim}; raise fraction")
        length = jnp.maximum(jnp.max(positions) + 1, self.max_positions).astype(jnp.float32)
        growth = self.factor * (length / self.max_positions) - (self.factor - 1)
        exponents = (-np.arange(0, dim, 2) / (dim - 2)).astype(np.float32)
        return growth**exponents * _frequencies(theta, dim).astype(np.float32)


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
        fast = _frequencies(theta, dim)
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
        log = 0.1 * math.log(max(self.factor, 1.0))
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
        width = high - low or 0.001
        fast = _frequencies(theta, dim)
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
        dim = int(head_dim * self.fraction)
        if dim < 2 or dim % 2:
            raise UserError(
                f"model.rope: expected an even number of rotated lanes, got int({head_dim} * {self.fraction}) = {dim}; "
                f"set another model.head_dim or model.rope.fraction"
            )
        return dim

    def __call__(self, positions: jax.Array, head_dim: int) -> Rotation:
        """positions [B,S] -> sin, cos [B,S,R/2] in float32."""
        dim, scaling = self.dim(head_dim), self.scaling
        frequencies = scaling.frequencies(self.theta, dim, positions) if scaling else _frequencies(self.theta, dim)
        angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
        factor = scaling.attention if scaling else 1.0
        return Rotation(jnp.sin(angles) * factor, jnp.cos(angles) * factor)


def _frequencies(theta: float, dim: int) -> np.ndarray:
    """theta^(-2i/dim) on the host: a float32 power on an accelerator is off by several units in the last place."""
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _blend(slow: np.ndarray, fast: np.ndarray, share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 0, 1)
    return slow * (1 - share) + fast * share
