"""Masked-token prediction for encoders, with sentence order or the next sentence if wanted.

A row of the store becomes [CLS] text [SEP] with the first seq_len - 2 of its seq_len + 1 tokens (3 fewer are text with
a pair: [CLS] A [SEP] B [SEP]); documents in it stay apart by their eos, as RoBERTa's full sentences do (Liu et al.,
2019). The masks are drawn anew each epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models import Architecture, LanguageModeling, MaskedLMAndPair, Task
from lm.objectives import noise, pairs
from lm.objectives.base import Loss, Objective, Predictions, Score
from lm.objectives.cross_entropy import cross_entropy
from lm.objectives.words import Spelling, whole, words_of
from lm.objectives.words import WordBoundaries as WordTable
from lm.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Objective):
    """BERT's masked language model (Devlin et al., 2019), static in shape: P = ceil(rate * seq_len) predictions a row.

    Of the n tokens of a row that are no specials, round(rate * n) are predicted (at least 1), chosen uniformly. Each
    is shown as the mask (`mask_share`), as a random token (`random_share`), or as it is.

    mask_id, cls_id, sep_id: ids that the tokenizer never makes of text; sep_id may be start_id.
    vocab_size: of the tokenizer; a random token is below it and none of the specials.
    span: predict n-grams of 1 to `span` tokens, P(n) ~ 1/n (ALBERT: Lan et al., 2020, eq. 2); the last may be cut.
    whole_word: predict all tokens of a word or none (n-grams are then of words), by `lm.objectives.words`. The number
        above is then the most: a last word that would not fit is left out, but for one longer than it on its own.
    pair: "sop" cuts the text after the newline or eos nearest its middle, swaps the parts of every other row and asks
        for their order, 0: as written, 1: swapped (ALBERT, 3.1). Its loss has the weight of the row's predictions, so
        that dividing by the number of targets gives mean + mean. "nsp" asks whether the second part is the row's own,
        0, or from elsewhere in the corpus, 1 (Devlin et al., 2019, 3.1); see `lm.objectives.pairs` for the cuts.
    newline_id: ends a sentence.
    chunks: see `cross_entropy`; divides P.
    """

    family: ClassVar[Architecture] = "encoder"
    token_kinds: ClassVar = dict(Objective.token_kinds) | {"newline_id": "any"}

    mask_id: int
    cls_id: int
    sep_id: int
    vocab_size: int
    rate: float = 0.15
    mask_share: float = 0.8  # BERT: of 100 tokens 80 masks, 10 random, 10 as they are
    random_share: float = 0.1
    span: int = 1
    whole_word: bool = False
    pair: Literal["none", "sop", "nsp"] = "none"
    newline_id: int = 3
    noise_seed: int = 0
    z_loss: float = 0.0
    chunks: int = 1

    def __post_init__(self):
        ids = self.pad_id, self.start_id, self.mask_id, self.cls_id, self.sep_id
        if len(self._specials) < len(ids) - (self.start_id == self.sep_id) or min(ids) < 0:
            raise UserError(
                "objective: expected different ids of 0 and more for pad_id, start_id, mask_id, cls_id and sep_id, "
                f"of which start_id may be sep_id, got {', '.join(map(str, ids))}; add tokens to model.vocab_size for "
                "those the tokenizer lacks"
            )
        if self._n_random < 1:
            raise UserError(
                f"objective.vocab_size: expected ids that are no specials below it, got {self.vocab_size}; set the "
                "tokenizer's size"
            )
        if not 0.0 < self.rate < 1.0:
            raise UserError(f"objective.rate: expected a share between 0 and 1, got {self.rate}; BERT has 0.15")
        shares = (self.mask_share, self.random_share)
        if min(shares) < 0.0 or sum(shares) > 1.0 + 1e-9:  # shares that make 1 may add up to a bit more in floats
            raise UserError(
                f"objective.mask_share, objective.random_share: expected shares with a sum of at most 1, got {shares}"
            )
        if self.span < 1:
            raise UserError(f"objective.span: expected at least 1, got {self.span}")
        if self.chunks < 1:
            raise UserError(f"objective.chunks: expected at least 1, got {self.chunks}")
        if self.z_loss < 0.0:
            raise UserError(f"objective.z_loss: expected 0 or more, got {self.z_loss}")

    @property
    def _specials(self) -> tuple[int, ...]:
        """Lists the specials once each, padding first: BERT and RoBERTa end a document with the separator."""
        return tuple(dict.fromkeys((self.pad_id, self.start_id, self.mask_id, self.cls_id, self.sep_id)))

    @property
    def _n_random(self) -> int:
        return self.vocab_size - sum(s < self.vocab_size for s in self._specials)

    def n_predictions(self, seq_len: int) -> int:
        """P, the places in a row that the head is computed for."""
        return math.ceil(self.rate * seq_len)

    @property
    def tasks(self) -> tuple[type[Task], ...]:
        return (MaskedLMAndPair,) if self.pair != "none" else (LanguageModeling, MaskedLMAndPair)

    def check(self, seq_len: int) -> None:
        needed = 3 if self.pair == "none" else 5
        if seq_len < needed:
            raise UserError(
                f"data.seq_len: expected at least {needed} with objective.pair={self.pair!r}, for the specials and "
                f"text, got {seq_len}"
            )
        if self.n_predictions(seq_len) % self.chunks:
            raise UserError(
                f"objective.chunks: {self.chunks} does not divide the {self.n_predictions(seq_len)} predictions of "
                f"rate {self.rate} at data.seq_len {seq_len}"
            )

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """tokens [B,S]; positions, targets [B,P] and weights [B,P] float32, 0.0 where a row has fewer predictions; with
        a pair, token_types [B,S] and pair [B], -1 where there is none."""
        tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
        picks = jax.ShapeDtypeStruct((batch_size, self.n_predictions(seq_len)), jnp.int32)
        weights = jax.ShapeDtypeStruct(picks.shape, jnp.float32)
        out = {"tokens": tokens, "positions": picks, "targets": picks, "weights": weights}
        if self.pair != "none":
            out |= {"token_types": tokens, "pair": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
        return out

    @property
    def extra_rows(self) -> int:
        return int(self.pair == "nsp")

    def examples_for(self, tokenizer: Spelling) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        return functools.partial(self.examples, words=words_of(tokenizer)) if self.whole_word else self.examples

    def examples(self, rows: dict[str, np.ndarray], words: WordTable | None = None) -> dict[str, np.ndarray]:
        """Masks rows. words: those of the tokenizer, which `whole_word` needs and `examples_for` gives."""
        tokens, ids = noise.closed(rows["tokens"], self.pad_id, self.start_id), rows["id"]
        if self.whole_word and words is None:
            raise UserError(
                "objective.whole_word: expected the words of a tokenizer, got none; take "
                "objective.examples_for(tokenizer) for objective.examples"
            )
        if self.pair == "none":
            return self._mask(self._single(tokens), ids, words)
        if self.pair == "nsp" and "other" not in rows:
            raise UserError(
                "objective.pair: 'nsp' expected rows from elsewhere as \"other\", got none; make the loader with "
                "extra_rows=objective.extra_rows"
            )
        bit = noise.draw(self.noise_seed, "masked_lm/pair", ids, 1)[:, 0] >> np.uint64(63) == 1
        make = pairs.Pairs(self.cls_id, self.sep_id, self.newline_id, self.start_id, self.pad_id)
        if self.pair == "sop":
            tokens, pair = make.order(tokens, bit)
        else:
            tokens, pair = make.next(tokens, noise.closed(rows["other"], self.pad_id, self.start_id), bit)
        return self._mask(tokens, ids, words) | pair

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        predictions, hidden = self.predictions(model, batch, dtype=dtype, key=key)
        weights = predictions.weights
        head, params = model.head_fn()
        total, nll = cross_entropy(head, params, *predictions, self.z_loss, 0.0, self.chunks)
        if self.pair != "none":
            log_p = jax.nn.log_softmax(model.pair_logits(hidden))
            label = batch["pair"]
            of_label = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None], axis=1)[:, 0]
            total -= jnp.sum(jnp.where(label != pairs.NO_PAIR, of_label, 0.0) * jnp.sum(weights, axis=1))
        return Loss(total, nll, jnp.sum(weights))

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        """Scores the masked tokens alone: their nll (a pseudo-likelihood) and bytes."""
        predictions, _ = self.predictions(model, batch, dtype=dtype, key=None)
        n_bytes = jnp.where(predictions.weights > 0, token_bytes[predictions.targets], 0)
        return predictions.score(model, n_bytes, self.chunks)

    def predictions(
        self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None
    ) -> tuple[Predictions, jax.Array]:
        """Predicts the masked tokens; returns the hidden states [B,S,D] of all too."""
        tokens = batch["tokens"]
        hidden = model(
            tokens, dtype=dtype, token_types=batch.get("token_types"), valid=tokens != self.pad_id, key=key
        ).hidden
        # P places need not divide over the mesh axis of the sequence.
        x = constrain(jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1), "act_batch", None, None)
        return Predictions(x, batch["targets"], batch["weights"]), hidden

    def _single(self, tokens: np.ndarray) -> np.ndarray:
        """[n,S+1] -> [CLS] text [SEP] padding, [n,S]."""
        n, seq_len = tokens.shape[0], tokens.shape[1] - 1
        out = np.full((n, seq_len), self.pad_id, np.int32)
        out[:, 0] = self.cls_id
        out[:, 1:-1] = tokens[:, : seq_len - 2]
        for length, which in noise.by_length(tokens[:, : seq_len - 2], self.pad_id):
            out[which, length + 1] = self.sep_id
        return out

    def _mask(self, tokens: np.ndarray, ids: np.ndarray, words: WordTable | None) -> dict[str, np.ndarray]:
        eligible = tokens != self.pad_id
        for special in self._specials[1:]:
            eligible &= tokens != special
        n_eligible = eligible.sum(axis=1)
        # Halves go up; np.round would take them to even numbers.
        count = np.where(n_eligible, np.maximum(np.floor(self.rate * n_eligible + 0.5).astype(np.int64), 1), 0)
        keys = noise.draw(self.noise_seed, "masked_lm/choose", ids, tokens.shape[1])
        starts = None if words is None else words.starts(tokens, eligible)
        if self.span > 1 or starts is not None:
            keys = np.take_along_axis(keys, self._openings(eligible, ids, starts), axis=1)
        places = noise.choose(keys, count, self.n_predictions(tokens.shape[1]), eligible)
        if starts is not None:
            places = whole(places, starts)
        picked = places < tokens.shape[1]
        places[~picked] = 0  # a place to read from; its weight is 0
        real = np.take_along_axis(tokens, places, axis=1)
        bits = noise.draw_at(self.noise_seed, "masked_lm/show", ids, places)
        u = noise.uniform(bits)
        # From other bits than `u`: see `noise.below`.
        shown = np.where(u < self.mask_share + self.random_share, self._random(bits), real)
        shown[u < self.mask_share] = self.mask_id
        np.put_along_axis(tokens, places, np.where(picked, shown, real), axis=1)
        return {
            "tokens": tokens,
            "positions": places.astype(np.int32),
            "targets": np.where(picked, real, self.pad_id),
            "weights": picked.astype(np.float32),
        }

    def _random(self, bits: np.ndarray) -> np.ndarray:
        token = noise.below(bits, self._n_random).astype(np.int32)
        for special in sorted(self._specials):
            token += token >= special  # steps over the specials, lowest first: nothing is drawn again
        return token

    def _openings(self, eligible: np.ndarray, ids: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
        """[n,S] int64: the place where the n-gram of each token opens, of tokens or of words, which begin at `starts`.
        N-grams tile the row and end at specials: to choose among them leaves each token equally likely."""
        n, seq_len = eligible.shape
        share = np.cumsum(1.0 / np.arange(1, self.span + 1))
        share /= share[-1]
        u = noise.uniform(noise.draw(self.noise_seed, "masked_lm/span", ids, seq_len))
        lengths = np.ones(u.shape, np.int64)
        for above in share[:-1]:
            lengths += u >= above
        ends = np.cumsum(lengths, axis=1)
        opens = np.zeros((n, seq_len + 1), bool)
        opens[:, 0] = True
        np.put_along_axis(opens, np.minimum(ends, seq_len), True, axis=1)
        opens = opens[:, :-1]
        if starts is not None:  # the tiles counted words
            opens = starts & np.take_along_axis(opens, np.cumsum(starts, axis=1) - 1, axis=1)
        opens[:, 1:] |= ~eligible[:, :-1]
        return np.maximum.accumulate(np.where(opens, np.arange(seq_len), 0), axis=1)
