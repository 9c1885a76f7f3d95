"""Greedy and beam search, with the conventions of `transformers.generate` 5.23: strategies of `lm.generation.engine`.

Their settings are `Search`, static; nothing is drawn. Equal scores go to the earlier beam, then to the lower id; in
`transformers` their order is torch.topk's, undefined.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.generation.cached import Given
from lm.generation.engine import Look
from lm.generation.processors import Search, process
from lm.generation.sampling import check_stop

# What `transformers` adds to a score to put it last: float32 sums with it lose the score, which leaves ties.
LAST = np.float32(-1e9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Asks for the likeliest text that `beams` beams find; 1 is greedy search.

    length_penalty: a finished beam scores its sum of log-probabilities / tokens ** length_penalty.
    repetition_penalty: of ids that the sequence has already (Keskar et al., 2019); 1 is off.
    These two are what an imported folder says where they are None, else 1; all its other settings of a search hold.
    stop: the text is cut before the stop string that is completed first; greedy search ends there.
    """

    max_new_tokens: int = 128
    beams: int = 4
    length_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        def expect(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise UserError(f"generate.{name}: expected {what}, got {getattr(self, name)!r}")

        for name in ("max_new_tokens", "beams"):
            expect(getattr(self, name) >= 1, name, "at least 1")
        expect(math.isfinite(self.length_penalty or 0.0), "length_penalty", "a finite number, 0 is off")
        penalty = self.repetition_penalty
        positive = penalty is None or 0.0 < penalty < math.inf
        expect(positive, "repetition_penalty", "a positive number, 1 is off")
        check_stop(self.stop)

    def settings(self, base: Search) -> Search:
        """Returns `base` with the settings of this search."""
        named = ("length_penalty", "repetition_penalty")
        given = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        return dataclasses.replace(
            base, max_new_tokens=self.max_new_tokens, num_beams=self.beams, num_return_sequences=1, **given
        )


class Found(NamedTuple):
    """sequences int32 [B*R,P+N], R = num_return_sequences best first; scores float32 [B*R]; lengths int32 [B*R].

    scores: in beam search, sum of the processed log-probabilities / length ** length_penalty; in greedy search, the sum
        of the log-softmax of the processed logits.
    lengths: generated tokens, the end token included. After them come pad tokens; but in beam search, where
        pad_token_id is 0, the first end token, as in `transformers`.
    """

    sequences: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray

    def trim(self, prompt_len: int) -> np.ndarray:
        """The sequences cut after the longest of them, as `transformers` returns them."""
        return self.sequences[:, : prompt_len + int(np.max(self.lengths))]


def searching(s: Search) -> Greedy | Beams:
    return Greedy(s) if s.num_beams == 1 else Beams(s)


class Seen(NamedTuple):
    """What the processors look at beside the sequences: see `process`. first int32 [R], source int32 [R,S]."""

    first: jax.Array
    source: jax.Array


class Row(NamedTuple):
    """Greedy search after n tokens: ids [B,P+N], and per row the sum of log-probabilities, the tokens, and its end."""

    n: jax.Array
    ids: jax.Array
    score: jax.Array
    length: jax.Array
    ended: jax.Array
    seen: Seen


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the likeliest token. A row where nothing is valid is ignored."""

    s: Search
    rows = 1

    def begin(self, given: Given, logits: jax.Array, new: int, settings: None = None) -> Row:
        _check(self.s, logits, new)
        b = len(logits)
        return Row(
            n=jnp.int32(0),
            ids=_room(given.prompts, new, self.s.pad_token_id),
            score=jnp.zeros(b, jnp.float32),
            length=jnp.zeros(b, jnp.int32),
            ended=~jnp.any(given.valid, axis=1),
            seen=Seen(jnp.asarray(given.first), jnp.asarray(given.source)),
        )

    def choose(self, r: Row, logits: jax.Array) -> Row:
        prompt_len = self._prompt_len(r)
        scores = _process(logits.astype(jnp.float32), r.ids, r.n, self.s, r.seen, prompt_len)
        tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), tokens[:, None], axis=-1)[:, 0]
        tokens = jnp.where(r.ended, self.s.pad_token_id, tokens)
        return r._replace(
            n=r.n + 1,
            ids=r.ids.at[:, prompt_len + r.n].set(tokens),
            score=r.score + jnp.where(r.ended, 0.0, log_probs),
            length=r.length + ~r.ended,
            ended=r.ended | _ends(tokens, self.s),
        )

    def last(self, r: Row) -> jax.Array:
        return r.ids[:, self._prompt_len(r) + r.n - 1]

    def follow(self, r: Row, cache: Any) -> Any:
        return cache

    def finished(self, r: Row) -> jax.Array:
        return jnp.all(r.ended)

    def halt(self, r: Row, rows: jax.Array) -> Row:
        return r._replace(ended=r.ended | rows)

    def look(self, r: Row) -> Look:
        return Look(np.array(r.ids)[:, self._prompt_len(r) :], np.array(r.ended))

    def found(self, r: Row) -> Found:
        return Found(np.asarray(r.ids), np.asarray(r.score), np.asarray(r.length))

    def _prompt_len(self, r: Row) -> int:
        return r.ids.shape[1] - self.s.max_new_tokens


class Tree(NamedTuple):
    """Beam search after n tokens, with K beams a prompt.

    Open beams, best first: `open_ids` [B,K,P+N], `open_scores` [B,K] (sums of log-probabilities), and `parents` [B*K],
    the rows of the cache that they continue. Kept ones, best first: `ids`, `scores` (over the length's penalty),
    `lengths`, and whether they are `finished` or only hold a place. `improvable` [B,1]: an open beam may yet do better.
    """

    n: jax.Array
    open_ids: jax.Array
    open_scores: jax.Array
    parents: jax.Array
    ids: jax.Array
    scores: jax.Array
    lengths: jax.Array
    finished: jax.Array
    improvable: jax.Array
    stop: jax.Array
    seen: Seen


@dataclasses.dataclass(frozen=True)
class Beams:
    """Keeps the `s.num_beams` likeliest sequences open. It is looked at when it is finished, and cannot be halted."""

    s: Search

    @property
    def rows(self) -> int:
        return self.s.num_beams

    def begin(self, given: Given, logits: jax.Array, new: int, settings: None = None) -> Tree:
        _check(self.s, logits, new)
        beams, (batch, prompt_len) = self.s.num_beams, given.prompts.shape
        # So that num_beams candidates stay open should all end tokens of every beam be among them.
        if self._candidates > beams * logits.shape[1]:
            least = self._candidates // beams - 1
            raise UserError(f"generate.logits: expected a vocabulary of more than {least} ids, got {logits.shape[1]}")
        # transformers: `pad_token_id or eos_token_id[0]`, so that a pad token 0 counts as none.
        padded = _room(given.prompts, new, self.s.pad_token_id or next(iter(self.s.eos_token_id), 0))
        padded = jnp.broadcast_to(padded[:, None], (batch, beams, prompt_len + new))
        # One beam to start from, for else all would grow alike.
        first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, LAST), (batch, beams))
        return Tree(
            n=jnp.int32(0),
            open_ids=padded,
            open_scores=first,
            parents=jnp.arange(batch * beams),
            ids=padded,
            scores=jnp.full((batch, beams), LAST),
            lengths=jnp.zeros((batch, beams), jnp.int32),
            finished=jnp.zeros((batch, beams), bool),
            improvable=jnp.ones((batch, 1), bool),
            stop=jnp.bool_(False),
            seen=Seen(jnp.repeat(given.first, beams, axis=0), jnp.repeat(given.source, beams, axis=0)),
        )

    def choose(self, b: Tree, logits: jax.Array) -> Tree:
        s, (batch, beams, total) = self.s, b.open_ids.shape
        vocab_size, prompt_len, n = logits.shape[1], total - s.max_new_tokens, b.n + 1
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        log_probs = _process(log_probs, b.open_ids.reshape(-1, total), b.n, s, b.seen, prompt_len)
        sums = log_probs.reshape(batch, beams, vocab_size) + b.open_scores[:, :, None]
        top, index = jax.lax.top_k(sums.reshape(batch, -1), self._candidates)
        parent, token = index // vocab_size, index % vocab_size
        (grown,) = _pick(parent, b.open_ids)
        grown = grown.at[:, :, prompt_len + b.n].set(token)
        ends = _ends(token, s) | (n >= s.max_new_tokens)

        still_open = top + ends * LAST
        open_ids, open_scores, parents = _pick(jax.lax.top_k(still_open, beams)[1], grown, still_open, parent)
        b = b._replace(
            n=n,
            open_ids=open_ids,
            open_scores=open_scores,
            parents=(parents + jnp.arange(batch)[:, None] * beams).reshape(-1),
        )
        return self._keep(b, grown, top, ends)

    def _keep(self, b: Tree, grown: jax.Array, top: jax.Array, ends: jax.Array) -> Tree:
        """Puts those of the candidates grown [B,C,P+N] that end among the kept sequences, and sees who may yet do
        better. top [B,C]: their sums of log-probabilities."""
        s, beams, eager = self.s, self.s.num_beams, self.s.early_stopping is True
        norm = np.maximum(np.arange(s.max_new_tokens + 1.0), 1.0) ** s.length_penalty
        norm = jnp.asarray(norm, jnp.float32)
        # A candidate below the first `beams` is there to go on with, and may not finish.
        finishes = ends & (jnp.arange(top.shape[1]) < beams)
        full = jnp.all(b.finished, axis=1, keepdims=True) & eager
        scores = top / norm[b.n] + full * LAST + ~b.improvable * LAST + ~finishes * LAST
        merged = jax.tree.map(
            lambda kept, more: jnp.concatenate((kept, more), axis=1),
            (b.scores, b.ids, b.lengths, b.finished),
            (scores, grown, jnp.full(top.shape, b.n), finishes),
        )
        scores, ids, lengths, finished = _pick(jax.lax.top_k(merged[0], beams)[1], *merged)

        hoped = norm[s.max_new_tokens] if s.early_stopping == "never" and s.length_penalty > 0.0 else norm[b.n]
        worst = jnp.where(finished, jnp.min(scores, axis=1, keepdims=True), LAST)
        improvable = b.improvable & jnp.any(b.open_scores[:, :1] / hoped > worst, axis=1, keepdims=True)
        stop = ~jnp.any(improvable) | (jnp.all(finished) & eager) | jnp.all(ends)
        return b._replace(ids=ids, scores=scores, lengths=lengths, finished=finished, improvable=improvable, stop=stop)

    def last(self, b: Tree) -> jax.Array:
        at = b.open_ids.shape[2] - self.s.max_new_tokens + b.n - 1
        return b.open_ids[:, :, at].reshape(-1)

    def follow(self, b: Tree, cache: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[b.parents], cache)

    def finished(self, b: Tree) -> jax.Array:
        return b.stop

    def halt(self, b: Tree, rows: jax.Array) -> Tree:
        return b

    def look(self, b: Tree) -> Look:
        best = np.array(b.ids)[:, 0]
        return Look(best[:, best.shape[1] - self.s.max_new_tokens :], np.full(len(best), bool(b.stop)))

    def found(self, b: Tree) -> Found:
        best, total = self.s.num_return_sequences, b.ids.shape[2]
        kept = (np.asarray(x)[:, :best] for x in (b.ids, b.scores, b.lengths))
        ids, scores, lengths = kept
        return Found(ids.reshape(-1, total), scores.reshape(-1), lengths.reshape(-1))

    @property
    def _candidates(self) -> int:
        return max(2, 1 + len(self.s.eos_token_id)) * self.s.num_beams


def _check(s: Search, logits: jax.Array, new: int) -> None:
    assert new == s.max_new_tokens
    s.check_vocab(logits.shape[1])


def _room(prompts: Any, new: int, fill: int) -> jax.Array:
    return jnp.pad(jnp.asarray(prompts, jnp.int32), ((0, 0), (0, new)), constant_values=fill)


def _process(scores: jax.Array, ids: jax.Array, n: jax.Array, s: Search, seen: Seen, prompt_len: int) -> jax.Array:
    return process(scores, ids, n, s, prompt_len=prompt_len, prompt_start=seen.first, encoder_ids=seen.source)


def _ends(tokens: jax.Array, s: Search) -> jax.Array:
    return jnp.isin(tokens, np.array(s.eos_token_id, np.int32))


def _pick(index: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Picks index [B,K] of axis 1 from every array [B,C,...]."""
    return [jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), axis=1) for a in arrays]
