"""LLaMA (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from lm.errors import UserError
from lm.models.base import Model
from lm.models.decoder import Decoder
from lm.nn.attention import Attention
from lm.nn.block import Block
from lm.nn.embed import Embed, Head
from lm.nn.mlp import GatedMLP
from lm.nn.norm import RMSNorm
from lm.nn.param import normal
from lm.nn.position import rotation
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama(Model):
    """`n_kv_heads` None: as many as heads. `head_dim` None: d_model / n_heads. `tied`: no head of its own."""

    d_ff: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("d_ff", "n_kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name}: expected a positive number, got {value}")
        if self.n_heads % self.kv_shape[0]:
            raise UserError(f"model.n_kv_heads: {self.n_kv_heads} does not divide model.n_heads {self.n_heads}")
        if self.kv_shape[1] % 2:
            raise UserError(f"model.head_dim: rotary positions need an even number, got {self.kv_shape[1]}")

    @property
    def kv_shape(self) -> tuple[int, int]:
        return self.n_kv_heads or self.n_heads, self.head_dim or self.d_model // self.n_heads

    def build(self, rngs: nnx.Rngs) -> Decoder:
        init = normal(self.init_std)
        residual_init = normal(self.init_std / (2 * self.n_layers) ** 0.5)
        n_kv_heads, head_dim = self.kv_shape

        def block(rngs: nnx.Rngs) -> Block:
            norm = functools.partial(RMSNorm, self.d_model, rngs=rngs, eps=self.norm_eps)
            attn = Attention(
                self.d_model,
                self.n_heads,
                head_dim,
                rngs=rngs,
                init=init,
                out_init=residual_init,
                n_kv_heads=n_kv_heads,
                dropout=self.dropout,
                block=self.attention_block,
            )
            mlp = GatedMLP(self.d_model, self.d_ff, jax.nn.silu, rngs=rngs, init=init, out_init=residual_init)
            return Block(norm(), attn, norm(), mlp, dropout=self.dropout)

        stack = Stack(self.n_layers, self.scan, self.remat)
        return Decoder(
            Embed(self.vocab_size, self.d_model, rngs=rngs, init=init),
            stack,
            stack.init(block, rngs),
            RMSNorm(self.d_model, rngs=rngs, eps=self.norm_eps),
            rotation=functools.partial(rotation, head_dim=head_dim, theta=self.rope_theta),
            head=None if self.tied else Head(self.vocab_size, self.d_model, rngs=rngs, init=init),
            dropout=self.dropout,
        )
