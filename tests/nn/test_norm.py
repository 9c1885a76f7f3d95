from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.nn.norm import LayerNorm, RMSNorm
from tests.models import reference
from tests.tolerances import assert_close

D, EPS = 23, 0.03
rng = np.random.default_rng(0)
# An offset beside the spread, and a row so small that eps decides.
X = np.concatenate([rng.normal(size=(5, D)) * 3 + 2, rng.normal(size=(1, D)) * 1e-3]).astype(np.float32)
SCALE, BIAS = (rng.normal(size=D).astype(np.float32) for _ in range(2))


def make(kind):
    norm = kind(D, rngs=nnx.Rngs(0), eps=EPS)
    norm.scale[...] = jnp.asarray(SCALE)
    if kind is LayerNorm:
        norm.bias[...] = jnp.asarray(BIAS)
    return norm


def expected(kind, x):
    x = np.asarray(x, np.float64)
    if kind is LayerNorm:
        return reference.layer_norm(x, SCALE, BIAS, EPS)
    return reference.rms_norm(x, SCALE, EPS)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_agrees_with_numpy(kind):
    assert_close(make(kind)(X), expected(kind, X))


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_bfloat16_is_rounded_only_at_the_end(kind):
    x = jnp.asarray(X + 40.0, jnp.bfloat16)  # a mean of squares kept in bfloat16 would be far off
    y = make(kind)(x)
    assert y.dtype == jnp.bfloat16
    e = expected(kind, x)
    np.testing.assert_allclose(np.asarray(y, np.float64), e, rtol=2.0**-8, atol=1e-5)


def test_starts_as_the_plain_norm():
    x = np.asarray(X, np.float64)
    assert_close(RMSNorm(D, rngs=nnx.Rngs(0), eps=EPS)(X), reference.rms_norm(x, 1.0, EPS))
    assert_close(LayerNorm(D, rngs=nnx.Rngs(0), eps=EPS)(X), reference.layer_norm(x, 1.0, 0.0, EPS))
