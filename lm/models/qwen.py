"""Qwen2 (Yang et al., 2024): LLaMA with biases on q, k and v. Qwen3 (Yang et al., 2025): with norms on q and k instead.

Qwen3Moe: experts in place of the feed-forward layer, but in the layers named as dense.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import nnx

from lm.errors import UserError, positive
from lm.models.base import check_pattern, windowed_layers
from lm.models.decoder import Decoder
from lm.models.llama import Llama
from lm.nn.activation import ACTIVATIONS
from lm.nn.attention import Attention
from lm.nn.block import Block, Layer
from lm.nn.moe import MoE
from lm.nn.norm import RMSNorm
from lm.nn.param import normal
from lm.nn.rope import Rope
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2(Llama):
    """LLaMA with biases. attention_bias: on q, k and v, never on the output. window, windowed: as GPT-2's."""

    rope: Rope = Rope(theta=1_000_000.0)
    norm_eps: float = 1e-6
    attention_bias: bool = True
    window: int | None = None
    windowed: tuple[bool, ...] = (True,)

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "window")
        check_pattern(self.windowed)

    @property
    def order(self) -> tuple[Layer, ...]:
        return windowed_layers(self.n_layers, self.window, self.windowed)

    def attention(self, rngs: nnx.Rngs, **more: Any) -> Attention:
        return super().attention(rngs, out_bias=False, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3(Llama):
    """q and k are normed head by head before they are rotated. window, windowed: as GPT-2's."""

    rope: Rope = Rope(theta=1_000_000.0)
    norm_eps: float = 1e-6
    window: int | None = None
    windowed: tuple[bool, ...] = (True,)

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "window")
        check_pattern(self.windowed)

    @property
    def order(self) -> tuple[Layer, ...]:
        return windowed_layers(self.n_layers, self.window, self.windowed)

    def attention(self, rngs: nnx.Rngs, **more: Any) -> Attention:
        norm = functools.partial(RMSNorm, self.kv_shape[1], rngs=rngs, eps=self.norm_eps)
        return super().attention(rngs, norms=(norm(), norm()), **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Moe(Qwen3):
    """n_experts of width expert_d_ff, of which a token goes through top_k; see `MoE` for `normalize` and
    `capacity_factor`. dense: the numbers of the layers that have a feed-forward layer of width d_ff instead."""

    n_experts: int = 128
    top_k: int = 8
    expert_d_ff: int = 768
    normalize: bool = True
    capacity_factor: float | None = None
    dense: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "n_experts", "top_k", "expert_d_ff")
        odd = [i for i in self.dense if not 0 <= i < self.n_layers]
        if odd or len(set(self.dense)) < len(self.dense):
            raise UserError(
                f"model.dense: expected each layer once, of 0 to {self.n_layers - 1}, got {self.dense}; layers count "
                "from 0"
            )
        if len(self.dense) == self.n_layers:
            raise UserError(f"model.dense: expected a layer with experts, got all {self.n_layers} dense; take Qwen3")

    @property
    def order(self) -> tuple[Layer, ...]:
        out, seen = [], [0, 0]
        for i, layer in enumerate(super().order):
            block = int(i in self.dense)
            out.append(dataclasses.replace(layer, block=block, index=seen[block]))  # each block counts its own
            seen[block] += 1
        return tuple(out)

    @property
    def is_routed(self) -> bool:
        return True

    @property
    def active_experts(self) -> float:
        return self.top_k / self.n_experts

    def feed_forward(self, rngs: nnx.Rngs) -> nnx.Module:
        return MoE(
            self.d_model,
            self.expert_d_ff,
            self.n_experts,
            self.top_k,
            ACTIVATIONS[self.activation],
            rngs=rngs,
            init=normal(self.init_std),
            out_init=self.residual_init,
            normalize=self.normalize,
            capacity_factor=self.capacity_factor,
        )

    def dense_block(self, rngs: nnx.Rngs) -> Block:
        norm = functools.partial(self.norm, self.d_model, rngs)
        # `super()`: that of Llama, without experts.
        return Block(norm(), self.attention(rngs), norm(), super().feed_forward(rngs), dropout=self.dropout)

    def build(self, rngs: nnx.Rngs, **parts: Any) -> Decoder:
        if self.dense:
            stack = Stack(self.order, self.compute)
            parts["dense_layers"] = stack.init(self.dense_block, rngs, block=1)
        return super().build(rngs, **parts)
