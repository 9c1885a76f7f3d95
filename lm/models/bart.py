"""BART (Lewis et al., 2020): the original Transformer with learned positions and a norm behind the embedding.

And mBART (Liu et al., 2020), with the norms before each part.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx

from lm.errors import positive
from lm.models.transformer import Transformer
from lm.nn.activation import ActivationName
from lm.nn.block import Block, PostNormBlock
from lm.nn.norm import LayerNorm
from lm.nn.param import normal
from lm.nn.position import LearnedPositions

OFFSET = 2  # rows of the position table that no token reads: the code of the paper numbered from its padding id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bart(Transformer):
    """The large model of the paper by default. `max_positions`: of either side, each with a table of its own."""

    vocab_size: int = 50_265
    d_model: int = 1024
    n_layers: int = 12
    n_heads: int = 16
    d_ff: int = 4096
    activation: ActivationName = "gelu"
    scale_embed: bool = False
    max_positions: int = 1024

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "max_positions")

    @property
    def max_seq_len(self) -> int:
        return self.max_positions

    def positions(self, rngs: nnx.Rngs) -> LearnedPositions:
        return LearnedPositions(self.max_positions, self.d_model, rngs=rngs, init=normal(self.init_std), offset=OFFSET)

    def embed_norm(self, rngs: nnx.Rngs) -> LayerNorm:
        return self.norm(rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MBart(Bart):
    """A norm before each part, and one after the last layer of either side."""

    block: ClassVar[type[Block] | type[PostNormBlock]] = Block

    def final_norm(self, rngs: nnx.Rngs) -> LayerNorm:
        return self.norm(rngs)
