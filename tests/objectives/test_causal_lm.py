from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.errors import UserError
from lm.models import GPT2, Llama, Mixtral
from lm.models.base import abstract
from lm.nn.position import Rope
from lm.objectives import CausalLM
from lm.objectives.causal_lm import unpack
from tests.models import reference
from tests.models.reference import random_params
from tests.tolerances import assert_close

V, S = 53, 12
LLAMA = Llama(vocab_size=V, d_model=12, n_layers=2, n_heads=2, d_ff=20, rope=Rope(theta=50.0))
START, PAD = 3, 7  # not the defaults, which a constant in the wrong place could equal
OBJECTIVE = CausalLM(start_id=START, pad_id=PAD, z_loss=0.01, label_smoothing=0.1, chunks=3)
A, C = [20, 31, 5, 44, 11], [9, 50, 16]


def row(*tokens: int) -> np.ndarray:
    return np.array([[*tokens, *[PAD] * (S + 1 - len(tokens))]], np.int32)


@functools.cache
def loss_fn(**changes):
    graphdef, params = abstract(LLAMA).graphdef, random_params(LLAMA)
    objective = CausalLM(**{"start_id": START, "pad_id": PAD} | changes)
    f = jax.jit(lambda p, batch: objective.loss(nnx.merge(graphdef, p), batch, dtype=jnp.float32, key=None))
    return lambda tokens: f(params, {"tokens": tokens})


def test_unpack_of_a_row_with_several_documents_and_padding():
    # The end of a document, two documents, the start of a third that padding cuts; and a row that begins with a start.
    tokens = np.array([[20, 21, 3, 22, 23, 24, 3, 25, 3, 26, 7, 7], [3, 30, 3, 31, 32, 33, 34, 35, 36, 37, 38, 39]])
    packed = unpack(jnp.asarray(tokens, jnp.int32), START, PAD)
    np.testing.assert_array_equal(packed.inputs, tokens[:, :-1])
    np.testing.assert_array_equal(packed.targets, tokens[:, 1:])
    np.testing.assert_array_equal(packed.segments[0], [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    np.testing.assert_array_equal(packed.segments[1], [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(packed.positions[0], [0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 2])
    np.testing.assert_array_equal(packed.positions[1], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(packed.weights[0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(packed.weights[1], np.ones(11))
    assert packed.weights.dtype == jnp.float32 and packed.segments.dtype == packed.positions.dtype == jnp.int32


def test_packed_documents_lose_what_each_loses_alone():
    loss = loss_fn()
    alone = [loss(row(START, *document, START)) for document in (A, C)]
    assert [float(x.weight) for x in alone] == [6, 4]
    for documents in ((A, C), (C, A)):
        together = loss(row(START, *documents[0], START, *documents[1], START))
        assert_close(together, jax.tree.map(jnp.add, *alone))


def test_without_the_document_mask_a_document_sees_the_one_before():
    tokens = row(START, *A, START, *C, START)
    assert abs(loss_fn(document_mask=False)(tokens).nll - loss_fn()(tokens).nll) > 0.01
    assert_close(loss_fn(document_mask=False)(row(START, *A)), loss_fn()(row(START, *A)))


def test_padding_that_stands_for_a_document_is_of_no_other_and_nothing_is_predicted_from_it():
    tokens = np.array([[20, 21, 3, 7, 7, 3, 22, 3, 7, 3, 23, 7], [7, 7, 3, 20, 21, 3, 3, 22, 3, 7, 7, 7]])
    packed = unpack(jnp.asarray(tokens, jnp.int32), START, PAD)
    np.testing.assert_array_equal(packed.segments[0], [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4])
    np.testing.assert_array_equal(packed.positions[0], [0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(packed.weights[0], [1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(packed.segments[1], [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4])
    np.testing.assert_array_equal(packed.weights[1], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0])


def test_where_padding_is_spelt_as_the_separator_the_first_token_of_a_document_still_counts():
    tokens = jnp.asarray([[20, 3, 21, 22, 3, 3, 23, 3, 3]], jnp.int32)
    np.testing.assert_array_equal(unpack(tokens, 3, 3).weights, [[0, 1, 1, 0, 0, 1, 0, 0]])


MOE = Mixtral(vocab_size=V, d_model=12, n_layers=2, n_heads=2, d_ff=20, n_experts=3, top_k=2, rope=Rope(theta=50.0))


@pytest.mark.parametrize("model", [LLAMA, MOE], ids=["dense", "experts"])
def test_documents_around_one_left_out_lose_what_each_loses_alone(model):
    """The padding comes to no expert either; the losses of a router are of all tokens together, and left out here."""
    graphdef, params = abstract(model).graphdef, random_params(model)
    objective = CausalLM(start_id=START, pad_id=PAD, router_balance=0.0)
    f = jax.jit(lambda p, batch: objective.loss(nnx.merge(graphdef, p), batch, dtype=jnp.float32, key=None))
    loss = lambda tokens: f(params, {"tokens": tokens})
    first, second = A[:3], C  # the end of the first is followed by padding and counts; the second's own end too
    alone = jax.tree.map(jnp.add, loss(row(START, *first, START)), loss(row(START, *second, START)))
    assert alone.weight == 8
    for hole in (1, 2, 3):
        assert_close(loss(row(START, *first, START, *[PAD] * hole, START, *second, START)), alone)
    at_the_start = loss(row(PAD, PAD, START, *second, START))
    assert_close(at_the_start, loss(row(START, *second, START)))


def test_a_row_that_is_one_text_is_without_the_documents_left_out():
    objective = CausalLM(start_id=START, pad_id=PAD, document_mask=False)
    holey = np.concatenate([row(START, *A[:3], START, PAD, PAD, START, *C), row(PAD, START, *C)])
    closed = np.concatenate([row(START, *A[:3], START, *C), row(START, *C)])
    batch = objective.examples({"tokens": holey, "id": np.arange(2)})
    np.testing.assert_array_equal(batch["tokens"], closed)
    assert objective.examples({"tokens": closed, "id": np.arange(2)})["tokens"] is closed


def test_loss_agrees_with_numpy():
    tokens = np.concatenate([row(18, START, *A, START, *C), row(START, *C), row(*A)])
    actual = loss_fn(z_loss=0.01, label_smoothing=0.1, chunks=3)(tokens)
    segments = np.cumsum(tokens[:, :-1] == START, axis=1)
    positions = np.array([[sum(r[:i] == r[i]) for i in range(S)] for r in segments])
    _, logits = reference.llama(
        random_params(LLAMA), tokens[:, :-1], eps=LLAMA.norm_eps, theta=50.0, positions=positions, segments=segments
    )
    weights = (tokens[:, 1:] != PAD) * 1.0
    total, nll = reference.cross_entropy(logits, tokens[:, 1:], weights, 0.01, 0.1)
    assert_close(tuple(actual), (total, nll, weights.sum()))
    assert actual.weight == 10 + 3 + 4


def test_gradient_of_a_tied_model_agrees_with_that_of_its_logits():
    """The table gathers gradient from both ends; GPT-2 also has every kind of bias."""
    model = GPT2(vocab_size=V, d_model=12, n_layers=2, n_heads=2, max_positions=S)
    graphdef, params = abstract(model).graphdef, random_params(model)
    tokens = np.concatenate([row(18, START, *A, START, *C), row(START, *C)])

    def loss(params):
        return OBJECTIVE.loss(nnx.merge(graphdef, params), {"tokens": tokens}, dtype=jnp.float32, key=None).total

    def naive(params):
        module, packed = nnx.merge(graphdef, params), unpack(tokens, START, PAD)
        x = module(packed.inputs, dtype=jnp.float32, positions=packed.positions, segments=packed.segments).hidden
        logits = module.logits(x)
        aim = 0.9 * jax.nn.one_hot(packed.targets, V) + 0.1 / V
        per_token = -jnp.sum(aim * jax.nn.log_softmax(logits), -1) + 0.01 * jax.nn.logsumexp(logits, -1) ** 2
        return jnp.sum(per_token * (packed.targets != PAD))

    assert_close(jax.jit(jax.grad(loss))(params), jax.jit(jax.grad(naive))(params))


def test_score_is_the_bare_nll_and_the_bytes_of_the_targets():
    graphdef, params = abstract(LLAMA).graphdef, random_params(LLAMA)
    token_bytes = np.arange(100, 100 + V).astype(np.int32)
    token_bytes[START] = 0  # an end of a document is predicted, but stands for no text
    tokens = row(18, START, *A, START, *C)
    f = jax.jit(lambda p, b, n: OBJECTIVE.score(nnx.merge(graphdef, p), b, n, dtype=jnp.float32))
    score, loss = f(params, {"tokens": tokens}, token_bytes), loss_fn()(tokens)
    assert_close(tuple(map(np.sum, score)), (loss.nll, 10.0, float(sum(100 + t for t in A + C))))
    assert_close(loss.total, loss.nll)


def test_features_are_the_rows_of_the_store():
    assert OBJECTIVE.features(5, S) == {"tokens": jax.ShapeDtypeStruct((5, S + 1), jnp.int32)}
    tokens = row(*A)
    assert OBJECTIVE.examples({"tokens": tokens, "id": np.arange(1)})["tokens"] is tokens


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(chunks=0), "objective.chunks: expected at least 1, got 0"),
        (dict(label_smoothing=1.0), r"objective.label_smoothing: expected a rate in \[0, 1\), got 1.0"),
        (dict(z_loss=-0.1), "objective.z_loss: expected 0 or more, got -0.1"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        CausalLM(**change)


def test_chunks_that_do_not_divide_the_sequence_are_refused():
    with pytest.raises(UserError, match="objective.chunks: 3 does not divide data.seq_len 13"):
        OBJECTIVE.check(13)
    OBJECTIVE.check(12)
