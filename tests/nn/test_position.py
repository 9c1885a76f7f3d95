from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm.nn.param import normal
from lm.nn.position import LearnedPositions, rotate, rotation
from tests.models import reference
from tests.tolerances import assert_close

B, S, H, K, THETA = 2, 7, 3, 10, 100.0
X = np.random.default_rng(0).normal(size=(B, S, H, K)).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2], [5, 11, 3, 0, 40, 2, 1]])

rope = jax.jit(lambda x, positions: rotate(x, rotation(positions, K, THETA)))


def test_rotation_agrees_with_complex_numbers():
    assert_close(rope(X, POSITIONS), reference.rope(X.astype(np.float64), POSITIONS, THETA))


def test_rotation_keeps_norms_and_position_zero():
    assert_close(np.linalg.norm(rope(X, POSITIONS), axis=-1), np.linalg.norm(X, axis=-1))
    np.testing.assert_array_equal(rope(X, np.zeros_like(POSITIONS)), X)


def test_a_score_depends_only_on_the_distance():
    q, k = X, X[::-1]
    at, to = POSITIONS, POSITIONS[::-1] + 4
    scores = [(rope(q, at + shift) * rope(k, to + shift)).sum(-1) for shift in (0, 1, 97)]
    assert_close(scores[1], scores[0])
    assert_close(scores[2], scores[0])
    assert np.abs((rope(q, at + 1) * rope(k, to)).sum(-1) - scores[0]).max() > 0.1


def test_bfloat16_is_rotated_in_float32():
    x, far = jnp.asarray(X, jnp.bfloat16), POSITIONS + 3001  # in bfloat16 the position alone would be off by some 5
    y = rope(x, far)
    assert y.dtype == jnp.bfloat16
    e = reference.rope(np.asarray(x, np.float64), far, THETA)
    np.testing.assert_allclose(np.asarray(y, np.float64), e, rtol=2.0**-8, atol=2e-3)


def test_learned_positions_are_rows_of_the_table():
    positions = LearnedPositions(43, 5, rngs=nnx.Rngs(0), init=normal(1.0))
    y = positions(POSITIONS, jnp.float32)
    np.testing.assert_array_equal(y, np.asarray(positions.table[...])[POSITIONS])
