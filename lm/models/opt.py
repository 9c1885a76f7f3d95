"""OPT (Zhang et al., 2022): a GPT-3 with relu and dense attention; its 350M model has its norms behind the parts."""

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
from lm.nn.block import Block, PostNormBlock
from lm.nn.embed import Embed
from lm.nn.heads import Linear
from lm.nn.mlp import MLP
from lm.nn.norm import LayerNorm
from lm.nn.param import normal
from lm.nn.position import LearnedPositions
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPT(Model):
    """GPT-3 with relu. embed_dim: width of the embedding, None: d_model; where it is another, linear maps stand between
    (350M).

    post_norm: norms behind the parts and none at the end (350M). final_norm: after the last layer, of pre-norm only.
    bias: on all linear maps of a layer.
    """

    d_ff: int
    embed_dim: int | None = None
    max_positions: int = 2048
    activation: ActivationName = "relu"
    tied: bool = True
    post_norm: bool = False
    final_norm: bool = True
    bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_ff", "embed_dim", "max_positions")

    @property
    def max_seq_len(self) -> int:
        return self.max_positions

    @property
    def embed_width(self) -> int:
        return self.embed_dim or self.d_model

    @property
    def has_final_norm(self) -> bool:
        return self.final_norm and not self.post_norm

    def build(self, rngs: nnx.Rngs) -> Decoder:
        init = normal(self.init_std)
        residual_init = normal(self.init_std / math.sqrt(2 * self.n_layers))  # section 2.2
        norm = functools.partial(LayerNorm, self.d_model)

        def block(rngs: nnx.Rngs) -> Block | PostNormBlock:
            attn = Attention(
                self.d_model,
                Heads(*self.kv_shape),
                rngs=rngs,
                inits=Inits(init, residual_init),
                bias=self.bias,
                scores=Scores(dropout=self.weights_dropout),
            )
            activation = ACTIVATIONS[self.activation]
            mlp = MLP(self.d_model, self.d_ff, activation, rngs=rngs, init=init, out_init=residual_init, bias=self.bias)
            kind = PostNormBlock if self.post_norm else Block
            return kind(norm(rngs=rngs), attn, norm(rngs=rngs), mlp, dropout=self.dropout)

        linear = functools.partial(Linear, rngs=rngs, init=init, bias=False)
        projected = self.embed_width != self.d_model
        stack = Stack(self.n_layers, self.compute)
        return Decoder(
            Embed(self.vocab_size, self.embed_width, rngs=rngs, init=init, pad_id=self.pad_id),
            stack,
            stack.init(block, rngs),
            task_head(self, self.embed_width, tied=self.tied, rngs=rngs, init=init),
            head_dim=self.kv_shape[1],
            norm=norm(rngs=rngs) if self.has_final_norm else None,
            # Two rows that no token reads, as BART's OFFSET.
            positions=LearnedPositions(self.max_positions, self.d_model, rngs=rngs, init=init, offset=2),
            project_in=linear(self.embed_width, self.d_model, axes=(None, "embed")) if projected else None,
            project_out=linear(self.d_model, self.embed_width) if projected else None,
            dropout=0.0,  # section 2.2: none on embeddings
        )
