"""Where a token stands: tables, sinusoids or biases by distance. Rotations of q and k are `lm.nn.rope`.

Nothing here grows with the longest sequence but `LearnedPositions`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.nn.embed import look_up
from lm.nn.param import Init, param
from lm.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling, lane_frequencies

__all__ = [  # of `rope` what recipes name
    "DynamicScaling",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "RelativeBias",
    "Rope",
    "Sinusoids",
    "YarnScaling",
    "sinusoids",
]


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
        self.table = param(rngs, (max_len + offset, d_model), ("position", "embed"), init, decay=False, used="lookup")

    def __call__(self, positions: jax.Array, dtype: DTypeLike) -> jax.Array:
        rows = positions + self.offset
        x = look_up(self.table[...].astype(dtype), rows)
        return x if self.pad_row is None else jnp.where((rows == self.pad_row)[..., None], jax.lax.stop_gradient(x), x)


def sinusoids(positions: jax.Array, d_model: int) -> jax.Array:
    """positions [B,S] -> [B,S,D] in float32: sines in the first half, cosines in the second (Marian).

    The frequencies are those of Vaswani et al. (2017), 10000^(-2i/D), which alternates the two. An odd D has one more
    sine.
    """
    angles = positions[..., None].astype(jnp.float32) * lane_frequencies(10_000.0, d_model).astype(np.float32)
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
        least = 4 if bidirectional else 2  # a side needs a bucket for the distance 0 and one for the rest
        if n_buckets < least:
            raise UserError(f"model.relative_buckets: expected at least {least}, got {n_buckets}; raise it")
        one_side = n_buckets // 2 if bidirectional else n_buckets
        if max_distance <= one_side // 2:
            raise UserError(
                f"model.relative_max_distance: expected more than the {one_side // 2} distances that have a bucket of "
                f"their own, got {max_distance}; raise it or lower model.relative_buckets"
            )
        self.one_side, self.max_distance, self.bidirectional = one_side, max_distance, bidirectional
        # Sharded as the heads of the scores it is added to.
        self.table = param(rngs, (n_buckets, n_heads), ("position", "heads"), init, decay=False, used="lookup")

    def __call__(self, q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
        """q_index [S], kv_index [T], places in the row -> float32 [1,H,S,T]."""
        # The scores it is added to are float32.
        bias = self.table[...].astype(jnp.float32)[self.buckets(kv_index[None, :] - q_index[:, None])]
        return jnp.transpose(bias, (2, 0, 1))[None]

    def buckets(self, relative: jax.Array) -> jax.Array:
        """relative = key's place - query's place, any shape -> the bucket, int32."""
        distance = jnp.abs(relative) if self.bidirectional else jnp.maximum(-relative, 0)
        bucket = jnp.asarray(_distance_buckets(self.one_side, self.max_distance))[
            jnp.minimum(distance, self.max_distance)  # all beyond share the last bucket
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
