"""How near two results must be, per dtype of the compute: an error relative to the largest entry of each array."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

TOLERANCE = {
    "float32": 1e-5,  # some 80 units in the last place: sums of a few hundred terms in another order
    "bfloat16": 5e-2,  # 13 units in the last place: two layers of rounding after every operation
}
# An array below this counts as zero: gradients that cancel exactly, as that of a bias on the keys, leave noise.
FLOOR = 0.1


def assert_close(actual: Any, expected: Any, dtype: str = "float32") -> None:
    """Trees of one structure whose arrays agree: |a - e| <= TOLERANCE[dtype] max(max |e|, FLOOR)."""
    expected_leaves, treedef = jax.tree_util.tree_flatten_with_path(expected)
    assert jax.tree.structure(actual) == treedef
    for (path, e), a in zip(expected_leaves, jax.tree.leaves(actual)):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        atol = TOLERANCE[dtype] * max(np.abs(e).max(initial=0.0), FLOOR)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_equal(actual: Any, expected: Any) -> None:
    """Trees of one structure whose arrays agree in every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
