"""The activations of published models, by the names that configs use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]
ActivationName = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"]

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # x Phi(x) (Hendrycks and Gimpel, 2016)
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # the same paper's approximation, in GPT-2, T5 1.1, Gemma
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
