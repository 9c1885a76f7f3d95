"""Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in place of the feed-forward layer."""

from __future__ import annotations

import dataclasses

from flax import nnx

from lm.errors import positive
from lm.models.mistral import Mistral
from lm.nn.activation import ACTIVATIONS
from lm.nn.moe import MoE
from lm.nn.param import normal
from lm.nn.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixtral(Mistral):
    """n_experts of width d_ff, of which a token goes through top_k, whose weights are made to sum to 1."""

    rope: Rope = Rope(theta=1_000_000.0)
    window: int | None = None
    n_experts: int = 8
    top_k: int = 2
    capacity_factor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "n_experts", "top_k")

    @property
    def is_routed(self) -> bool:
        return True

    @property
    def active_experts(self) -> float:
        return self.top_k / self.n_experts

    def feed_forward(self, rngs: nnx.Rngs) -> nnx.Module:
        return MoE(
            self.d_model,
            self.d_ff,
            self.n_experts,
            self.top_k,
            ACTIVATIONS[self.activation],
            rngs=rngs,
            init=normal(self.init_std),
            out_init=self.residual_init,
            capacity_factor=self.capacity_factor,
        )
