"""The validation split of each source, as losses per token and per byte."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lm.data import Corpus, Tokenizer
from lm.evals import perplexity
from lm.objectives import Objective


def evaluate(
    score: Any,
    params: dict,
    corpus: Corpus,
    objective: Objective,
    *,
    seq_len: int,
    batch_size: int,
    vocab_size: int,
    max_batches: int,
    sharding: jax.sharding.NamedSharding,
) -> dict[str, perplexity.Perplexity]:
    """Each source's validation split. UserError where its files are not those that were opened.

    score: (params, batch, token_bytes) -> Score. vocab_size: of the model. max_batches: of each source, 0: all of it.
    sharding: of the rows of a batch.
    """
    from lm.data.loader.evaluation import eval_batches

    token_bytes = token_byte_table(corpus.tokenizer, vocab_size)
    results = {}
    for name, store in corpus.validation.items():
        store.check_unchanged()
        batches = eval_batches(
            store,
            seq_len=seq_len,
            batch_size=batch_size,
            sharding=sharding,
            examples=objective.examples_for(corpus.tokenizer),
            extra_rows=objective.extra_rows,
            max_batches=max_batches or None,
            pad_id=objective.pad_id,
        )
        results[name] = perplexity.evaluate(score, params, batches, token_bytes, objective.unit)
        store.check_unchanged()  # or the numbers are of another text
    return results


def token_byte_table(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[V] int32 over the model's vocabulary, which may be padded beyond the tokenizer's."""
    table = np.zeros(vocab_size, np.int32)
    known = tokenizer.token_bytes()
    table[: len(known)] = known
    return table


def describe(r: perplexity.Perplexity) -> str:
    """One line."""
    if not r.tokens:
        return f"nothing to predict (0 {r.unit}s)"
    bits = "" if r.bits_per_byte is None else f"  bits/byte {r.bits_per_byte:.4f}"
    per = "" if r.unit == "token" else f" per {r.unit}"
    return f"loss {r.loss:.4f}{per}  perplexity {r.perplexity:.2f}{bits}  ({r.tokens:,} {r.unit}s)"
