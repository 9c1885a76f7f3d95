"""The compiled half of generation: one program reads the prompts, one loops over new tokens until all rows are done.

Both are compiled once for each (rows, prompt length, new tokens) shape; the caller rounds these up. It does not split
text, look for stop strings or check its input: that is `generator`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.generation.cached import CachedDecoder, DecoderCache, Params
from lm.generation.sampling import Knobs, draw, row_keys
from lm.models.base import Model


class State(NamedTuple):
    """B rows between two steps. P slots hold the prompts, right-aligned; N slots the new tokens; T = P + N."""

    step: jax.Array  # int32 [], tokens drawn
    out: jax.Array  # int32 [B,N], the tokens drawn; `end_id` after the end
    done: jax.Array  # bool [B]
    seen: jax.Array  # bool [B,V], ids in the sequence so far
    keys: jax.Array  # key [B]
    cache: DecoderCache


class Decode:
    """`prefill` draws the first token of each row, `advance` the next ones. A row ends when `end_id` is drawn.

    never: bool [V], ids that are not drawn. Holds a copy of the layers' parameters, unstacked.
    """

    def __init__(self, model: Model, params: dict, never: np.ndarray, end_id: int, dtype: DTypeLike):
        self.model, self.end_id = model, end_id
        self._cached = CachedDecoder(model, dtype)
        self._params = jax.jit(self._cached.split)(params)
        self._never = never
        self.prefill = jax.jit(self._prefill, static_argnames="new")
        self.advance = jax.jit(self._advance, donate_argnames="state")

    def start(
        self, prompts: np.ndarray, lengths: np.ndarray, rows: np.ndarray, seed: int, k: Knobs, *, new: int
    ) -> State:
        """prompts int32 [B,P] right-aligned; lengths [B], 0 for a row to ignore; rows [B] name the noise; new = N."""
        return self.prefill(self._params, prompts, lengths, rows, np.uint32(seed), k, new=new)

    def go_on(self, state: State, until: int, halt: np.ndarray, k: Knobs) -> State:
        """Draws tokens until `until` are drawn or all rows are done. halt bool [B] ends rows. `state` is consumed."""
        return self.advance(self._params, state, np.int32(until), halt, k)

    def _prefill(self, params: Params, prompts, lengths, rows, seed, k: Knobs, *, new: int) -> State:
        b, p = prompts.shape
        real = jnp.arange(p) >= p - lengths[:, None]
        logits, cache = self._cached.prefill(params, prompts, real, new)
        state = State(
            step=jnp.int32(0),
            out=jnp.full((b, new), self.end_id, jnp.int32),
            done=lengths == 0,
            seen=jnp.zeros((b, self.model.vocab_size), bool).at[jnp.arange(b)[:, None], prompts].max(real),
            keys=row_keys(seed, rows),
            cache=cache,
        )
        return self._draw(state, logits, k)

    def _advance(self, params: Params, state: State, until, halt, k: Knobs) -> State:
        p = state.cache.segments.shape[1] - state.out.shape[1]

        def step(state: State) -> State:
            last = state.step - 1
            tokens = jax.lax.dynamic_index_in_dim(state.out, last, axis=1, keepdims=False)
            logits, cache = self._cached.step(params, tokens, p + last, state.step, state.cache)
            return self._draw(state._replace(cache=cache), logits, k)

        state = state._replace(done=state.done | halt)
        return jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done), step, state)

    def _draw(self, state: State, logits: jax.Array, k: Knobs) -> State:
        """logits [B,V] -> the state with one more token in each row."""
        scores = jnp.where(self._never, -jnp.inf, logits)
        token = draw(scores, state.seen, state.keys, state.step, k)
        token = jnp.where(state.done, self.end_id, token)
        return state._replace(
            step=state.step + 1,
            out=jax.lax.dynamic_update_slice_in_dim(state.out, token[:, None], state.step, axis=1),
            done=state.done | (token == self.end_id),
            seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
        )
