"""The encoder-only Transformer of BERT, RoBERTa, ALBERT and ELECTRA, with the heads of their tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.models.base import Output
from lm.nn.block import AnyBlock, Context
from lm.nn.dropout import dropout, split_key
from lm.nn.embed import Embed, Head, Types, head_fn, tie
from lm.nn.heads import DenseHead, Linear, LinearHead, Pooler
from lm.nn.mask import full_mask
from lm.nn.param import attach
from lm.nn.position import LearnedPositions
from lm.nn.stack import Stack


class Trunk(nnx.Module):
    """Layers over embedded tokens, run by `stack`.

    project: from the width of the embedding to that of the layers, where they differ (ALBERT).
    """

    def __init__(self, stack: Stack, layers: AnyBlock, *, project: Linear | None = None):
        self.stack, self.layers = stack, layers
        attach(self, project=project)

    def encoded(
        self,
        x: jax.Array,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        record: bool = False,
    ) -> Output:
        """x [B,S,E], the embedded tokens [B,S] -> hidden [B,S,D]; the rest as in the call of `Encoder`."""
        if hasattr(self, "project"):
            x = self.project(x)
        s = x.shape[1]
        mask = full_mask(s, s, *attended(tokens, segments, valid))
        out = self.stack((self.layers,), x, Context(mask, valid=valid), key=key, record=record)
        states = jnp.concatenate([x[None], out.states]) if out.states is not None else None
        return Output(out.x, router=out.router, states=states)


class Encoder(Trunk):
    """Embeddings behind a norm, layers run by `stack`, and the heads of a task, each only where it has one.

    pooler: of the first token. head: of masked words. pair: of the pooled state, whether two sentences belong. labeler:
    labels of a sequence (of the pooled state, or of the first token where there is no pooler) or of tokens, or starts
    and ends of spans.
    """

    head: Head
    pair: LinearHead
    labeler: LinearHead | DenseHead

    def __init__(
        self,
        embed: Embed,
        positions: LearnedPositions,
        norm: nnx.Module,
        stack: Stack,
        layers: AnyBlock,
        *,
        types: Types | None = None,
        project: Linear | None = None,
        pooler: Pooler | None = None,
        head: Head | None = None,
        pair: LinearHead | None = None,
        labeler: LinearHead | DenseHead | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(stack, layers, project=project)
        tie(head, embed)
        self.embed, self.positions, self.norm = embed, positions, norm
        attach(self, types=types, pooler=pooler, head=head, pair=pair, labeler=labeler)
        self.dropout = dropout

    def __call__(
        self,
        tokens: jax.Array,
        *,
        dtype: DTypeLike,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        token_types: jax.Array | None = None,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        record: bool = False,
    ) -> Output:
        """tokens [B,S] -> hidden [B,S,D]. positions [B,S] default to 0..S-1, token_types [B,S] to 0; segments [B,S]
        keep packed texts apart; valid bool [B,S] (None: all) are the tokens that are attended to."""
        k_embed, k_layers = split_key(key, 2)
        x = self.embedded(tokens, dtype=dtype, positions=positions, token_types=token_types, key=k_embed)
        return self.encoded(x, tokens, segments=segments, valid=valid, key=k_layers, record=record)

    def embedded(
        self,
        tokens: jax.Array,
        *,
        dtype: DTypeLike,
        positions: jax.Array | None = None,
        token_types: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """tokens [B,S] -> [B,S,E], what the layers read: tokens, positions and types, behind the norm."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens, dtype) + self.positions(positions, dtype)
        if hasattr(self, "types"):
            x = x + self.types(jnp.zeros_like(tokens) if token_types is None else token_types, dtype)
        return dropout(self.norm(x), self.dropout, key)

    def pooled(self, x: jax.Array) -> jax.Array:
        """hidden [B,S,D] -> [B,D], what stands for the whole text."""
        return self.pooler(x[:, 0]) if hasattr(self, "pooler") else x[:, 0]  # the state of the first token, [CLS]

    def logits(self, x: jax.Array) -> jax.Array:
        """hidden [B,S,D] -> float32 [B,S,V]: which word is masked."""
        return self.head.logits(x, self.embed)

    def head_fn(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """(f, params) with f(params, hidden) = logits."""
        return head_fn(self.head, self.embed)

    def pair_logits(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """hidden [B,S,D] -> float32 [B,2]: the two sentences belong as they stand, or not."""
        return self.pair(self.pooled(x), key).astype(jnp.float32)

    def labels(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """hidden [..., D] -> float32 [..., n]: labels of tokens, starts and ends; or, of `pooled` states, of texts."""
        return self.labeler(x, key).astype(jnp.float32)


def attended(
    tokens: jax.Array, segments: jax.Array | None, valid: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """(segments of queries, of keys): as given, with keys that are not valid in a segment that no query is in."""
    if valid is None:
        return segments, segments
    queries = jnp.ones_like(tokens) if segments is None else segments
    return queries, jnp.where(valid, queries, -1)  # a query that is not valid attends all the same: nobody reads it
