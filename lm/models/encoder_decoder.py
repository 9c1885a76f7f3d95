"""The encoder-decoder Transformer of Vaswani et al. (2017), T5 and BART."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models.base import Model, Output
from lm.models.encoder import attended
from lm.models.tasks import Body, LanguageModeling, QuestionAnswering, SequenceClassification, TokenClassification
from lm.nn.block import AnyBlock, Context
from lm.nn.dropout import dropout, split_key
from lm.nn.embed import Embed, Head, head_fn, tie
from lm.nn.heads import DenseHead, LinearHead
from lm.nn.mask import Mask, full_mask
from lm.nn.param import Init, attach, place
from lm.nn.position import LearnedPositions, RelativeBias, Sinusoids
from lm.nn.stack import Stack, Stacked


class Side(nnx.Module):
    """The encoder or the decoder: positions, layers and norms, without the embedding, which both may share.

    embed_norm: after the positions are added (BART). bias: relative positions, added to the scores of every layer (T5).
    norm: after the last layer, where `final_dropout` follows it (T5).
    """

    def __init__(
        self,
        stack: Stack,
        layers: AnyBlock,
        *,
        positions: LearnedPositions | Sinusoids | None = None,
        embed_norm: nnx.Module | None = None,
        bias: RelativeBias | None = None,
        norm: nnx.Module | None = None,
        dropout: float = 0.0,
        final_dropout: float = 0.0,
    ):
        self.stack, self.layers = stack, layers
        attach(self, positions=positions, embed_norm=embed_norm, bias=bias, norm=norm)
        self.dropout, self.final_dropout = dropout, final_dropout

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: Any = None,
        record: bool = False,
    ) -> tuple[Stacked, jax.Array]:
        """Embedded tokens x [B,S,D], positions [B,S] -> (what the layers gave, hidden [B,S,D] after the norm)."""
        k_embed, k_layers, k_final = split_key(key, 3)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        if hasattr(self, "positions"):
            x = x + self.positions(positions, x.dtype)
        if hasattr(self, "embed_norm"):
            x = self.embed_norm(x)
        x = dropout(x, self.dropout, k_embed)
        if hasattr(self, "bias"):
            context = context._replace(bias=self.bias(context.mask.q_index, context.mask.kv_index))
        out = self.stack((self.layers,), x, context, key=k_layers, cache=cache, record=record)
        if out.states is not None:
            out = out._replace(states=jnp.concatenate([x[None], out.states]))
        hidden = self.norm(out.x) if hasattr(self, "norm") else out.x
        return out, dropout(hidden, self.final_dropout, k_final)


class EncoderDecoder(nnx.Module):
    """`embed` is shared by both sides, or the encoder's, with `target_embed` for the decoder's own vocabulary.

    head: of words, tied to the decoder's embedding or not. labeler: instead of it, of labels or spans. Without a
    decoder, `encode` is all there is (T5's labels of tokens).
    """

    decoder: Side
    head: Head
    labeler: LinearHead | DenseHead

    def __init__(
        self,
        embed: Embed,
        encoder: Side,
        decoder: Side | None,
        *,
        target_embed: Embed | None = None,
        head: Head | None = None,
        labeler: LinearHead | DenseHead | None = None,
    ):
        place(encoder, "memory")  # it runs over the inputs, whose number may be another
        tie(head, embed if target_embed is None else target_embed)
        self.embed, self.encoder = embed, encoder
        attach(self, decoder=decoder, target_embed=target_embed, head=head, labeler=labeler)

    def __call__(
        self,
        inputs: jax.Array,
        targets: jax.Array,
        *,
        dtype: DTypeLike,
        valid: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        target_valid: jax.Array | None = None,
        target_segments: jax.Array | None = None,
        target_positions: jax.Array | None = None,
        key: jax.Array | None = None,
        record: bool = False,
    ) -> Output:
        """inputs [B,S] and the decoder's inputs, targets shifted right [B,T] -> hidden [B,T,D] of the decoder.

        valid bool [B,S] (None: all): the inputs that are attended to, by both sides; target_valid bool [B,T]: the same
        of the decoder's own. segments [B,S] and target_segments [B,T] keep packed pairs apart: equal numbers attend.
        """
        k_encode, k_decode = split_key(key, 2)
        memory = self.encode(
            inputs, dtype=dtype, valid=valid, segments=segments, positions=positions, key=k_encode, record=record
        )
        out = self.decode(
            targets,
            memory.hidden,
            self.cross_mask(targets.shape, inputs, valid, segments, target_segments),
            dtype=dtype,
            valid=target_valid,
            segments=target_segments,
            positions=target_positions,
            key=k_decode,
            record=record,
        )
        return out._replace(memory=memory.hidden, memory_states=memory.states)

    def encode(
        self,
        inputs: jax.Array,
        *,
        dtype: DTypeLike,
        valid: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        record: bool = False,
    ) -> Output:
        """inputs [B,S] -> hidden [B,S,D] of the encoder."""
        s = inputs.shape[1]
        context = Context(full_mask(s, s, *attended(inputs, segments, valid)))
        out, hidden = self.encoder(self.embed(inputs, dtype), context, positions=positions, key=key, record=record)
        return Output(hidden, states=out.states)

    def cross_mask(
        self,
        shape: tuple[int, ...],
        inputs: jax.Array,
        valid: jax.Array | None = None,
        segments: jax.Array | None = None,
        target_segments: jax.Array | None = None,
    ) -> Mask:
        """The mask that says what of the inputs [B,S] decoder tokens of shape [B,T] see."""
        _, keys = attended(inputs, segments, valid)
        queries = target_segments
        if keys is not None and queries is None:
            queries = jnp.ones(shape, jnp.int32)
        return full_mask(shape[1], inputs.shape[1], queries, keys)

    def decode(
        self,
        targets: jax.Array,
        memory: jax.Array | None,
        cross_mask: Mask,
        *,
        dtype: DTypeLike,
        valid: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: Any = None,
        mask: Mask | None = None,
        index: jax.Array | None = None,
        record: bool = False,
    ) -> Output:
        """The decoder's inputs [B,T] over memory [B,S,D] -> hidden [B,T,D].

        With a cache, a `CrossCache` for each layer, memory is None, `mask` says which slots a query sees and
        `index` where to write.
        """
        if mask is None:
            queries, keys = attended(targets, segments, valid)
            index_in_row = jnp.arange(targets.shape[1])
            mask = Mask(index_in_row, index_in_row, queries, keys, causal=True, aligned=True)
        embed = self.target_embed if hasattr(self, "target_embed") else self.embed
        context = Context(mask, cache_index=index, memory=memory, cross_mask=cross_mask)
        out, hidden = self.decoder(
            embed(targets, dtype), context, positions=positions, key=key, cache=cache, record=record
        )
        return Output(hidden, out.cache, states=out.states)

    def logits(self, x: jax.Array) -> jax.Array:
        """hidden [B,T,D] -> float32 [B,T,V]."""
        return self.head.logits(x, self._output_embed)

    def head_fn(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """(f, params) with f(params, hidden) = logits."""
        return head_fn(self.head, self._output_embed)

    @property
    def _output_embed(self) -> Embed:
        return self.target_embed if hasattr(self, "target_embed") else self.embed

    def labels(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """hidden [..., D] -> float32 [..., n]: the labels of a text or of tokens, or starts and ends of spans."""
        return self.labeler(x, key).astype(jnp.float32)


def task_labeler(model: Model, *, rngs: nnx.Rngs, init: Init) -> LinearHead | DenseHead | None:
    """The labeler of an encoder-decoder for `model.task`: none where that is words, or none."""
    task = model.task
    if isinstance(task, LanguageModeling | Body):
        return None
    if isinstance(task, SequenceClassification):
        return DenseHead(model.d_model, task.n_labels, rngs=rngs, init=init, dropout=0.0)
    if isinstance(task, TokenClassification):
        # by the encoder alone
        return LinearHead(model.d_model, task.n_labels, rngs=rngs, init=init, dropout=0.0, used="memory")
    if isinstance(task, QuestionAnswering):
        return LinearHead(model.d_model, 2, rngs=rngs, init=init, dropout=0.0)
    raise UserError(
        "model.task: expected LanguageModeling, SequenceClassification, TokenClassification "
        "or QuestionAnswering for an encoder-decoder, got "
        f"{type(task).__name__}"
    )
