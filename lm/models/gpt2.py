"""GPT-2 (Radford et al., 2019): LayerNorm before each part, learned positions, gelu, biases, tied head.

And GPT-3 (Brown et al., 2020), which is the same with attention over a window in every other layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from flax import nnx

from lm.errors import positive
from lm.models.base import Model, check_pattern
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
class GPT2(Model):
    """The 124M model of the paper by default. `d_ff` None: 4 d_model.

    window: keys that a layer of `windowed` sees, a pattern repeated over the layers (GPT-3: every other, 2.1).
    scale_scores: by K^-1/2. scale_by_layer: and by 1 / (layer number), counted from 1.
    """

    vocab_size: int = 50257
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    d_ff: int | None = None
    max_positions: int = 1024
    norm_eps: float = 1e-5
    activation: ActivationName = "gelu_tanh"
    tied: bool = True
    window: int | None = None
    windowed: tuple[bool, ...] = (False, True)
    scale_scores: bool = True
    scale_by_layer: bool = False

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "max_positions", "d_ff", "window")
        check_pattern(self.windowed)

    @property
    def max_seq_len(self) -> int:
        return self.max_positions

    @property
    def order(self) -> tuple[Layer, ...]:
        return tuple(
            Layer(
                index=i,
                window=self.window if self.windowed[i % len(self.windowed)] else None,
                scale=1.0 / (i + 1) if self.scale_by_layer else 1.0,
            )
            for i in range(self.n_layers)
        )

    def build(self, rngs: nnx.Rngs) -> Decoder:
        init = normal(self.init_std)
        residual_init = normal(self.init_std / math.sqrt(2 * self.n_layers))  # section 2.3: scaled by depth
        norm = functools.partial(LayerNorm, self.d_model, eps=self.norm_eps)

        def block(rngs: nnx.Rngs) -> Block:
            attn = Attention(
                self.d_model,
                Heads(*self.kv_shape),
                rngs=rngs,
                inits=Inits(init, residual_init),
                bias=True,
                scores=Scores(scale=None if self.scale_scores else 1.0, dropout=self.weights_dropout),
            )
            d_ff = self.d_ff or 4 * self.d_model
            activation = ACTIVATIONS[self.activation]
            mlp = MLP(self.d_model, d_ff, activation, rngs=rngs, init=init, out_init=residual_init)
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
