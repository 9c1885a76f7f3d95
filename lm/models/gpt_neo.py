"""GPT-Neo (Black et al., 2021): GPT-3's alternation of global and local layers, and scores that are not scaled."""

from __future__ import annotations

import dataclasses
import functools
import math

from flax import nnx

from lm.errors import positive
from lm.models.base import Model, check_pattern, windowed_layers
from lm.models.decoder import Decoder, task_head
from lm.nn.activation import ACTIVATIONS, ActivationName
from lm.nn.attention import Attention, Heads, Inits, Scores
from lm.nn.block import Block, Layer
from lm.nn.embed import Embed
from lm.nn.mlp import MLP
from lm.nn.norm import LayerNorm
from lm.nn.param import normal
from lm.nn.position import LearnedPositions
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeo(Model):
    """GPT-Neo. d_ff None: 4 d_model. In the attention only the output has a bias. window, windowed: as GPT-2's."""

    d_ff: int | None = None
    max_positions: int = 2048
    norm_eps: float = 1e-5
    activation: ActivationName = "gelu_tanh"
    tied: bool = True
    window: int = 256
    windowed: tuple[bool, ...] = (False, True)

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_ff", "max_positions", "window")
        check_pattern(self.windowed)

    @property
    def max_seq_len(self) -> int:
        return self.max_positions

    @property
    def order(self) -> tuple[Layer, ...]:
        return windowed_layers(self.n_layers, self.window, self.windowed)

    def build(self, rngs: nnx.Rngs) -> Decoder:
        init = normal(self.init_std)
        residual_init = normal(self.init_std / math.sqrt(2 * self.n_layers))  # as GPT-2
        norm = functools.partial(LayerNorm, self.d_model, eps=self.norm_eps)

        def block(rngs: nnx.Rngs) -> Block:
            attn = Attention(
                self.d_model,
                Heads(*self.kv_shape),
                rngs=rngs,
                inits=Inits(init, residual_init),
                out_bias=True,
                scores=Scores(scale=1.0, dropout=self.weights_dropout),
            )
            d_ff = self.d_ff or 4 * self.d_model
            mlp = MLP(self.d_model, d_ff, ACTIVATIONS[self.activation], rngs=rngs, init=init, out_init=residual_init)
            return Block(norm(rngs=rngs), attn, norm(rngs=rngs), mlp, dropout=self.dropout)

        stack = Stack(self.order, self.compute)
        return Decoder(
            Embed(self.vocab_size, self.d_model, rngs=rngs, init=init),
            stack,
            stack.init(block, rngs),
            task_head(self, self.d_model, tied=self.tied, rngs=rngs, init=init),
            head_dim=self.kv_shape[1],
            norm=norm(rngs=rngs),
            positions=LearnedPositions(self.max_positions, self.d_model, rngs=rngs, init=init),
            dropout=self.dropout,
        )
