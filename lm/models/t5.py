"""T5 (Raffel et al., 2020): RMSNorm before each part, no biases, relative positions, scores that are not scaled.

And T5 1.1 (Shazeer, 2020, and the released checkpoints): gated gelu, a head of its own, an output that is not scaled.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx

from lm.errors import positive
from lm.models.base import Architecture, Model
from lm.models.encoder_decoder import EncoderDecoder, Side, task_labeler
from lm.models.tasks import Body, LanguageModeling, TokenClassification
from lm.nn.activation import ACTIVATIONS, ActivationName
from lm.nn.attention import Attention, Heads, Inits, Scores
from lm.nn.block import Block
from lm.nn.embed import Embed, Head
from lm.nn.mlp import MLP, GatedMLP
from lm.nn.norm import RMSNorm
from lm.nn.param import normal
from lm.nn.position import RelativeBias
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5(Model):
    """The base model of the first release by default; 1.1 sets gated, activation, tied and scale_output.

    n_layers: of the decoder, and where n_encoder_layers is None of the encoder.
    head_dim: heads may be wider together than the model.
    relative_buckets, relative_max_distance: see `RelativeBias`; each side has one table, which its layers share.
    scale_output: what the head reads, by D^-1/2.
    init_std: multiplies the initial values, each drawn by the width of its input (code of the paper).
    """

    family: ClassVar[Architecture] = "encoder_decoder"

    vocab_size: int = 32_128
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    d_ff: int = 3072
    head_dim: int = 64
    n_encoder_layers: int | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_eps: float = 1e-6
    activation: ActivationName = "relu"
    gated: bool = False
    tied: bool = True
    scale_output: bool = True
    dropout: float = 0.1
    init_std: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_ff", "head_dim", "n_encoder_layers", "relative_buckets", "relative_max_distance")

    @property
    def has_decoder(self) -> bool:
        """Tokens are labelled by the encoder alone (T5ForTokenClassification of transformers)."""
        return not isinstance(self.task, TokenClassification) and self.task != Body(encoder_only=True)

    @property
    def kv_shape(self) -> tuple[int, int]:
        return self.n_heads, self.head_dim

    def side(self, rngs: nnx.Rngs, *, n_layers: int, decoder: bool) -> Side:
        d, f, inner = self.d_model, self.init_std, self.n_heads * self.head_dim

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(d, rngs=rngs, eps=self.norm_eps)

        def attention(rngs: nnx.Rngs) -> Attention:
            return Attention(
                d,
                Heads(self.n_heads, self.head_dim),
                rngs=rngs,
                inits=Inits(
                    qkv=normal(f * d**-0.5), out=normal(f * inner**-0.5), q=normal(f * (d * self.head_dim) ** -0.5)
                ),
                scores=Scores(scale=1.0, dropout=self.weights_dropout),  # q is drawn smaller instead
            )

        def block(rngs: nnx.Rngs) -> Block:
            feed_forward = GatedMLP if self.gated else MLP
            mlp = feed_forward(
                d,
                self.d_ff,
                ACTIVATIONS[self.activation],
                rngs=rngs,
                init=normal(f * d**-0.5),
                out_init=normal(f * self.d_ff**-0.5),
                bias=False,
                dropout=self.dropout,
            )
            return Block(
                norm(rngs),
                attention(rngs),
                norm(rngs),
                mlp,
                cross_norm=norm(rngs) if decoder else None,
                cross=attention(rngs) if decoder else None,
                dropout=self.dropout,
            )

        bias = RelativeBias(
            self.n_heads,
            self.relative_buckets,
            self.relative_max_distance,
            bidirectional=not decoder,
            rngs=rngs,
            init=normal(f * d**-0.5),
        )
        stack = Stack(n_layers, self.compute)
        return Side(
            stack,
            stack.init(block, rngs),
            bias=bias,
            norm=norm(rngs),
            dropout=self.dropout,
            final_dropout=self.dropout,
        )

    def build(self, rngs: nnx.Rngs) -> EncoderDecoder:
        fan_in = self.d_model**-0.5
        embed = Embed(self.vocab_size, self.d_model, rngs=rngs, init=normal(self.init_std), pad_id=self.pad_id)

        def head() -> Head:
            return Head(
                self.vocab_size,
                self.d_model,
                rngs=rngs,
                init=normal(self.init_std * (1.0 if self.scale_output else fan_in)),  # 1.1 has the factor here
                tied=self.tied,
                scale=fan_in if self.scale_output else 1.0,
            )

        encoder = self.side(rngs, n_layers=self.n_encoder_layers or self.n_layers, decoder=False)
        decoder = self.side(rngs, n_layers=self.n_layers, decoder=True) if self.has_decoder else None
        return EncoderDecoder(
            embed,
            encoder,
            decoder,
            head=head() if isinstance(self.task, LanguageModeling) else None,
            labeler=task_labeler(self, rngs=rngs, init=normal(self.init_std * fan_in)),
        )
