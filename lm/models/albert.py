"""ALBERT (Lan et al., 2020): BERT with a narrow embedding and with layers that share their parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from lm.errors import UserError, positive
from lm.models.bert import Bert
from lm.models.encoder import Encoder
from lm.nn.activation import ActivationName
from lm.nn.block import Layer
from lm.nn.heads import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Albert(Bert):
    """The xxlarge model of the paper by default.

    d_embed: width of the embedding (section 3.1). n_groups: of layers, as many in each as can be, in order; all in one
    share their parameters. inner_layers: different layers that stand for one of the `n_layers`.
    """

    vocab_size: int = 30000
    d_embed: int = 128
    d_model: int = 4096
    n_heads: int = 64
    n_groups: int = 1
    inner_layers: int = 1
    activation: ActivationName = "gelu_tanh"
    classifier_dropout: float | None = 0.1

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_embed", "n_groups", "inner_layers")
        if self.n_groups > self.n_layers:
            raise UserError(f"model.n_groups: expected at most model.n_layers {self.n_layers}, got {self.n_groups}")

    @property
    def order(self) -> tuple[Layer, ...]:
        # The rounding of transformers, which decides where groups are unequal.
        groups = [int(i / (self.n_layers / self.n_groups)) for i in range(self.n_layers)]
        return tuple(Layer(index=group * self.inner_layers + j) for group in groups for j in range(self.inner_layers))

    @property
    def pair_dropout(self) -> float:
        return self.label_dropout

    def build(self, rngs: nnx.Rngs, **parts: Any) -> Encoder:
        project = Linear(self.d_embed, self.d_model, rngs=rngs, init=self.init, axes=(None, "embed"))
        return super().build(rngs, project=project, **parts)
