"""T5's span corruption: spans of a row are replaced by sentinels, and the decoder writes them out.

A row is text [a b c d e f g h]; corrupted, inputs [a b <0> e f g <1> eos], targets [<0> c d <1> h eos]. Every row has
the same number of noise tokens and spans, so both lengths follow from that of the row: nothing is cut or padded.

data.seq_len is the number of tokens of text in a row, all of which are used (the store's row has one more, the first
of the next row). The encoder and decoder see the lengths of `SpanCorruption.lengths`; `raw_length` is the way back.
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
from lm.objectives import noise
from lm.objectives.base import Loss, Objective, Score, SpecialToken
from lm.objectives.seq2seq import decoder_loss, restored


class Lengths(NamedTuple):
    """What becomes of a row of text, in tokens; inputs and targets include sentinels and eos."""

    noise: int
    spans: int
    inputs: int
    targets: int


def with_sentinels(tokens: tuple[SpecialToken, ...], n: int) -> tuple[SpecialToken, ...]:
    """The tokens of an objective, of which `first_sentinel_id` stands for n, by T5's names for them."""
    many = lambda t: t._replace(ids=range(t.ids[0] - n + 1, t.ids[0] + 1), numbered="extra_id")
    return tuple(many(t) if t.name == "first_sentinel_id" else t for t in tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(Objective):
    """Raffel et al., 2020, 3.1.4, as in the T5 code (`random_spans_noise_mask`): noise and text are each cut into as
    many pieces, all ways equally likely, and take turns, text first. The decoder starts with `pad_id`, and eos is
    `start_id`. The ends of documents within a row are tokens as any other.

    noise_density: share of the tokens that the decoder writes.
    mean_span: their number by that of spans.
    first_sentinel_id: sentinel i is first_sentinel_id - i, i < n_sentinels (T5's <extra_id_0> is the last of 100).
    chunks: see `cross_entropy`; divides the length of the targets.
    """

    family: ClassVar[Architecture] = "encoder_decoder"

    first_sentinel_id: int
    n_sentinels: int = 100
    noise_density: float = 0.15
    mean_span: float = 3.0
    noise_seed: int = 0
    z_loss: float = 0.0
    chunks: int = 1

    def __post_init__(self):
        if not 0.0 < self.noise_density < 1.0:
            raise UserError(f"objective.noise_density: expected a share between 0 and 1, got {self.noise_density}")
        if self.mean_span < 1.0:
            raise UserError(f"objective.mean_span: expected at least 1 token, got {self.mean_span}")
        if self.n_sentinels < 1:
            raise UserError(f"objective.n_sentinels: expected at least 1, got {self.n_sentinels}")
        if self._last_sentinel_id <= max(self.pad_id, self.start_id):
            raise UserError(
                f"objective.first_sentinel_id: expected one above the specials {self.pad_id} and {self.start_id} with "
                f"the {self.n_sentinels} sentinels that count down from it, got {self.first_sentinel_id} down to "
                f"{self._last_sentinel_id}; set the tokenizer's size + n_sentinels - 1"
            )
        if self.chunks < 1:
            raise UserError(f"objective.chunks: expected at least 1, got {self.chunks}")
        if self.z_loss < 0.0:
            raise UserError(f"objective.z_loss: expected 0 or more, got {self.z_loss}")

    def special_tokens(self) -> tuple[SpecialToken, ...]:
        return with_sentinels(super().special_tokens(), self.n_sentinels)

    @property
    def _last_sentinel_id(self) -> int:
        return self.first_sentinel_id - self.n_sentinels + 1

    def lengths(self, n_tokens: int) -> Lengths:
        """The lengths for n_tokens >= 2 of text: fewer spans than T5 says where one would have no text before it."""
        n_noise = min(max(round(n_tokens * self.noise_density), 1), n_tokens - 1)
        spans = min(max(round(n_noise / self.mean_span), 1), n_tokens - n_noise)
        return Lengths(n_noise, spans, n_tokens - n_noise + spans + 1, n_noise + spans + 1)

    def raw_length(self, n_inputs: int) -> int:
        """The most text that fits n_inputs >= 3 slots of the encoder: 568 for 512 with T5's numbers, which makes 114
        targets (`random_spans_helper` of the T5 code)."""
        if n_inputs < 3:
            raise UserError(f"n_inputs: expected at least 3, for a token, a sentinel and eos, got {n_inputs}")
        n = n_inputs - 1  # spans are no more than noise, so inputs are at most one more than the text
        while self.lengths(n + 1).inputs <= n_inputs:
            n += 1
        return n

    @property
    def decoder_start_id(self) -> int:
        return self.pad_id

    def longest(self, seq_len: int) -> int:
        lengths = self.lengths(seq_len)
        return max(lengths.inputs, lengths.targets)

    def check(self, seq_len: int) -> None:
        if seq_len < 2:
            raise UserError(f"data.seq_len: expected at least 2, to keep one token and corrupt one, got {seq_len}")
        lengths = self.lengths(seq_len)
        if lengths.spans > self.n_sentinels:
            raise UserError(
                f"objective.n_sentinels: expected at least {lengths.spans}, one for each span of data.seq_len "
                f"{seq_len}, got {self.n_sentinels}; raise it, or mean_span"
            )
        if lengths.targets % self.chunks:
            raise UserError(
                f"objective.chunks: {self.chunks} does not divide the {lengths.targets} targets of data.seq_len "
                f"{seq_len}"
            )

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """inputs and targets, of `lengths(seq_len)`; padding only where the store's row has it."""
        lengths = self.lengths(seq_len)
        return {
            "inputs": jax.ShapeDtypeStruct((batch_size, lengths.inputs), jnp.int32),
            "targets": jax.ShapeDtypeStruct((batch_size, lengths.targets), jnp.int32),
        }

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        text, ids = noise.closed(rows["tokens"][:, :-1], self.pad_id, self.start_id), rows["id"]
        most = self.lengths(text.shape[1])
        inputs = np.full((len(text), most.inputs), self.pad_id, np.int32)
        targets = np.full((len(text), most.targets), self.pad_id, np.int32)
        for length, which in noise.by_length(text, self.pad_id):
            if length >= 2:
                own = self.lengths(length)
                inputs[which, : own.inputs], targets[which, : own.targets] = self._corrupt(
                    text[which, :length], ids[which], own
                )
        return {"inputs": inputs, "targets": targets}

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        return decoder_loss(model, restored(self, model, batch, dtype=dtype, key=key), self.z_loss, 0.0, self.chunks)

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        """Scores the targets, sentinels and eos included, which stand for no bytes."""
        predictions = restored(self, model, batch, dtype=dtype, key=None)
        targets = batch["targets"]
        is_sentinel = (targets <= self.first_sentinel_id) & (targets >= self._last_sentinel_id)
        n_bytes = jnp.where(is_sentinel | (targets == self.pad_id), 0, token_bytes[targets])
        return predictions.score(model, n_bytes, self.chunks)

    def _corrupt(self, text: np.ndarray, ids: np.ndarray, lengths: Lengths) -> tuple[np.ndarray, np.ndarray]:
        """[n,L] without padding -> inputs, targets."""
        n, length = text.shape
        keys = noise.draw(self.noise_seed, "span_corruption", ids, length - 2)  # n - 1 for each composition of n
        n_kept = length - lengths.noise
        kept = np.cumsum(noise.composition(keys[:, : n_kept - 1], lengths.spans), axis=1)
        lost = np.cumsum(noise.composition(keys[:, n_kept - 1 :], lengths.spans), axis=1)
        is_noise = np.zeros((n, length), np.int8)  # 1 where noise begins, -1 where it ends, then their sums
        np.put_along_axis(is_noise, kept[:, 1:] + lost[:, :-1], 1, axis=1)
        np.put_along_axis(is_noise, kept[:, :1], 1, axis=1)
        np.put_along_axis(is_noise, kept[:, :-1] + lost[:, :-1], -1, axis=1)
        is_noise = np.cumsum(is_noise, axis=1, dtype=np.int8).astype(bool)
        span = np.arange(lengths.spans)
        inputs = self._with_sentinels(text[~is_noise].reshape(n, -1), kept + span)
        first = np.zeros((n, 1), np.int64)
        targets = self._with_sentinels(text[is_noise].reshape(n, -1), np.hstack([first, lost[:, :-1]]) + span)
        return inputs, targets

    def _with_sentinels(self, text: np.ndarray, at: np.ndarray) -> np.ndarray:
        """text [n,t], with sentinel i at slot at[:, i] and eos at the end."""
        n, spans = at.shape
        out = np.full((n, text.shape[1] + spans + 1), self.start_id, np.int32)
        is_text = np.ones(out.shape, bool)
        np.put_along_axis(is_text, at, False, axis=1)
        is_text[:, -1] = False
        out[is_text] = text.reshape(-1)
        np.put_along_axis(
            out, at, np.broadcast_to(self.first_sentinel_id - np.arange(spans, dtype=np.int32), at.shape), axis=1
        )
        return out
