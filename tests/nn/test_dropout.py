from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.dropout import dropout, split_key

X = np.random.default_rng(0).normal(size=(101, 103)).astype(np.float32)


def test_without_a_key_or_a_rate_it_is_the_identity():
    assert dropout(X, 0.3, None) is X
    assert dropout(X, 0.0, jax.random.key(0)) is X


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_drops_at_the_rate_and_scales_the_rest(rate):
    y = np.asarray(dropout(X, rate, jax.random.key(0)))
    kept = y != 0
    sigma = (rate * (1 - rate) / X.size) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * sigma
    np.testing.assert_allclose(y[kept], X[kept] / (1 - rate), rtol=1e-6)
    # Every row and every column for itself, not one mask broadcast over an axis.
    assert np.unique(kept, axis=0).shape == np.unique(kept, axis=1).shape == kept.shape


def test_a_key_decides_and_dtype_stays():
    a, b, c = (dropout(jnp.asarray(X, jnp.bfloat16), 0.5, jax.random.key(seed)) for seed in (1, 1, 2))
    assert a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b)
    assert 0.4 < ((a == 0) != (c == 0)).mean() < 0.6


def test_split_key_gives_different_keys_or_none():
    assert split_key(None, 3) == (None, None, None)
    keys = split_key(jax.random.key(0), 3)
    assert len({tuple(np.asarray(jax.random.key_data(k))) for k in keys}) == 3
