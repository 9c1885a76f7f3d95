"""Gemma (Gemma Team, 2024), Gemma 2 (2024) and the text side of Gemma 3 (2025).

All are LLaMA with an embedding multiplied by sqrt(d_model), norms that hold the distance of their scale from 1, and a
gated gelu.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from flax import nnx

from lm.errors import UserError, positive
from lm.models.base import check_pattern, windowed_layers
from lm.models.llama import Llama
from lm.nn.activation import ActivationName
from lm.nn.attention import Attention, Scores
from lm.nn.block import Block, Layer
from lm.nn.norm import RMSNorm
from lm.nn.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma(Llama):
    """The first version. The head is the embedding, without its factor."""

    activation: ActivationName = "gelu_tanh"
    norm_eps: float = 1e-6
    tied: bool = True

    @property
    def embed_scale(self) -> float:
        return math.sqrt(self.d_model)

    def norm(self, d: int, rngs: nnx.Rngs) -> RMSNorm:
        return RMSNorm(d, rngs=rngs, eps=self.norm_eps, centered=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2(Gemma):
    """Norms before and after each part, caps on scores and logits, a window in every other layer.

    query_pre_attn_scalar: scores are scaled by its ^-1/2 (d_model / n_heads in the 27B model, head_dim in the others).
    attention_softcap, logits_softcap: c tanh(x / c), None for no cap. window, windowed: as GPT-2's.
    """

    query_pre_attn_scalar: float = 256.0
    attention_softcap: float | None = 50.0
    logits_softcap: float | None = 30.0
    window: int | None = 4096
    windowed: tuple[bool, ...] = (True, False)

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "window")
        check_pattern(self.windowed)
        for name in ("query_pre_attn_scalar", "attention_softcap", "logits_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"model.{name}: expected a number over 0, got {value}")

    @property
    def order(self) -> tuple[Layer, ...]:
        return windowed_layers(self.n_layers, self.window, self.windowed)

    @property
    def scores(self) -> Scores:
        scale = self.query_pre_attn_scalar**-0.5
        return Scores(scale=scale, softcap=self.attention_softcap, dropout=self.weights_dropout)

    def block(self, rngs: nnx.Rngs) -> Block:
        norm = functools.partial(self.norm, self.d_model, rngs)
        return Block(
            norm(),
            self.attention(rngs),
            norm(),
            self.feed_forward(rngs),
            post_norm1=norm(),
            post_norm2=norm(),
            dropout=self.dropout,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3(Gemma2):
    """Norms on q and k instead of the cap on scores; five layers with a window to one without, and a rotation for each
    of the two kinds: `rope` where all keys are seen, `local_rope` where a window is."""

    rope: Rope = Rope(theta=1_000_000.0)
    local_rope: Rope = Rope()
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    window: int | None = 1024
    windowed: tuple[bool, ...] = (True, True, True, True, True, False)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return self.rope, self.local_rope

    @property
    def order(self) -> tuple[Layer, ...]:
        windowed = self.windowed
        return tuple(
            dataclasses.replace(layer, rotation=int(windowed[i % len(windowed)]))  # 1 is `local_rope`
            for i, layer in enumerate(super().order)
        )

    def attention(self, rngs: nnx.Rngs, **more: Any) -> Attention:
        norm = functools.partial(self.norm, self.kv_shape[1], rngs)
        return super().attention(rngs, norms=(norm(), norm()), **more)
