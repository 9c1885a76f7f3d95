"""The compiled half of generation: one program reads what is given, one loops over new tokens until all rows are done.

What is generated from (`Cached`) and how tokens are chosen (`Strategy`) are handed in: drawing, greedy search and beam
search share the loop. Both programs are compiled once for each strategy and shape; the caller rounds shapes up. Text,
stop strings and the user's input are the business of `generator`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.generation.cached import Cached, Given


class Look(NamedTuple):
    """What the host sees of B prompts: new tokens int32 [B,N], of which those after an end mean nothing, and which are
    done, bool [B]."""

    tokens: np.ndarray
    done: np.ndarray


class Choice(Protocol):
    """What a strategy knows between two tokens, a tree of arrays. n: int32 [], tokens chosen."""

    n: jax.Array


class Strategy(Protocol):
    """How tokens are chosen. It is traced, and static: equal ones share a compiled program.

    rows: sequences that are tried for each prompt, side by side among the rows R = B * rows of logits and cache.
    """

    rows: int

    def begin(self, given: Given, logits: jax.Array, new: int, settings: Any) -> Any:
        """The choice before the first of at most `new` tokens, whose logits are [R,V]."""
        ...

    def choose(self, choice: Any, logits: jax.Array) -> Any:
        """The choice with one more token in each row."""
        ...

    def last(self, choice: Any) -> jax.Array:
        """int32 [R]: the tokens that were chosen last."""
        ...

    def follow(self, choice: Any, cache: Any) -> Any:
        """The cache, [R,...] in every leaf, of the rows that the last tokens continue."""
        ...

    def finished(self, choice: Any) -> jax.Array:
        """bool []: no row goes on."""
        ...

    def halt(self, choice: Any, rows: jax.Array) -> Any:
        """Ends the prompts where rows bool [B] is True."""
        ...

    def look(self, choice: Any) -> Look: ...


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("choice", "cache"), meta_fields=("strategy", "prompt_len")
)
@dataclasses.dataclass(frozen=True)
class State:
    """What is kept between two looks of the host. prompt_len: slots before the new tokens."""

    choice: Any
    cache: Any
    strategy: Strategy
    prompt_len: int


class Engine:
    """`start` chooses the first token of each row, `advance` the next ones. Parameters are those that `split` made."""

    def __init__(self, model: Cached):
        self.model = model
        self.split = jax.jit(model.split)
        self.start = jax.jit(self._start, static_argnames=("strategy", "new"))
        self.advance = jax.jit(self._advance, donate_argnames="state")  # the cache is written in place

    def _start(self, params: Any, given: Given, settings: Any, *, strategy: Strategy, new: int) -> State:
        """Chooses the first tokens. settings: whatever the strategy takes as numbers, so that changing them compiles
        nothing. new: the most tokens. UserError where the model or what is given have other shapes than they should."""
        logits, cache = self.model.prefill(params, given, new)
        _check(given, logits, cache)
        if strategy.rows > 1:
            logits, cache = jax.tree.map(lambda x: jnp.repeat(x, strategy.rows, axis=0), (logits, cache))
        choice = strategy.choose(strategy.begin(given, logits, new, settings), logits)
        return State(choice, cache, strategy, given.prompts.shape[1])

    def _advance(self, params: Any, state: State, until: Any, halt: Any = None) -> State:
        """Chooses tokens until there are `until` or all rows are done. halt bool [B] ends rows. `state` is consumed."""
        strategy, before = state.strategy, state.prompt_len - 1

        def step(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            choice, cache = carry
            cache = strategy.follow(choice, cache)
            tokens = strategy.last(choice)
            logits, cache = self.model.step(params, tokens, before + choice.n, choice.n, cache)
            return strategy.choose(choice, logits), cache

        def goes_on(carry: tuple[Any, Any]) -> jax.Array:
            return (carry[0].n < until) & ~strategy.finished(carry[0])

        choice = state.choice if halt is None else strategy.halt(state.choice, halt)
        choice, cache = jax.lax.while_loop(goes_on, step, (choice, state.cache))
        return dataclasses.replace(state, choice=choice, cache=cache)


def _check(given: Given, logits: jax.Array, cache: Any) -> None:
    def expect(ok: bool, name: str, what: str, got: object) -> None:
        if not ok:
            raise UserError(f"generate.{name}: expected {what}, got {got}")

    prompts, read = given.prompts, given.read
    expect(prompts.ndim == 2 and prompts.shape[1] > 0, "prompts", "[batch, prompt] with a token", list(prompts.shape))
    b = prompts.shape[0]
    expect(read.ndim == 2 and read.shape[0] == b, "read", f"[{b}, length]", list(read.shape))
    for name in ("valid", "source"):
        shape = list(getattr(given, name).shape)
        expect(shape == list(read.shape), name, f"{list(read.shape)} as read", shape)
    expect(logits.ndim == 2 and logits.shape[0] == b, "logits", f"[{b}, vocabulary]", list(logits.shape))
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        ok = jnp.ndim(leaf) > 0 and leaf.shape[0] == b
        name = f"cache{jax.tree_util.keystr(path)}"
        expect(ok, name, f"a leading batch axis of size {b}; what has none is no cache", jnp.shape(leaf))
