"""Tokens that are drawn: the settings, the filters they switch on in the order of `transformers`, and the strategy.

The settings reach the compiled program as numbers (`Knobs`), so that changing them compiles nothing; a filter that is
off costs nothing, since a branch skips it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lm.errors import UserError
from lm.generation.cached import Given
from lm.generation.engine import Look


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Repetition penalty, temperature, top-k, top-p, min-p, in this order; then one draw from what is left.

    temperature: 0 takes the likeliest token.
    top_k: keeps the k likeliest tokens, and those that tie with the last; 0 is off.
    top_p: keeps the likeliest tokens that together reach this probability (Holtzman et al., 2020); 1 is off.
    min_p: keeps tokens of at least this fraction of the likeliest one's probability (Nguyen et al., 2024); 0 is off.
    repetition_penalty: divides positive and multiplies negative logits of ids that the sequence, prompt and start
        token included, has already (Keskar et al., 2019); 1 is off.
    seed: the noise of row i of a call comes from (seed, i, number of tokens drawn), so that a row does not depend on
        the others, and equal prompts in one call differ.
    stop: the text is cut before the stop string that is completed first.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        def expect(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise UserError(f"generate.{name}: expected {what}, got {getattr(self, name)!r}")

        expect(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        expect(0.0 <= self.temperature < math.inf, "temperature", "0 (greedy) or a positive number")
        expect(self.top_k >= 0, "top_k", "0 (off) or a number of tokens")
        expect(0.0 < self.top_p <= 1.0, "top_p", "a probability in (0, 1], 1 is off")
        expect(0.0 <= self.min_p <= 1.0, "min_p", "a fraction in [0, 1], 0 is off")
        expect(0.0 < self.repetition_penalty < math.inf, "repetition_penalty", "a positive number, 1 is off")
        expect(0 <= self.seed < 2**32, "seed", "a number in [0, 2^32)")
        check_stop(self.stop)


def check_stop(stop: object) -> None:
    if not (isinstance(stop, tuple) and all(isinstance(s, str) and s for s in stop)):
        raise UserError(
            f"generate.stop: expected a tuple of strings that are not empty, such as ('\\n',), got {stop!r}"
        )


class Knobs(NamedTuple):
    """The settings as scalars that a compiled program takes as input."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def knobs(s: Sampling) -> Knobs:
    floats = {n: jnp.float32(getattr(s, n)) for n in Knobs._fields if n != "top_k"}
    return Knobs(top_k=jnp.int32(min(s.top_k, 2**31 - 1)), **floats)


class Draws(NamedTuple):
    """The numbers of one call: seed uint32 [] and rows int32 [B] name the noise."""

    seed: ArrayLike
    rows: ArrayLike
    knobs: Knobs


class Drawn(NamedTuple):
    """n tokens of each of B rows, of at most N, which stand in `out` int32 [B,N] with an end token after the end.

    done bool [B]; seen bool [B,V]: ids in the sequence so far; keys: of the rows' noise.
    """

    n: jax.Array
    out: jax.Array
    done: jax.Array
    seen: jax.Array
    keys: jax.Array
    knobs: Knobs


@dataclasses.dataclass(frozen=True, eq=False)  # it holds an array: jit tells instances apart by identity
class Sample:
    """Draws each token, as `Sampling` says: a strategy of `lm.generation.engine`, whose settings are `Draws`.

    end_ids: any of them ends a row. never: bool [V], ids that are not drawn. A row where nothing is valid is ignored.
    """

    end_ids: tuple[int, ...]
    never: np.ndarray
    rows = 1

    def begin(self, given: Given, logits: jax.Array, new: int, settings: Draws) -> Drawn:
        b, vocab_size = logits.shape
        return Drawn(
            n=jnp.int32(0),
            out=jnp.full((b, new), self.end_ids[0], jnp.int32),
            done=~jnp.any(given.valid, axis=1),
            seen=jnp.zeros((b, vocab_size), bool).at[jnp.arange(b)[:, None], given.prompts].max(given.prompts >= 0),
            keys=row_keys(settings.seed, settings.rows),
            knobs=settings.knobs,
        )

    def choose(self, d: Drawn, logits: jax.Array) -> Drawn:
        scores = jnp.where(self.never, -jnp.inf, logits)
        token = draw(scores, d.seen, d.keys, d.n, d.knobs)
        token = jnp.where(d.done, self.end_ids[0], token)
        return d._replace(
            n=d.n + 1,
            out=jax.lax.dynamic_update_slice_in_dim(d.out, token[:, None], d.n, axis=1),
            done=d.done | jnp.isin(token, np.array(self.end_ids, np.int32)),
            seen=d.seen.at[jnp.arange(token.shape[0]), token].set(True),
        )

    def last(self, d: Drawn) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(d.out, d.n - 1, axis=1, keepdims=False)

    def follow(self, d: Drawn, cache: object) -> object:
        return cache

    def finished(self, d: Drawn) -> jax.Array:
        return jnp.all(d.done)

    def halt(self, d: Drawn, rows: jax.Array) -> Drawn:
        return d._replace(done=d.done | rows)

    def look(self, d: Drawn) -> Look:
        return Look(np.array(d.out), np.array(d.done))


def row_keys(seed: ArrayLike, rows: ArrayLike) -> jax.Array:
    """seed uint32 [], rows int32 [B] -> keys [B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def draw(scores: jax.Array, seen: jax.Array, keys: jax.Array, step: jax.Array, k: Knobs) -> jax.Array:
    """scores [B,V] float32 (-inf: never), seen bool [B,V], keys [B] of the rows -> ids int32 [B]."""
    scores = repetition_penalty(scores, seen, k.repetition_penalty)

    def sample() -> jax.Array:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:], jnp.float32))(step_keys)
        return jnp.argmax(warp(scores, k) + noise, axis=-1)  # Gumbel-max: a draw from the softmax

    return jax.lax.cond(k.temperature == 0.0, lambda: jnp.argmax(scores, axis=-1), sample).astype(jnp.int32)


def warp(scores: jax.Array, k: Knobs) -> jax.Array:
    """scores [B,V] -> the scores whose softmax is drawn from, -inf where filtered out. Temperature is not 0."""
    scores = scores / k.temperature
    scores = jax.lax.cond(k.top_k > 0, lambda: top_k(scores, k.top_k), lambda: scores)
    scores = jax.lax.cond(k.top_p < 1.0, lambda s: top_p(s, k.top_p), lambda s: s, scores)
    return min_p(scores, k.min_p)


def repetition_penalty(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """scores / penalty where positive, * penalty where negative, of the ids in `seen` (Keskar et al., 2019)."""
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def top_k(scores: jax.Array, k: jax.Array) -> jax.Array:
    return _keep_heaviest(scores, jnp.ones_like(scores), k.astype(jnp.float32))


def top_p(scores: jax.Array, p: jax.Array) -> jax.Array:
    return _keep_heaviest(scores, jax.nn.softmax(scores, axis=-1), p)


def min_p(scores: jax.Array, p: jax.Array) -> jax.Array:
    # The logarithm of 0 is -inf: no token goes.
    return jnp.where(scores >= jnp.max(scores, axis=-1, keepdims=True) + jnp.log(p), scores, -jnp.inf)


def _keep_heaviest(scores: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Keeps the fewest highest scores whose weights sum to `target`, with all that tie with the lowest of them.

    The cut is found bit by bit, by 32 sums, since XLA sorts [B,50257] slowly. Floats are compared as unsigned integers
    of the same order: the sign bit flipped, and the others too where it was set.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    order = bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))

    def lower_bit(i, cut):
        higher = cut | (jnp.uint32(0x80000000) >> i.astype(jnp.uint32))
        enough = jnp.sum(jnp.where(order >= higher, weights, 0.0), axis=-1, keepdims=True) >= target
        return jnp.where(enough, higher, cut)

    cut = jax.lax.fori_loop(0, 32, lower_bit, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
    return jnp.where(order >= cut, scores, -jnp.inf)
