"""ELECTRA (Clark et al., 2020): a small masked-language model fills in words, and a BERT learns which ones it did.

Both read the same embedding: tokens, positions and types behind one norm, as in the authors' code (the scope
"electra/embeddings" of google-research/electra, model/modeling.py). Fine-tuning and its heads are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.errors import UserError, positive
from lm.models.base import Output
from lm.models.bert import Bert
from lm.models.encoder import Encoder, Trunk
from lm.models.tasks import MaskedLMAndReplaced, Task
from lm.nn.activation import ACTIVATIONS, Activation
from lm.nn.block import AnyBlock
from lm.nn.dropout import split_key
from lm.nn.embed import Head, head_fn, tie
from lm.nn.heads import Linear
from lm.nn.param import Init
from lm.nn.stack import Stack


class WordGenerator(Trunk):
    """The layers of the generator, and its head of masked words; what they read comes from the discriminator."""

    def __init__(self, stack: Stack, layers: AnyBlock, head: Head, *, project: Linear | None = None):
        super().__init__(stack, layers, project=project)
        self.head = head


class Detector(nnx.Module):
    """dense, activation, one number: x [B,S,D] -> float32 [B,S], the log-odds that a token was replaced."""

    def __init__(self, d_model: int, activation: Activation, *, rngs: nnx.Rngs, init: Init):
        self.dense = Linear(d_model, d_model, rngs=rngs, init=init)
        self.out = Linear(d_model, 1, rngs=rngs, init=init)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.activation(self.dense(x)).astype(jnp.float32))[..., 0]  # the loss reads it: float32


class ElectraEncoder(Encoder):
    """The discriminator, which is what calling it runs, with the generator that it is trained against."""

    def __init__(self, *parts: Any, generator: WordGenerator, detector: Detector, **optional: Any):
        super().__init__(*parts, **optional)
        tie(generator.head, self.embed)
        self.generator, self.detector = generator, detector

    def generate(
        self,
        tokens: jax.Array,
        *,
        dtype: DTypeLike,
        token_types: jax.Array | None = None,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """tokens [B,S], some of them masks -> hidden [B,S,G] of the generator, for `logits` and `head_fn`; the rest as
        in the call of `Encoder`."""
        k_embed, k_layers = split_key(key, 2)
        x = self.embedded(tokens, dtype=dtype, token_types=token_types, key=k_embed)
        return self.generator.encoded(x, tokens, valid=valid, key=k_layers)

    def logits(self, x: jax.Array) -> jax.Array:
        """hidden [B,S,G] of the generator -> float32 [B,S,V]: which word is masked."""
        return self.generator.head.logits(x, self.embed)

    def head_fn(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """(f, params) with f(params, hidden of the generator) = logits."""
        return head_fn(self.generator.head, self.embed)

    def replaced(self, x: jax.Array) -> jax.Array:
        """hidden [B,S,D] of the discriminator -> float32 [B,S]: the log-odds that a token is not the original."""
        return self.detector(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorSize:
    """The generator's layers; the paper finds a quarter to half of the discriminator's width to be best (3.2).

    n_layers None: as many as the discriminator has. d_ff None: 4 d_model.
    """

    d_model: int = 256
    n_heads: int = 4
    n_layers: int | None = None
    d_ff: int | None = None

    def __post_init__(self):
        positive("model.generator", self, "d_model", "n_heads", "n_layers", "d_ff")
        if self.d_model % self.n_heads:
            raise UserError(
                f"model.generator.n_heads: expected a divisor of model.generator.d_model {self.d_model}, got "
                f"{self.n_heads}; change one of them"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Electra(Bert):
    """The base model of the paper by default. d_embed: width of the embedding that both share, projected to the width
    of either where that is another (the paper's small model has 128)."""

    encoder: ClassVar[type[Encoder]] = ElectraEncoder

    d_embed: int = 768
    generator: GeneratorSize = GeneratorSize()
    task: Task = MaskedLMAndReplaced()

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "d_embed")

    def heads(self, rngs: nnx.Rngs) -> dict[str, Any]:
        if not isinstance(self.task, MaskedLMAndReplaced):
            raise UserError(
                f"model.task: expected MaskedLMAndReplaced for Electra, got {type(self.task).__name__}; take Bert, "
                "which has heads for labels"
            )
        size = self.generator
        n_layers = self.n_layers if size.n_layers is None else size.n_layers
        # Its parts are those of a BERT of this size.
        small = dataclasses.replace(self, d_model=size.d_model, n_heads=size.n_heads, n_layers=n_layers, d_ff=size.d_ff)
        stack = Stack(small.order, self.compute)
        layers, head = stack.init(small.block, rngs), small.word_head(rngs)
        generator = WordGenerator(stack, layers, head, project=small.project(rngs))
        return {
            "generator": generator,
            "detector": Detector(self.d_model, ACTIVATIONS[self.activation], rngs=rngs, init=self.init),
        }

    def project(self, rngs: nnx.Rngs) -> Linear | None:
        """The map from the embedding to the layers, where they are not of one width."""
        if self.d_embed == self.d_model:
            return None
        return Linear(self.d_embed, self.d_model, rngs=rngs, init=self.init, axes=(None, "embed"))

    def build(self, rngs: nnx.Rngs, **parts: Any) -> Encoder:
        return super().build(rngs, project=self.project(rngs), **parts)
