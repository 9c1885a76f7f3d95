"""BERT (Devlin et al., 2019): norms after each part, learned positions, sentence types, and a head for each task.

RoBERTa, ALBERT and ELECTRA exchange one part or another of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

from flax import nnx

from lm.errors import UserError, positive
from lm.models.base import Architecture, Model
from lm.models.encoder import Encoder
from lm.models.tasks import (
    Body,
    LanguageModeling,
    MaskedLMAndPair,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from lm.nn.activation import ACTIVATIONS, Activation, ActivationName
from lm.nn.attention import Attention, Heads, Inits, Scores
from lm.nn.block import PostNormBlock
from lm.nn.embed import Embed, Head, Types
from lm.nn.heads import LinearHead, Pooler, Transform
from lm.nn.mlp import MLP
from lm.nn.norm import LayerNorm
from lm.nn.param import Init, normal
from lm.nn.position import LearnedPositions
from lm.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bert(Model):
    """The base model of the paper by default. `d_ff` None: 4 d_model. n_types: sentences that a text is made of.

    tied: the embedding is the table of the masked-word head too. classifier_dropout: before the labels of fine-tuning
    (None: as `dropout`).
    """

    family: ClassVar[Architecture] = "encoder"
    encoder: ClassVar[type[Encoder]] = Encoder

    vocab_size: int = 30522
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    d_ff: int | None = None
    max_positions: int = 512
    n_types: int = 2
    norm_eps: float = 1e-12
    activation: ActivationName = "gelu"
    tied: bool = True
    classifier_dropout: float | None = None

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_ff", "max_positions", "n_types")
        if not 0.0 <= self.label_dropout < 1.0:
            raise UserError(f"model.classifier_dropout: expected a rate in [0, 1), got {self.classifier_dropout}")

    @property
    def max_seq_len(self) -> int:
        return self.max_positions

    # --- the parts that other families exchange -----------------------------------------------------------------------

    @property
    def d_embed(self) -> int:
        return self.d_model

    @property
    def pair_dropout(self) -> float:
        return 0.0

    @property
    def word_activation(self) -> Activation:
        """The activation of the masked-word head."""
        return ACTIVATIONS[self.activation]

    def positions(self, rngs: nnx.Rngs) -> LearnedPositions:
        return LearnedPositions(self.max_positions, self.d_embed, rngs=rngs, init=self.init)

    def heads(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """What stands on the encoder for `task`, by the names of `Encoder`."""
        linear = functools.partial(LinearHead, self.d_model, rngs=rngs, init=self.init)
        match self.task:
            case LanguageModeling():
                return {"head": self.word_head(rngs)}
            case MaskedLMAndPair():
                pair = linear(2, dropout=self.pair_dropout, used="row")
                return {"pooler": self.pooler(rngs), "head": self.word_head(rngs), "pair": pair}
            case SequenceClassification(n_labels=n):
                return {"pooler": self.pooler(rngs), "labeler": linear(n, dropout=self.label_dropout, used="row")}
            case TokenClassification(n_labels=n):
                return {"labeler": linear(n, dropout=self.label_dropout)}
            case QuestionAnswering():
                return {"labeler": linear(2, dropout=0.0)}
            case Body(pooler=pooler):
                return {"pooler": self.pooler(rngs)} if pooler else {}
        known = "LanguageModeling, MaskedLMAndPair, SequenceClassification, TokenClassification or QuestionAnswering"
        raise UserError(f"model.task: expected {known} for an encoder, got {type(self.task).__name__}")

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def label_dropout(self) -> float:
        return self.dropout if self.classifier_dropout is None else self.classifier_dropout

    @property
    def init(self) -> Init:
        return normal(self.init_std)

    def norm(self, d: int, rngs: nnx.Rngs) -> LayerNorm:
        return LayerNorm(d, rngs=rngs, eps=self.norm_eps)

    def block(self, rngs: nnx.Rngs) -> PostNormBlock:
        norm = functools.partial(self.norm, self.d_model, rngs)
        attn = Attention(
            self.d_model,
            Heads(*self.kv_shape),
            rngs=rngs,
            inits=Inits(self.init, self.init),
            bias=True,
            scores=Scores(dropout=self.weights_dropout),
        )
        d_ff, activation = self.d_ff or 4 * self.d_model, ACTIVATIONS[self.activation]
        mlp = MLP(self.d_model, d_ff, activation, rngs=rngs, init=self.init, out_init=self.init)
        return PostNormBlock(norm(), attn, norm(), mlp, dropout=self.dropout)

    def pooler(self, rngs: nnx.Rngs) -> Pooler:
        return Pooler(self.d_model, rngs=rngs, init=self.init)

    def word_head(self, rngs: nnx.Rngs) -> Head:
        norm, init = self.norm(self.d_embed, rngs), self.init
        transform = Transform(self.d_model, self.d_embed, self.word_activation, norm, rngs=rngs, init=init)
        return Head(
            self.vocab_size, self.d_embed, rngs=rngs, init=init, tied=self.tied, transform=transform, bias="trained"
        )

    def build(self, rngs: nnx.Rngs, **parts: Any) -> Encoder:
        stack = Stack(self.order, self.compute)
        return self.encoder(
            Embed(self.vocab_size, self.d_embed, rngs=rngs, init=self.init, pad_id=self.pad_id),
            self.positions(rngs),
            self.norm(self.d_embed, rngs),
            stack,
            stack.init(self.block, rngs),
            types=Types(self.n_types, self.d_embed, rngs=rngs, init=self.init),
            dropout=self.dropout,
            **self.heads(rngs),
            **parts,
        )
