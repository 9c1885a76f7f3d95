"""BART's denoising: the encoder reads a row with its sentences permuted and spans of it masked, the decoder writes the
row as it was.

The inputs are at most as long as the text and padded to data.seq_len; the targets are the first data.seq_len tokens of
the store's row. Token deletion and document rotation, which BART tried and left, are not here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models import Architecture
from lm.objectives import noise
from lm.objectives.base import Loss, Objective, Score
from lm.objectives.seq2seq import decoder_loss, restored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """Text infilling and sentence permutation (Lewis et al., 2020, 2.2). The decoder starts with eos (`start_id`).

    mask_id: an id that the tokenizer never makes of text; it stands for a whole span.
    rate: share of the tokens that are in spans, exact to rounding.
    mean_span: of the Poisson lengths; a span of 0 tokens inserts a mask. The last is cut to meet the rate. Spans fall
        anywhere between and over the tokens, all ways equally likely; the ends of documents are tokens as any other.
    permute: shuffle the sentences of each document; a sentence ends with a newline.
    chunks: see `cross_entropy`; divides data.seq_len.
    """

    family: ClassVar[Architecture] = "encoder_decoder"
    token_kinds: ClassVar = dict(Objective.token_kinds) | {"newline_id": "any"}

    mask_id: int
    rate: float = 0.3  # both as BART (2.2)
    mean_span: float = 3.0
    permute: bool = True
    newline_id: int = 3
    noise_seed: int = 0
    z_loss: float = 0.0
    chunks: int = 1

    def __post_init__(self):
        if self.mask_id < 0 or self.mask_id in (self.pad_id, self.start_id):
            raise UserError(
                f"objective.mask_id: expected an id of its own beside {self.pad_id} and {self.start_id}, got "
                f"{self.mask_id}; set the tokenizer's size and make model.vocab_size larger than that"
            )
        if not 0.0 < self.rate < 1.0:
            raise UserError(f"objective.rate: expected a share between 0 and 1, got {self.rate}; BART has 0.3")
        if not 0.0 < self.mean_span <= 100.0:
            raise UserError(f"objective.mean_span: expected more than 0 and at most 100 tokens, got {self.mean_span}")
        if self.chunks < 1:
            raise UserError(f"objective.chunks: expected at least 1, got {self.chunks}")
        if self.z_loss < 0.0:
            raise UserError(f"objective.z_loss: expected 0 or more, got {self.z_loss}")

    def n_masked(self, n_tokens: int) -> int:
        """Counts the tokens in spans, of n_tokens >= 1 of text."""
        return max(round(self.rate * n_tokens), 1)

    @property
    def decoder_start_id(self) -> int:
        return self.start_id

    def check(self, seq_len: int) -> None:
        if seq_len < 2:
            raise UserError(f"data.seq_len: expected at least 2, to keep one token and mask one, got {seq_len}")
        if seq_len % self.chunks:
            raise UserError(f"objective.chunks: {self.chunks} does not divide data.seq_len {seq_len}")

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """inputs and targets, [B,S]."""
        row = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
        return {"inputs": row, "targets": row}

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        text, ids = noise.closed(rows["tokens"][:, :-1], self.pad_id, self.start_id), rows["id"]
        inputs = np.full(text.shape, self.pad_id, np.int32)
        for length, which in noise.by_length(text, self.pad_id):
            if length:
                own = self._permuted(text[which, :length], ids[which]) if self.permute else text[which, :length]
                inputs[which, :length] = self._infilled(own, ids[which])
        return {"inputs": inputs, "targets": text.astype(np.int32)}

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        return decoder_loss(model, restored(self, model, batch, dtype=dtype, key=key), self.z_loss, 0.0, self.chunks)

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        """Scores the whole row, the tokens that the encoder sees included."""
        predictions = restored(self, model, batch, dtype=dtype, key=None)
        targets = batch["targets"]
        n_bytes = jnp.where(targets != self.pad_id, token_bytes[targets], 0)
        return predictions.score(model, n_bytes, self.chunks)

    def _permuted(self, text: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The tokens of a row, sorted by document, then by a random number of their sentence, then by place."""
        length = text.shape[1]
        bits = np.uint64(length.bit_length())
        place = np.arange(length, dtype=np.uint64)
        ends_document = text == self.start_id
        opens = np.empty(text.shape, bool)
        opens[:, 0] = True
        opens[:, 1:] = ends_document[:, :-1] | (text[:, :-1] == self.newline_id)
        opens |= ends_document
        sentence = np.maximum.accumulate(np.where(opens, np.arange(length), 0), axis=1)
        keys = np.take_along_axis(noise.draw(self.noise_seed, "denoising/permute", ids, length), sentence, axis=1)
        keys[ends_document] = noise.MAX  # stays the last of its document
        document = (np.cumsum(ends_document, axis=1) - ends_document).astype(np.uint64)
        # Three keys in one number, so that one sort does.
        keys = (document << (np.uint64(64) - bits)) | (keys >> (bits + bits) << bits) | place
        keys.sort(axis=1)
        return np.take_along_axis(text, (keys & np.uint64((1 << int(bits)) - 1)).astype(np.int64), axis=1)

    def _infilled(self, text: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """[n,L] without padding -> [n,L], padded where spans were longer than their masks."""
        n, length = text.shape
        spans = self._spans(length, ids)
        n_masked, n_spans = self.n_masked(length), (spans >= 0).sum(axis=1)
        n_slots = length - n_masked + n_spans
        slots = np.arange(length) < n_slots[:, None]
        keys = noise.draw(self.noise_seed, "denoising/place", ids, length)
        at = noise.choose(keys, n_spans, n_masked, slots)
        stands_for = np.zeros((n, length + 1), np.int64)  # how many tokens a slot does; the last takes what is no span
        stands_for[:, :-1] = slots
        np.put_along_axis(stands_for, at, spans, axis=1)
        is_mask = np.zeros((n, length + 1), bool)
        np.put_along_axis(is_mask, at, True, axis=1)
        stands_for, is_mask = stands_for[:, :-1], is_mask[:, :-1]
        lost = np.repeat(is_mask.reshape(-1), stands_for.reshape(-1)).reshape(n, length)
        out = np.full((n, length), self.pad_id, np.int32)
        out[is_mask] = self.mask_id
        out[slots & ~is_mask] = text[~lost]
        return out

    def _spans(self, length: int, ids: np.ndarray) -> np.ndarray:
        """[n,n_masked]: lengths of spans that add to n_masked, drawn until they do; then -1.

        They are no more than the tokens they stand for, so that the inputs are never longer than the text: where chance
        would have it otherwise, the last takes the rest.
        """
        n_masked = self.n_masked(length)
        u = noise.uniform(noise.draw(self.noise_seed, "denoising/span", ids, n_masked))
        spans = np.searchsorted(_poisson(self.mean_span), u, side="right")
        before = np.cumsum(spans, axis=1) - spans
        spans[:, -1] = n_masked  # whatever was drawn: the sum must reach it
        return np.where(before < n_masked, np.minimum(spans, n_masked - before), -1)


def _poisson(mean: float) -> np.ndarray:
    """P(X <= k) for k = 0, 1, ..., as far as a float64 tells it from 1."""
    p = [math.exp(-mean)]
    while len(p) <= mean or p[-1] > 2.0**-60:
        p.append(p[-1] * mean / len(p))
    return np.minimum(np.cumsum(p), 1.0)
