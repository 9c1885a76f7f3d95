"""Rows with next to nothing in them, under every objective and the models they train: the loss is a number."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.models import T5, Bert, Llama, MaskedLMAndPair
from lm.models.base import abstract
from lm.nn.position import Rope
from lm.objectives import UL2, CausalLM, Denoising, MaskedLM, PrefixLM, Seq2Seq, SpanCorruption, UL2Decoder
from lm.objectives.causal_lm import unpack
from tests.models.reference import random_params
from tests.objectives.test_holes import HOLEY, examples
from tests.objectives.test_matrix import EOS, PAD

SIZES = dict(vocab_size=560, d_model=8, n_heads=2, d_ff=12)
LLAMA = Llama(**SIZES, n_layers=1, rope=Rope(theta=50.0))
BERT = Bert(**SIZES, n_layers=1, max_positions=16, pad_id=PAD)
MODELS = {"encoder": BERT, "encoder_decoder": T5(**SIZES, head_dim=4, n_layers=1)}
# The shortest rows that each may have: what `check` refuses one less than.
SHORTEST = {CausalLM: 1, PrefixLM: 1, MaskedLM: 3, Denoising: 2, SpanCorruption: 2, UL2: 2, UL2Decoder: 2, Seq2Seq: 4}
every = pytest.mark.parametrize("name", HOLEY)
# The others differ from one of these in their examples alone.
LOSSES = ["causal", "one text", "prefix", "masked", "sentence order", "denoising", "spans", "ul2 on a decoder", "pairs"]


def shortest(objective) -> int:
    if isinstance(objective, MaskedLM) and objective.pair != "none":
        return 5
    return next(n for kind, n in reversed(SHORTEST.items()) if isinstance(objective, kind))


def bad_rows(seq_len: int) -> np.ndarray:
    """All padding, one token, only ends, one end, text at the end alone, and a row of text."""
    rows = np.full((6, seq_len + 1), PAD, np.int32)
    rows[1, 0] = 20
    rows[2] = EOS
    rows[3, 0] = EOS
    rows[4, -1] = 21
    rows[5] = np.arange(30, 31 + seq_len)
    return rows


def with_ids(tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": tokens, "id": np.arange(len(tokens)), "other": tokens[::-1].copy()}


def weight_by_hand(objective, batch) -> int:
    """Targets, one row and place after another."""
    if objective.family == "encoder":
        return int(batch["weights"].sum())
    if objective.family == "encoder_decoder":
        return int((batch["targets"] != PAD).sum())
    n = 0
    for tokens, prefix in zip(batch["tokens"], batch.get("prefix", [None] * len(batch["tokens"]))):
        for p, (reads, target) in enumerate(zip(tokens[:-1], tokens[1:])):
            known = prefix is not None and p + 1 < len(prefix) and prefix[p + 1]
            if isinstance(objective, PrefixLM) and objective.document_mask and target == EOS:
                known = False
            n += reads != PAD and target != PAD and not known
    return n


@functools.cache
def loss_of(objective):
    """(batch) -> (loss, score, gradient) of a small model."""
    model = MODELS.get(objective.family, LLAMA)
    if objective.tasks == (MaskedLMAndPair,):
        model = dataclasses.replace(model, task=MaskedLMAndPair())
    graphdef, params = abstract(model).graphdef, random_params(model)
    n_bytes = jnp.full(SIZES["vocab_size"], 2, jnp.int32)

    def f(params, batch):
        loss = lambda p: objective.loss(nnx.merge(graphdef, p), batch, dtype=jnp.float32, key=None)
        gradient, sums = jax.grad(lambda p: (loss(p).total, loss(p)), has_aux=True)(params)
        return sums, objective.score(nnx.merge(graphdef, params), batch, n_bytes, dtype=jnp.float32), gradient

    return functools.partial(jax.jit(f), params)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_rows_with_next_to_nothing_in_them_is_finite_and_weighs_their_targets(name):
    objective = HOLEY[name]
    seq_len = shortest(objective)
    objective.check(seq_len)
    f, rows = loss_of(objective), bad_rows(seq_len)
    batch = examples(name, with_ids(rows))
    for which in ([0] * 6, list(range(6))):  # nothing at all, and everything
        some = {k: x[which] for k, x in batch.items()}
        loss, rows, gradient = f(some)
        score = type(rows)(*map(np.sum, rows))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, score, gradient)))
        assert loss.weight == score.weight == weight_by_hand(objective, some)
        if not any(which):
            assert loss.weight == loss.total == score.nll == score.n_bytes == 0.0
            assert all((g == 0).all() for g in jax.tree.leaves(gradient))
    full, half = (f({k: x[which] for k, x in batch.items()})[0] for which in ([5] * 6, [5, 0, 5, 0, 0, 5]))
    np.testing.assert_allclose(np.array(full), 2 * np.array(half), rtol=1e-5)  # rows of nothing change no other


@every
@pytest.mark.parametrize("longer", [0, 1, 6])
def test_rows_with_next_to_nothing_in_them_have_the_shapes_of_full_ones(name, longer):
    objective = HOLEY[name]
    seq_len = shortest(objective) + longer
    batch = examples(name, with_ids(bad_rows(seq_len)))
    features = objective.features(6, seq_len)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (f.shape, f.dtype) for k, f in features.items()}
    if objective.family == "decoder":
        packed = unpack(jnp.asarray(batch["tokens"]), EOS, PAD)
        assert not np.asarray(packed.weights)[0].any()
