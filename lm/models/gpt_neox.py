"""GPT-NeoX (Black et al., 2022) and Pythia (Biderman et al., 2023): attention and feed-forward side by side, rotary
positions on a part of each head."""

from __future__ import annotations

import dataclasses
import functools
import math

from flax import nnx

from lm.errors import positive
from lm.models.base import Model
from lm.models.decoder import Decoder, task_head
from lm.nn.activation import ACTIVATIONS, ActivationName
from lm.nn.attention import Attention, Heads, Inits, Scores
from lm.nn.block import Block, ParallelBlock
from lm.nn.embed import Embed
from lm.nn.mlp import MLP
from lm.nn.norm import LayerNorm
from lm.nn.param import normal
from lm.nn.rope import Rope
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoX(Model):
    """GPT-NeoX. parallel: both parts read the layer's input, each through its own norm; else the second reads what the
    first left. d_ff None: 4 d_model. attention_bias: on all four maps."""

    d_ff: int | None = None
    rope: Rope = Rope(fraction=0.25)
    norm_eps: float = 1e-5
    activation: ActivationName = "gelu"
    tied: bool = False
    parallel: bool = True
    attention_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_ff")
        self.rope.dim(self.kv_shape[1])

    def build(self, rngs: nnx.Rngs) -> Decoder:
        init = normal(self.init_std)
        # Wang and Komatsuzaki (2021), which the paper takes it from: 2 / (L sqrt(d)).
        out_init = normal(2.0 / (self.n_layers * math.sqrt(self.d_model)))
        norm = functools.partial(LayerNorm, self.d_model, eps=self.norm_eps)

        def block(rngs: nnx.Rngs) -> Block | ParallelBlock:
            attn = Attention(
                self.d_model,
                Heads(*self.kv_shape),
                rngs=rngs,
                inits=Inits(init, out_init),
                bias=self.attention_bias,
                scores=Scores(dropout=self.weights_dropout),
            )
            d_ff = self.d_ff or 4 * self.d_model
            mlp = MLP(self.d_model, d_ff, ACTIVATIONS[self.activation], rngs=rngs, init=init, out_init=out_init)
            kind = ParallelBlock if self.parallel else Block
            return kind(norm(rngs=rngs), attn, norm(rngs=rngs), mlp, dropout=self.dropout)

        stack = Stack(self.n_layers, self.compute)
        return Decoder(
            Embed(self.vocab_size, self.d_model, rngs=rngs, init=init),
            stack,
            stack.init(block, rngs),
            task_head(self, self.d_model, tied=self.tied, rngs=rngs, init=init),
            head_dim=self.kv_shape[1],
            norm=norm(rngs=rngs),
            ropes=(self.rope,),
            dropout=self.dropout,
        )
