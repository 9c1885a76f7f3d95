"""The decoder-only Transformer that GPT-2, LLaMA and the others compose with their own parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models.base import Model, Output
from lm.models.tasks import Body, Labels, LanguageModeling, QuestionAnswering, SequenceClassification
from lm.nn.block import AnyBlock, Context
from lm.nn.dropout import dropout, split_key
from lm.nn.embed import Embed, Head, head_fn, tie
from lm.nn.heads import Linear, LinearHead
from lm.nn.mask import Mask, causal_mask
from lm.nn.param import Init, attach
from lm.nn.position import LearnedPositions
from lm.nn.rope import Rope
from lm.nn.stack import Stack


class Decoder(nnx.Module):
    """Embedding, layers run by `stack`, final norm, and the head of a task that has one.

    layers, dense_layers: the stack's blocks 0 and 1. ropes: the rotations that its layers choose from. project_in,
    project_out: between the width of the embedding and that of the layers (OPT 350M).
    """

    head: Head | LinearHead

    def __init__(
        self,
        embed: Embed,
        stack: Stack,
        layers: AnyBlock,
        head: Head | LinearHead | None,
        *,
        head_dim: int,
        norm: nnx.Module | None = None,
        dense_layers: AnyBlock | None = None,
        positions: LearnedPositions | None = None,
        ropes: tuple[Rope, ...] = (),
        project_in: Linear | None = None,
        project_out: Linear | None = None,
        dropout: float = 0.0,
    ):
        tie(head, embed)
        self.embed, self.stack, self.layers = embed, stack, layers
        attach(self, head=head, norm=norm, dense_layers=dense_layers, positions=positions)
        attach(self, project_in=project_in, project_out=project_out)
        self.ropes, self.head_dim, self.dropout = ropes, head_dim, dropout

    @property
    def blocks(self) -> tuple[AnyBlock, ...]:
        return (self.layers, self.dense_layers) if hasattr(self, "dense_layers") else (self.layers,)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        dtype: DTypeLike,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        prefix: jax.Array | None = None,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: Any = None,
        mask: Mask | None = None,
        index: jax.Array | None = None,
        record: bool = False,
    ) -> Output:
        """tokens [B,S] -> hidden [B,S,D] after the final norm, the cache with the new keys and values, ...

        positions [B,S] default to 0..S-1; segments [B,S] keep packed documents apart; prefix bool [B,S] are the tokens
        that those before them see too (see `lm.nn.mask.Mask`); valid bool [B,S] (None: all) are the tokens that count
        for a router; `key` turns dropout on. With a cache [L,B,T,G,K], `mask` says which of its T slots each query
        sees, in place of segments and prefix, and `index` where to write. `record` asks for `states`.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        k_embed, k_layers = split_key(key, 2)
        x = self.embed(tokens, dtype)
        if hasattr(self, "project_in"):
            x = self.project_in(x)
        if hasattr(self, "positions"):
            x = x + self.positions(positions, dtype)
        x = dropout(x, self.dropout, k_embed)
        context = Context(
            causal_mask(tokens.shape[1], segments, prefix) if mask is None else mask,
            tuple(rope(positions, self.head_dim) for rope in self.ropes),
            cache_index=index,
            valid=valid,
        )
        out = self.stack(self.blocks, x, context, key=k_layers, cache=cache, record=record)
        states = None if out.states is None else jnp.concatenate([x[None], out.states])
        hidden = self.norm(out.x) if hasattr(self, "norm") else out.x
        if hasattr(self, "project_out"):
            hidden = self.project_out(hidden)
        return Output(hidden, out.cache, out.router, states)

    def logits(self, x: jax.Array) -> jax.Array:
        """hidden [B,S,D] -> float32 [B,S,V]."""
        return self._words.logits(x, self.embed)

    def head_fn(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """(f, params) with f(params, hidden) = logits."""
        return head_fn(self._words, self.embed)

    @property
    def _words(self) -> Head:
        assert isinstance(self.head, Head), "a model for words"
        return self.head

    def labels(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """hidden [...,D] -> float32 [...,n]: the labels of a sequence that ends there or of a token, or start and end
        of a span."""
        assert isinstance(self.head, LinearHead), "a model for labels or spans"
        return self.head(x, key).astype(jnp.float32)


def task_head(model: Model, width: int, *, tied: bool, rngs: nnx.Rngs, init: Init, softcap: float | None = None) -> Any:
    """The head of a decoder for `model.task`; `width` is that of the embedding."""
    task = model.task
    if isinstance(task, LanguageModeling):
        return Head(model.vocab_size, width, rngs=rngs, init=init, tied=tied, softcap=softcap)
    if isinstance(task, Labels):
        each = not isinstance(task, SequenceClassification)  # as transformers has it: `score` of a sequence is bare
        rate = model.dropout if each else 0.0
        return LinearHead(
            width, task.n_labels, rngs=rngs, init=init, dropout=rate, bias=each, used="token" if each else "row"
        )
    if isinstance(task, QuestionAnswering):
        return LinearHead(width, 2, rngs=rngs, init=init, dropout=0.0)
    if isinstance(task, Body):
        return None
    raise UserError(
        f"model.task: expected LanguageModeling, SequenceClassification, TokenClassification "
        f"or QuestionAnswering for a decoder, got {type(task).__name__}"
    )
