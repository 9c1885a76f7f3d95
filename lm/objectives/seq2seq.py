"""Translation and its like: source and target of a pair through an encoder and a decoder, many pairs a row.

A document of the store is a pair: source, separator (a newline), target. Every whole pair in a row of seq_len + 1
tokens is taken apart and packed into an encoder row and a decoder row, which number it alike. A pair that the end of a
row cuts is lost: of documents of d tokens about d / seq_len, so make rows long. Pairs without a separator or with an
empty side are lost too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models import Architecture
from lm.objectives.base import Loss, Objective, Predictions, Score
from lm.objectives.cross_entropy import cross_entropy


def shift_right(targets: jax.Array, start_id: int) -> jax.Array:
    """[B,T] -> what a decoder reads to predict them: start_id, then all but the last."""
    return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)


def decoder_loss(model: Any, predictions: Predictions, z_loss: float, label_smoothing: float, chunks: int) -> Loss:
    """The loss of a decoder's predictions."""
    head, params = model.head_fn()
    total, nll = cross_entropy(head, params, *predictions, z_loss, label_smoothing, chunks)
    return Loss(total, nll, jnp.sum(predictions.weights))


def restored(
    objective: Objective, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None
) -> Predictions:
    """Predicts "targets" [B,T] from what is left of them in "inputs" [B,S], one text a row, with padding at its end."""
    inputs, targets = batch["inputs"], batch["targets"]
    targets_in = shift_right(targets, objective.decoder_start_id)
    hidden = model(inputs, targets_in, dtype=dtype, valid=inputs != objective.pad_id, key=key).hidden
    return Predictions(hidden, targets, real(targets, objective.pad_id))


def real(targets: jax.Array, pad_id: int) -> jax.Array:
    """float32 [B,T]: 0 for padding, which does not count."""
    return (targets != pad_id).astype(jnp.float32)


class Places(NamedTuple):
    """Where packed sequences stand, [B,S] int32: the number of each, 1 and up, 0 on padding, and the place within
    it."""

    segments: jax.Array
    positions: jax.Array


def places(tokens: jax.Array, eos_id: int, pad_id: int) -> Places:
    """Finds where sequences stand in tokens [B,S]: each ends with eos, and padding follows the last."""
    ends, real = tokens == eos_id, tokens != pad_id
    before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    opens = jax.lax.cummax(jnp.where(jnp.pad(ends[:, :-1], ((0, 0), (1, 0))), index, 0), axis=1)
    return Places(jnp.where(real, before + 1, 0), jnp.where(real, index - opens, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(Objective):
    """Source and target each end with eos (`start_id`); the decoder reads `decoder_start_id` and the target.

    max_source, max_target: slots of the encoder and decoder row. Pairs fill them in order, and one that no longer fits
        either is left out: with both at seq_len - 1 none is, about half of that costs little.
    separator_id: the token between source and target; its first one in a document counts.
    decoder_start_id: padding in T5 and Marian.
    label_smoothing: 0.1 in Vaswani et al., 2017, 5.4.
    chunks: see `cross_entropy`; divides max_target.
    """

    family: ClassVar[Architecture] = "encoder_decoder"
    token_kinds: ClassVar = dict(Objective.token_kinds) | {"separator_id": "any", "decoder_start_id": "any"}

    max_source: int
    max_target: int
    separator_id: int = 3
    decoder_start_id: int = 0
    label_smoothing: float = 0.1
    z_loss: float = 0.0
    chunks: int = 1

    def __post_init__(self):
        for name in ("max_source", "max_target"):
            if getattr(self, name) < 2:
                raise UserError(f"objective.{name}: expected at least 2, a token and eos, got {getattr(self, name)}")
        if min(self.separator_id, self.decoder_start_id) < 0:
            raise UserError(
                "objective.separator_id, objective.decoder_start_id: expected ids of 0 and more, got "
                f"{self.separator_id}, {self.decoder_start_id}"
            )
        if self.separator_id in (self.pad_id, self.start_id):
            raise UserError(
                f"objective.separator_id: expected a token of text, got {self.separator_id}, which is padding or eos; "
                "the tokenizer's newline is 3"
            )
        if self.chunks < 1 or self.max_target % self.chunks:
            raise UserError(f"objective.chunks: {self.chunks} does not divide objective.max_target {self.max_target}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"objective.label_smoothing: expected a rate in [0, 1), got {self.label_smoothing}")
        if self.z_loss < 0.0:
            raise UserError(f"objective.z_loss: expected 0 or more, got {self.z_loss}")

    def longest(self, seq_len: int) -> int:
        return max(self.max_source, self.max_target)

    def check(self, seq_len: int) -> None:
        if seq_len < 4:
            raise UserError(
                f"data.seq_len: expected at least 4, for a pair of one token each between two eos, got {seq_len}"
            )

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """inputs [B,max_source] and targets [B,max_target]: the rest follows from where they have eos."""
        return {
            "inputs": jax.ShapeDtypeStruct((batch_size, self.max_source), jnp.int32),
            "targets": jax.ShapeDtypeStruct((batch_size, self.max_target), jnp.int32),
        }

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = rows["tokens"]
        n, width = tokens.shape
        row, at = np.nonzero(tokens == self.start_id)
        whole = row[1:] == row[:-1]  # between two eos of one row: cut by no end of it
        row, begin, end = row[:-1][whole], at[:-1][whole] + 1, at[1:][whole]
        index = np.where(tokens == self.separator_id, np.arange(width), width)
        cut = np.minimum.accumulate(index[:, ::-1], axis=1)[:, ::-1][row, begin]  # the first separator from there on
        pairs = (begin < cut) & (cut + 1 < end)
        row, begin, cut, end = row[pairs], begin[pairs], cut[pairs], end[pairs]
        kept, source_at, target_at = self._pack(row, cut - begin + 1, end - cut, n)
        row, begin, cut, end = row[kept], begin[kept], cut[kept], end[kept]
        inputs = np.full((n, self.max_source), self.pad_id, np.int32)
        targets = np.full((n, self.max_target), self.pad_id, np.int32)
        self._copy(tokens, inputs, row, begin, cut - begin, source_at[kept])
        self._copy(tokens, targets, row, cut + 1, end - cut - 1, target_at[kept])
        return {"inputs": inputs, "targets": targets}

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        predictions = self.predictions(model, batch, dtype=dtype, key=key)
        return decoder_loss(model, predictions, self.z_loss, self.label_smoothing, self.chunks)

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        """Scores the targets, given their sources."""
        predictions = self.predictions(model, batch, dtype=dtype, key=None)
        n_bytes = jnp.where(predictions.weights > 0, token_bytes[predictions.targets], 0)
        return predictions.score(model, n_bytes, self.chunks)

    def predictions(
        self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None
    ) -> Predictions:
        """Predicts every target of every pair."""
        inputs, targets = batch["inputs"], batch["targets"]
        source, target = (places(tokens, self.start_id, self.pad_id) for tokens in (inputs, targets))
        opens = (target.positions == 0) & (target.segments > 0)
        hidden = model(
            inputs,
            # A target never reads the eos of the pair before it.
            jnp.where(opens, self.decoder_start_id, shift_right(targets, self.pad_id)),
            dtype=dtype,
            valid=source.segments > 0,
            segments=source.segments,
            positions=source.positions,
            target_segments=target.segments,
            target_positions=target.positions,
            key=key,
        ).hidden
        return Predictions(hidden, targets, real(targets, self.pad_id))

    def _pack(self, row, n_source, n_target, n):
        """Says which pairs [p] fit, and where each begins in its rows. A step of the loop is the k-th pair of every
        row."""
        kept, source_at, target_at = np.zeros(len(row), bool), np.zeros_like(row), np.zeros_like(row)
        used_source, used_target = np.zeros(n, np.int64), np.zeros(n, np.int64)
        ordinal = np.arange(len(row)) - np.searchsorted(row, row)
        for k in range(ordinal.max(initial=-1) + 1):
            p = np.flatnonzero(ordinal == k)
            s, t = used_source[row[p]] + n_source[p], used_target[row[p]] + n_target[p]
            fits = (s <= self.max_source) & (t <= self.max_target)
            p, s, t = p[fits], s[fits], t[fits]
            kept[p], source_at[p], target_at[p] = True, used_source[row[p]], used_target[row[p]]
            used_source[row[p]], used_target[row[p]] = s, t
        return kept, source_at, target_at

    def _copy(self, tokens, out, row, begin, length, at):
        """Copies tokens[row, begin : begin + length] and an eos to out[row, at:], for every piece [p]."""
        piece = np.repeat(np.arange(len(row)), length)
        within = np.arange(len(piece)) - (np.cumsum(length) - length)[piece]
        out[row[piece], at[piece] + within] = tokens[row[piece], begin[piece] + within]
        out[row, at + length] = self.start_id
