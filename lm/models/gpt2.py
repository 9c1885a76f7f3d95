"""GPT-2 (Radford et al., 2019): LayerNorm before each part, learned positions, gelu, biases, tied head."""

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
from lm.nn.embed import Embed
from lm.nn.mlp import MLP
from lm.nn.norm import LayerNorm
from lm.nn.param import normal
from lm.nn.position import LearnedPositions
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2(Model):
    """The 124M model of the paper by default."""

    vocab_size: int = 50257
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    max_positions: int = 1024
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if self.max_positions < 1:
            raise UserError(f"model.max_positions: expected a positive number, got {self.max_positions}")

    @property
    def max_seq_len(self) -> int:
        return self.max_positions

    @property
    def kv_shape(self) -> tuple[int, int]:
        return self.n_heads, self.d_model // self.n_heads

    def build(self, rngs: nnx.Rngs) -> Decoder:
        init = normal(self.init_std)
        residual_init = normal(self.init_std / (2 * self.n_layers) ** 0.5)  # section 2.3: scaled by depth

        def block(rngs: nnx.Rngs) -> Block:
            norm = functools.partial(LayerNorm, self.d_model, rngs=rngs, eps=self.norm_eps)
            attn = Attention(
                self.d_model,
                self.n_heads,
                self.d_model // self.n_heads,
                rngs=rngs,
                init=init,
                out_init=residual_init,
                bias=True,
                dropout=self.dropout,
                block=self.attention_block,
            )
            gelu = functools.partial(jax.nn.gelu, approximate=True)
            mlp = MLP(self.d_model, 4 * self.d_model, gelu, rngs=rngs, init=init, out_init=residual_init)
            return Block(norm(), attn, norm(), mlp, dropout=self.dropout)

        stack = Stack(self.n_layers, self.scan, self.remat)
        return Decoder(
            Embed(self.vocab_size, self.d_model, rngs=rngs, init=init),
            stack,
            stack.init(block, rngs),
            LayerNorm(self.d_model, rngs=rngs, eps=self.norm_eps),
            positions=LearnedPositions(self.max_positions, self.d_model, rngs=rngs, init=init),
            dropout=self.dropout,
        )
