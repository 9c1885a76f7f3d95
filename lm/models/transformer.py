"""The original Transformer (Vaswani et al., 2017): an encoder and a decoder with a norm after each part, and sinusoids.

Marian is the same with other activations; BART and MBART exchange positions and norms.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from flax import nnx

from lm.errors import UserError, positive
from lm.models.base import Architecture, Model
from lm.models.encoder_decoder import EncoderDecoder, Side, task_labeler
from lm.models.tasks import LanguageModeling, TokenClassification
from lm.nn.activation import ACTIVATIONS, ActivationName
from lm.nn.attention import Attention, Heads, Inits, Scores
from lm.nn.block import Block, PostNormBlock
from lm.nn.embed import Embed, Head
from lm.nn.mlp import MLP
from lm.nn.norm import LayerNorm
from lm.nn.param import normal
from lm.nn.position import LearnedPositions, Sinusoids
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer(Model):
    """The base model of the paper by default (section 3 and table 3).

    n_layers, n_heads, d_ff: of the decoder, and where n_encoder_layers, n_encoder_heads, encoder_d_ff are None, of the
        encoder.
    target_vocab_size: of the decoder, which then has an embedding of its own; None: one embedding serves both.
    activation_dropout: within the feed-forward layers.
    scale_embed: the embedding by D^1/2 (section 3.4).
    tied: the head is the decoder's embedding.
    logits_bias: one that stays as a checkpoint brought it (Marian's and BART's final_logits_bias).
    """

    family: ClassVar[Architecture] = "encoder_decoder"

    vocab_size: int = 37_000
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    d_ff: int = 2048
    n_encoder_layers: int | None = None
    n_encoder_heads: int | None = None
    encoder_d_ff: int | None = None
    target_vocab_size: int | None = None
    activation: ActivationName = "relu"
    dropout: float = 0.1
    attention_dropout: float | None = 0.0
    activation_dropout: float = 0.0
    scale_embed: bool = True
    tied: bool = True
    logits_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_ff", "n_encoder_layers", "n_encoder_heads", "encoder_d_ff", "target_vocab_size")
        if not 0.0 <= self.activation_dropout < 1.0:
            raise UserError(f"model.activation_dropout: expected a rate in [0, 1), got {self.activation_dropout}")
        if self.n_encoder_heads and self.d_model % self.n_encoder_heads:
            raise UserError(
                f"model.n_encoder_heads: {self.n_encoder_heads} does not divide model.d_model {self.d_model}"
            )
        if isinstance(self.task, TokenClassification):
            raise UserError(
                "model.task: expected LanguageModeling, SequenceClassification or QuestionAnswering, got "
                "TokenClassification; T5 has them"
            )

    # --- the parts that BART and MBART exchange -----------------------------------------------------------------------

    block: ClassVar[type[Block] | type[PostNormBlock]] = PostNormBlock

    def positions(self, rngs: nnx.Rngs) -> Sinusoids | LearnedPositions:
        return Sinusoids(self.d_model)

    def embed_norm(self, rngs: nnx.Rngs) -> nnx.Module | None:
        return None

    def final_norm(self, rngs: nnx.Rngs) -> nnx.Module | None:
        return None

    # ------------------------------------------------------------------------------------------------------------------

    def norm(self, rngs: nnx.Rngs) -> LayerNorm:
        return LayerNorm(self.d_model, rngs=rngs)

    def side(self, rngs: nnx.Rngs, *, n_layers: int, n_heads: int, d_ff: int, cross: bool) -> Side:
        init = normal(self.init_std)

        def attention(rngs: nnx.Rngs) -> Attention:
            return Attention(
                self.d_model,
                Heads(n_heads, self.d_model // n_heads),
                rngs=rngs,
                inits=Inits(init, init),
                bias=True,
                scores=Scores(dropout=self.weights_dropout),
            )

        def block(rngs: nnx.Rngs) -> Block | PostNormBlock:
            mlp = MLP(
                self.d_model,
                d_ff,
                ACTIVATIONS[self.activation],
                rngs=rngs,
                init=init,
                out_init=init,
                dropout=self.activation_dropout,
            )
            return self.block(
                self.norm(rngs),
                attention(rngs),
                self.norm(rngs),
                mlp,
                cross_norm=self.norm(rngs) if cross else None,
                cross=attention(rngs) if cross else None,
                dropout=self.dropout,
            )

        stack = Stack(n_layers, self.compute)
        return Side(
            stack,
            stack.init(block, rngs),
            positions=self.positions(rngs),
            embed_norm=self.embed_norm(rngs),
            norm=self.final_norm(rngs),
            dropout=self.dropout,
        )

    def build(self, rngs: nnx.Rngs) -> EncoderDecoder:
        init = normal(self.init_std)
        scale = math.sqrt(self.d_model) if self.scale_embed else 1.0

        def embed(vocab_size: int) -> Embed:
            return Embed(vocab_size, self.d_model, rngs=rngs, init=init, scale=scale, pad_id=self.pad_id)

        def head() -> Head:
            vocab_size = self.target_vocab_size or self.vocab_size
            return Head(
                vocab_size,
                self.d_model,
                rngs=rngs,
                init=init,
                tied=self.tied,
                bias="fixed" if self.logits_bias else None,
            )

        encoder = self.side(
            rngs,
            n_layers=self.n_encoder_layers or self.n_layers,
            n_heads=self.n_encoder_heads or self.n_heads,
            d_ff=self.encoder_d_ff or self.d_ff,
            cross=False,
        )
        return EncoderDecoder(
            embed(self.vocab_size),
            encoder,
            self.side(rngs, n_layers=self.n_layers, n_heads=self.n_heads, d_ff=self.d_ff, cross=True),
            target_embed=embed(self.target_vocab_size) if self.target_vocab_size else None,
            head=head() if isinstance(self.task, LanguageModeling) else None,
            labeler=task_labeler(self, rngs=rngs, init=init),
        )
