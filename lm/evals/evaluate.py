"""Evaluators: what a run, and `lm eval`, make of parameters. The one there is reads the validation splits.

A new one is a file here that `EVALUATORS` of `lm.evals.evaluation` names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from lm.data import Corpus, Tokenizer
from lm.evals import perplexity
from lm.objectives import Objective, Score

Batch = dict[str, jax.Array]


class Parts(Protocol):
    """What an evaluator may use of a run: `lm.training.setup.Setup`."""

    @property
    def config(self) -> Any: ...
    @property
    def rows(self) -> jax.sharding.NamedSharding: ...  # of the rows of a batch
    @property
    def score(self) -> Callable[[Any, Batch, Any], Score]: ...  # jitted: sums of each row [B]


class Measure(Protocol):
    """What is found of one thing, such as a split."""

    def record(self) -> dict[str, float]: ...  # for metrics.jsonl
    def __str__(self) -> str: ...  # one line for a person


class Evaluator(Protocol):
    """Made once for a run and called with parameters, which are on its devices: name -> what is found. Names of all
    evaluators of a run differ."""

    @classmethod
    def make(cls, parts: Parts, corpus: Corpus) -> Evaluator: ...
    def __call__(self, params: Any) -> Mapping[str, Measure]: ...


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validation split of each source, as losses per token and per byte.

    vocab_size: of the model. max_batches: of each source, 0: all of it. sharding: of the rows of a batch. score:
    (params, batch, token_bytes) -> Score.
    """

    score: Any
    corpus: Corpus
    objective: Objective
    seq_len: int
    batch_size: int
    vocab_size: int
    max_batches: int
    sharding: jax.sharding.NamedSharding

    @classmethod
    def make(cls, parts: Parts, corpus: Corpus) -> Validation:
        config = parts.config
        return cls(
            score=perplexity.totals(parts.score),
            corpus=corpus,
            objective=config.objective,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            vocab_size=config.model.vocab_size,
            max_batches=config.eval.max_batches,
            sharding=parts.rows,
        )

    def __call__(self, params: Any) -> dict[str, perplexity.Perplexity]:
        """Source -> what its split costs. UserError where its files are not those that were opened."""
        return {name: self._source(params, name) for name in self.corpus.validation}

    def _source(self, params: Any, name: str) -> perplexity.Perplexity:
        from lm.data.loader.evaluation import eval_batches

        store, objective = self.corpus.validation[name], self.objective
        store.check_unchanged()
        batches = eval_batches(
            store,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            sharding=self.sharding,
            examples=objective.examples_for(self.corpus.tokenizer),
            extra_rows=objective.extra_rows,
            max_batches=self.max_batches or None,
            pad_id=objective.pad_id,
        )
        found = perplexity.evaluate(self.score, params, batches, self._token_bytes, objective.unit)
        store.check_unchanged()  # or the numbers are of another text
        return found

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return token_byte_table(self.corpus.tokenizer, self.vocab_size)


def token_byte_table(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[V] int32 over the model's vocabulary, which may be padded beyond the tokenizer's."""
    table = np.zeros(vocab_size, np.int32)
    known = tokenizer.token_bytes()
    table[: len(known)] = known
    return table
