"""The product of activations with a weight, in one place: a product in low precision is one more entry of `DOTS`.

What is no weight (attention's scores, the dispatch of tokens to experts) is not here, and neither is a router: it
decides by small differences.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class Dot(Protocol):
    """(einsum spec, activations, weight already in their dtype, dtype of the result or None) -> the product."""

    def __call__(
        self, spec: str, x: jax.Array, w: jax.Array, *, preferred_element_type: DTypeLike | None
    ) -> jax.Array: ...


def default(spec: str, x: jax.Array, w: jax.Array, *, preferred_element_type: DTypeLike | None) -> jax.Array:
    """The product in the dtype of the activations."""
    return jnp.einsum(spec, x, w, preferred_element_type=preferred_element_type)


DOTS: dict[str, Dot] = {"default": default}


def dot(
    spec: str,
    x: jax.Array,
    w: nnx.Param,
    kind: str = "default",
    *,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """The einsum of activations `x` with the weight `w`, cast to their dtype; `kind` is one of `DOTS`."""
    return DOTS[kind](spec, x, w[...].astype(x.dtype), preferred_element_type=preferred_element_type)
