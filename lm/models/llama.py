"""LLaMA (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Mistral, Qwen, Gemma and the mixture-of-experts decoders exchange one part or another of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from flax import nnx

from lm.errors import UserError, positive
from lm.models.base import Model
from lm.models.decoder import Decoder, task_head
from lm.nn.activation import ACTIVATIONS, ActivationName
from lm.nn.attention import Attention, Heads, Inits, Scores
from lm.nn.block import Block
from lm.nn.embed import Embed
from lm.nn.mlp import GatedMLP
from lm.nn.norm import RMSNorm
from lm.nn.param import Init, normal
from lm.nn.rope import Rope
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama(Model):
    """`n_kv_heads` None: as many as heads. `head_dim` None: d_model / n_heads. `tied`: no head of its own."""

    d_ff: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope: Rope = Rope()
    activation: ActivationName = "silu"
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_ff", "n_kv_heads", "head_dim")
        if self.n_heads % self.kv_shape[0]:
            raise UserError(f"model.n_kv_heads: {self.n_kv_heads} does not divide model.n_heads {self.n_heads}")
        if self.kv_shape[1] % 2:
            raise UserError(f"model.head_dim: rotary positions need an even number, got {self.kv_shape[1]}")

    @property
    def kv_shape(self) -> tuple[int, int]:
        return self.n_kv_heads or self.n_heads, self.head_dim or self.d_model // self.n_heads

    # --- the parts that other families exchange -----------------------------------------------------------------------

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return (self.rope,)

    @property
    def embed_scale(self) -> float:
        return 1.0

    @property
    def logits_softcap(self) -> float | None:
        return None

    @property
    def scores(self) -> Scores:
        return Scores(dropout=self.weights_dropout)

    def norm(self, d: int, rngs: nnx.Rngs) -> RMSNorm:
        return RMSNorm(d, rngs=rngs, eps=self.norm_eps)

    def attention(self, rngs: nnx.Rngs, **more: Any) -> Attention:
        n_kv_heads, head_dim = self.kv_shape
        return Attention(
            self.d_model,
            Heads(self.n_heads, head_dim, n_kv_heads),
            rngs=rngs,
            inits=Inits(normal(self.init_std), self.residual_init),
            bias=self.attention_bias,
            scores=self.scores,
            **more,
        )

    def feed_forward(self, rngs: nnx.Rngs) -> nnx.Module:
        return GatedMLP(
            self.d_model,
            self.d_ff,
            ACTIVATIONS[self.activation],
            rngs=rngs,
            init=normal(self.init_std),
            out_init=self.residual_init,
            bias=self.mlp_bias,
        )

    def block(self, rngs: nnx.Rngs) -> Block:
        norm = functools.partial(self.norm, self.d_model, rngs)
        return Block(norm(), self.attention(rngs), norm(), self.feed_forward(rngs), dropout=self.dropout)

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def residual_init(self) -> Init:
        return normal(self.init_std / math.sqrt(2 * self.n_layers))  # as GPT-2: two parts a layer add to the residual

    def build(self, rngs: nnx.Rngs, **parts: Any) -> Decoder:
        init = normal(self.init_std)
        stack = Stack(self.order, self.compute)
        return Decoder(
            Embed(self.vocab_size, self.d_model, rngs=rngs, init=init, scale=self.embed_scale, pad_id=self.pad_id),
            stack,
            stack.init(self.block, rngs),
            task_head(self, self.d_model, tied=self.tied, rngs=rngs, init=init, softcap=self.logits_softcap),
            head_dim=self.kv_shape[1],
            norm=self.norm(self.d_model, rngs),
            ropes=self.ropes,
            dropout=self.dropout,
            **parts,
        )
