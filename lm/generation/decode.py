"""The compiled half of generation: one program reads the prompts, one loops over new tokens until all rows are done.

Both are compiled once for each (rows, prompt length, new tokens) shape; the caller rounds these up. It does not split
text, look for stop strings or check its input: that is `generator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lm.generation.sampling import Knobs, draw, row_keys
from lm.models.base import Model, abstract
from lm.nn.attention import KVCache
from lm.nn.block import Block
from lm.nn.mask import Mask, causal_mask


class State(NamedTuple):
    """B rows between two steps. P slots hold the prompts, right-aligned; N slots the new tokens; T = P + N."""

    step: jax.Array  # int32 [], tokens drawn
    out: jax.Array  # int32 [B,N], the tokens drawn; `end_id` after the end
    done: jax.Array  # bool [B]
    seen: jax.Array  # bool [B,V], ids in the sequence so far
    keys: jax.Array  # key [B]
    lengths: jax.Array  # int32 [B], prompt tokens
    segments: jax.Array  # int32 [B,T], 0 where a slot is padding, which no token attends to
    cache: tuple[KVCache, ...]  # [B,T,G,K] for each layer


class Layers:
    """Stands in for `lm.nn.stack.Stack`, with an array of its own for each layer's parameters and cache.

    A loop over tokens that slices stacked weights [L,...] copies all of them for each token: GPT-2 124M takes twice as
    long. `params` of one layer each.
    """

    def __init__(self, params: Sequence[dict]):
        self.params = params

    def __call__(
        self, block: Block, x: jax.Array, *args: Any, key: None = None, cache: tuple[KVCache, ...]
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        graphdef, _ = nnx.split(block)
        new: list[Any] = []
        for params, layer_cache in zip(self.params, cache, strict=True):
            x, written = nnx.merge(graphdef, params)(x, *args, key=None, cache=layer_cache)
            new.append(written)
        return x, tuple(new)


class Decode:
    """`prefill` draws the first token of each row, `advance` the next ones. A row ends when `end_id` is drawn.

    never: bool [V], ids that are not drawn. Holds a copy of the layers' parameters, unstacked.
    """

    def __init__(self, model: Model, params: dict, never: np.ndarray, end_id: int, dtype: DTypeLike):
        self.model, self.end_id, self.dtype = model, end_id, dtype
        self._graphdef = abstract(model).graphdef
        rest = {name: p for name, p in params.items() if name != "layers"}
        self._params = rest, jax.jit(_unstack, static_argnums=1)(params["layers"], model.n_layers)
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

    def _module(self, params: tuple[dict, list[dict]]) -> Any:
        rest, layers = params
        module = nnx.merge(self._graphdef, {**rest, "layers": layers[0]})
        module.stack = Layers(layers)
        return module

    def _prefill(self, params, prompts, lengths, rows, seed, k: Knobs, *, new: int) -> State:
        b, p = prompts.shape
        positions = jnp.arange(p) - (p - lengths[:, None])
        real = positions >= 0
        segments = real.astype(jnp.int32)
        shape = (b, p, *self.model.kv_shape)
        cache = tuple(KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in params[1])
        module = self._module(params)
        hidden, cache = module(
            prompts,
            dtype=self.dtype,
            positions=jnp.maximum(positions, 0),
            mask=causal_mask(p, segments),
            cache=cache,
            index=jnp.int32(0),
        )
        batch = jnp.arange(b)[:, None]
        state = State(
            step=jnp.int32(0),
            out=jnp.full((b, new), self.end_id, jnp.int32),
            done=lengths == 0,
            seen=jnp.zeros((b, self.model.vocab_size), bool).at[batch, prompts].max(real),
            keys=row_keys(seed, rows),
            lengths=lengths,
            segments=jnp.pad(segments, ((0, 0), (0, new)), constant_values=1),
            cache=jax.tree.map(lambda c: jnp.pad(c, ((0, 0), (0, new), (0, 0), (0, 0))), cache),
        )
        return self._draw(state, module.logits(hidden[:, -1:]), k)

    def _advance(self, params, state: State, until, halt, k: Knobs) -> State:
        b, t = state.segments.shape
        p = t - state.out.shape[1]

        def step(state: State) -> State:
            module = self._module(params)
            last = state.step - 1
            index = p + last
            tokens = jax.lax.dynamic_index_in_dim(state.out, last, axis=1)
            hidden, cache = module(
                tokens,
                dtype=self.dtype,
                positions=(state.lengths + last)[:, None],
                mask=Mask(index[None], jnp.arange(t), jnp.ones((b, 1), jnp.int32), state.segments),
                cache=state.cache,
                index=index,
            )
            return self._draw(state._replace(cache=cache), module.logits(hidden), k)

        state = state._replace(done=state.done | halt)
        return jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done), step, state)

    def _draw(self, state: State, logits: jax.Array, k: Knobs) -> State:
        """logits [B,1,V] -> the state with one more token in each row."""
        scores = jnp.where(self._never, -jnp.inf, logits[:, 0])
        token = draw(scores, state.seen, state.keys, state.step, k)
        token = jnp.where(state.done, self.end_id, token)
        return state._replace(
            step=state.step + 1,
            out=jax.lax.dynamic_update_slice_in_dim(state.out, token[:, None], state.step, axis=1),
            done=state.done | (token == self.end_id),
            seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
        )


def _unstack(stacked: dict, n: int) -> list[dict]:
    leaves, treedef = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(treedef, [x[i] for x in leaves]) for i in range(n)]
