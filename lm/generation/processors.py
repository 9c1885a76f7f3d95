"""The settings of a search, and the score processors they switch on, in the order of `transformers` 5.23.

The settings are static: a processor that is off is not in the compiled program. What only sampling uses (temperature,
top-k, ...) is in `lm.generation.sampling`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.generation.sampling import repetition_penalty

Words = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Greedy search (num_beams=1) or beam search, under the names and with the meaning of `transformers.generate`.

    length_penalty: a finished beam scores its sum of log-probabilities / generated tokens ** length_penalty.
    early_stopping: when a prompt is done. True: it has num_beams finished beams; False: these also beat the best open
        beam at its present length; "never": at its greatest possible length.
    min_length: counts the prompt; min_new_tokens does not. Both only hold the end tokens back.
    repetition_penalty: on logits in greedy search, on log-probabilities in beam search (Keskar et al., 2019).
    encoder_repetition_penalty, encoder_no_repeat_ngram_size: about the ids of the encoder; of the prompt where the
        model is decoder-only.
    sequence_bias: (ids, bias) pairs: what is added to the score of the last id where the others stand before it.
    begin_suppress_tokens: not as the first token, or the first after forced_bos_token_id.
    forced_bos_token_id: the second token, where the prompt is the start token alone.
    forced_eos_token_id: the last token of what reaches max_new_tokens.
    exponential_decay_length_penalty: (start, factor): after `start` generated tokens, each one more multiplies what
        the end tokens gain.
    eos_token_id: any of them ends a sequence; none may be given.
    """

    max_new_tokens: int
    pad_token_id: int
    eos_token_id: tuple[int, ...]
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    min_new_tokens: int = 0
    min_length: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Words = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    renormalize_logits: bool = False

    def __post_init__(self):
        def expect(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise UserError(f"generate.{name}: expected {what}, got {getattr(self, name)!r}")

        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            expect(_is_id(getattr(self, name)) and getattr(self, name) >= 1, name, "at least 1")
        at_most = f"at most generate.num_beams={self.num_beams}"
        expect(self.num_return_sequences <= self.num_beams, "num_return_sequences", at_most)
        for name in ("min_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            expect(_is_id(getattr(self, name)), name, "0 (off) or a number of tokens")
        for name in ("repetition_penalty", "encoder_repetition_penalty"):
            expect(0.0 < getattr(self, name) < math.inf, name, "a positive number, 1 is off")
        expect(math.isfinite(self.length_penalty), "length_penalty", "a finite number, 0 is off")
        stops = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        expect(stops, "early_stopping", "True, False or 'never'")
        expect(_is_id(self.pad_token_id), "pad_token_id", "a token id")
        for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
            expect(_are_ids(getattr(self, name)), name, "a tuple of token ids")
        forced = self.forced_bos_token_id is None or _is_id(self.forced_bos_token_id)
        expect(forced, "forced_bos_token_id", "a token id or None")
        expect(_are_ids(_ids(self.forced_eos_token_id)), "forced_eos_token_id", "a token id, a tuple of them, or None")
        words = isinstance(self.bad_words_ids, tuple) and all(w and _are_ids(w) for w in self.bad_words_ids)
        expect(words, "bad_words_ids", "a tuple of tuples of token ids that are not empty")
        biased = isinstance(self.sequence_bias, tuple) and all(b[0] and _are_ids(b[0]) for b in self.sequence_bias)
        expect(biased, "sequence_bias", "a tuple of (tuple of token ids, bias) pairs")
        decay = self.exponential_decay_length_penalty
        pair = decay is None or (len(decay) == 2 and _is_id(decay[0]) and decay[1] > 0 and bool(self.eos_token_id))
        expect(pair, "exponential_decay_length_penalty", "(number of tokens, positive factor), with an eos_token_id")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            ids = set(_ids(getattr(self, name)))
            what = f"a token that is not in generate.suppress_tokens={self.suppress_tokens}, for then none is left"
            expect(not ids or not ids <= set(self.suppress_tokens), name, what)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises UserError where a forced, biased or forbidden id cannot be generated."""
        named: dict[str, Iterable[int]] = {
            "forced_bos_token_id": _ids(self.forced_bos_token_id),
            "forced_eos_token_id": _ids(self.forced_eos_token_id),
            "bad_words_ids": (i for word in self.bad_words_ids for i in word),
            "sequence_bias": (i for word, _ in self.sequence_bias for i in word),
        }
        for name, ids in named.items():
            for i in ids:
                if i >= vocab_size:
                    raise UserError(f"generate.{name}: expected ids below the vocabulary's size {vocab_size}, got {i}")


def _is_id(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _are_ids(x: object) -> bool:
    return isinstance(x, tuple) and all(map(_is_id, x))


def _ids(x: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if x is None else x if isinstance(x, tuple) else (x,)


def process(
    scores: jax.Array,
    ids: jax.Array,
    n: jax.Array,
    s: Search,
    *,
    prompt_len: int,
    prompt_start: jax.Array | None = None,
    encoder_ids: jax.Array | None = None,
) -> jax.Array:
    """scores float32 [R,V] of token n of the generated ones -> the scores that the search ranks.

    ids [R,P+N] hold the prompt, padding included, and n generated tokens. The repetition penalty alone overlooks the
    ids before prompt_start [R] (`transformers` gives it the attention mask, and no other); all overlook ids below 0,
    so that a prompt padded with these is as it is alone. encoder_ids [R,S].
    """
    vocab_size, length = scores.shape[1], prompt_len + n
    counted = length - jnp.sum(ids[:, :prompt_len] < 0, axis=1, keepdims=True)
    position = jnp.arange(ids.shape[1])
    ends = _members(s.eos_token_id, vocab_size)
    if s.sequence_bias:
        scores = scores + sequence_bias(ids, length, dict(s.sequence_bias), vocab_size)
    if s.encoder_repetition_penalty != 1.0 and encoder_ids is not None:
        met = seen(encoder_ids, jnp.ones(encoder_ids.shape, bool), vocab_size)
        scores = repetition_penalty(scores, met, jnp.float32(1.0 / s.encoder_repetition_penalty))
    if s.repetition_penalty != 1.0:
        start = 0 if prompt_start is None else prompt_start[:, None]
        met = seen(ids, (position < length) & (position >= start), vocab_size)
        scores = repetition_penalty(scores, met, jnp.float32(s.repetition_penalty))
    if s.no_repeat_ngram_size:
        scores = jnp.where(repeats(ids, ids, length, s.no_repeat_ngram_size, vocab_size, length), -jnp.inf, scores)
    if s.encoder_no_repeat_ngram_size and encoder_ids is not None:
        size, known = s.encoder_no_repeat_ngram_size, jnp.int32(encoder_ids.shape[1])
        scores = jnp.where(repeats(encoder_ids, ids, length, size, vocab_size, known), -jnp.inf, scores)
    words = {word: -math.inf for word in s.bad_words_ids if not (len(word) == 1 and word[0] in s.eos_token_id)}
    if words:
        scores = scores + sequence_bias(ids, length, words, vocab_size)
    if s.min_length or s.min_new_tokens:
        early = (counted < s.min_length) | (n < s.min_new_tokens)
        scores = jnp.where(early & ends, -jnp.inf, scores)
    if s.forced_bos_token_id is not None:
        only = np.where(_members((s.forced_bos_token_id,), vocab_size), np.float32(0), -np.inf)
        scores = jnp.where(counted == 1, only, scores)
    if s.forced_eos_token_id is not None:
        only = np.where(_members(_ids(s.forced_eos_token_id), vocab_size), np.float32(0), -np.inf)
        scores = jnp.where(n == s.max_new_tokens - 1, only, scores)
    if s.remove_invalid_values:
        greatest = float(jnp.finfo(scores.dtype).max)
        scores = jnp.nan_to_num(scores, nan=0.0, posinf=greatest, neginf=-greatest)
    if s.exponential_decay_length_penalty is not None:
        scores = scores + jnp.where(ends, _decay(scores, n, s), 0.0)
    if s.suppress_tokens:
        scores = jnp.where(_members(s.suppress_tokens, vocab_size), -jnp.inf, scores)
    if s.begin_suppress_tokens:
        begin = 0 if s.forced_bos_token_id is None else (counted - n == 1).astype(jnp.int32)
        scores = jnp.where((n == begin) & _members(s.begin_suppress_tokens, vocab_size), -jnp.inf, scores)
    return jax.nn.log_softmax(scores, axis=-1) if s.renormalize_logits else scores


def _members(ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    return np.isin(np.arange(vocab_size), ids)


def _decay(scores: jax.Array, n: jax.Array, s: Search) -> jax.Array:
    """|score| (factor ** (n - start) - 1), 0 up to `start` tokens and where the score is not finite."""
    start, factor = s.exponential_decay_length_penalty or (0, 1.0)
    past = np.maximum(np.arange(s.max_new_tokens) - start, 0)
    gain = jnp.asarray(np.float64(factor) ** past - 1.0, jnp.float32)[n]
    return jnp.where(jnp.isfinite(scores), jnp.abs(scores) * gain, 0.0)


def seen(ids: jax.Array, counts: jax.Array, vocab_size: int) -> jax.Array:
    """ids [R,T], counts bool [R,T] -> bool [R,V]: the ids where `counts`, but for those outside [0,V)."""
    column = jnp.where(counts & (ids >= 0) & (ids < vocab_size), ids, vocab_size)
    # One column more, which takes ids out of range and is cut off.
    found = jnp.zeros((ids.shape[0], vocab_size + 1), bool)
    return found.at[jnp.arange(ids.shape[0])[:, None], column].set(True)[:, :vocab_size]


def repeats(
    source: jax.Array, ids: jax.Array, length: jax.Array, size: int, vocab_size: int, known: jax.Array
) -> jax.Array:
    """source [R,S], of which `known` ids count, ids [R,T], of which `length` do -> bool [R,V].

    True for what would make the last size-1 ids an n-gram of `source`.
    """
    windows = source.shape[1] - size + 1
    if windows < 1 or ids.shape[1] < size - 1:
        return jnp.zeros((ids.shape[0], vocab_size), bool)
    last = _last(ids, length, size - 1)
    match = (jnp.arange(windows) + size - 1 < known) & (length >= size - 1)
    match = jnp.broadcast_to(match, (ids.shape[0], windows))
    for j in range(size - 1):
        match &= source[:, j : j + windows] == last[:, j : j + 1]
    return seen(source[:, size - 1 :], match, vocab_size)


def sequence_bias(ids: jax.Array, length: jax.Array, words: dict[tuple[int, ...], float], vocab_size: int) -> jax.Array:
    """float32 [R,V]: each word's bias at its last id, in the rows of ids [R,T] whose `length` ids end in the others."""
    bias = jnp.zeros((ids.shape[0], vocab_size), jnp.float32)
    for size in sorted({len(word) for word in words}):
        if size > ids.shape[1]:
            continue
        table = np.array([word for word in words if len(word) == size])
        values = np.array([value for word, value in words.items() if len(word) == size], np.float32)
        ahead = _last(ids, length, size - 1)[:, None, :] == table[:, :-1]
        match = jnp.all(ahead, axis=-1) & (length >= size - 1)
        bias = bias.at[:, table[:, -1]].add(jnp.where(match, values, 0.0))
    return bias


def _last(ids: jax.Array, length: jax.Array, count: int) -> jax.Array:
    """The `count` ids before position `length`: [R,count]; of no use where there are fewer."""
    return jax.lax.dynamic_slice_in_dim(ids, length - count, count, axis=1)
