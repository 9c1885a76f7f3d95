"""The encoders against a float64 account written from the papers, and what sharing, padding and packing promise."""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.config import load
from lm.errors import UserError
from lm.models import (
    Albert,
    Bert,
    LanguageModeling,
    MaskedLMAndPair,
    QuestionAnswering,
    Roberta,
    SequenceClassification,
    TokenClassification,
)
from lm.models.base import abstract
from lm.models.cost import count, flops_per_token
from lm.models.tasks import Task
from lm.nn.compute import Compute
from lm.nn.param import paths
from tests.models.reference import gelu as gelu_tanh
from tests.models.reference import layer_norm, random_params
from tests.tolerances import assert_close

SIZES = {"vocab_size": 53, "d_model": 21, "n_heads": 3, "d_ff": 31, "max_positions": 19}
BERT = Bert(**SIZES, n_layers=2, n_types=3, norm_eps=1e-2, task=MaskedLMAndPair())
ROBERTA = Roberta(**SIZES, n_layers=2, norm_eps=1e-2, activation="relu", pad_id=4, n_types=2)
ALBERT = Albert(
    **SIZES, d_embed=11, n_layers=5, n_groups=2, inner_layers=2, n_types=2, norm_eps=1e-2, task=MaskedLMAndPair()
)
ALBERT_ORDER = (0, 1, 0, 1, 0, 1, 2, 3, 2, 3)  # five layers in two groups: three and two
MODELS = pytest.mark.parametrize("model", [BERT, ROBERTA, ALBERT], ids=["bert", "roberta", "albert"])

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(5, 53, (2, 13)).astype(np.int32)
TYPES = RNG.integers(0, 2, (2, 13)).astype(np.int32)
VALID = np.ones((2, 13), bool)
VALID[0, 9:] = VALID[1, :3] = False


def build(model, params):
    return nnx.merge(abstract(model).graphdef, params)


def run(model, params, tokens=TOKENS, **inputs):
    return jax.jit(lambda params: build(model, params)(tokens, dtype=jnp.float32, **inputs))(params)


# --- the reference ----------------------------------------------------------------------------------------------------


def gelu(x):
    """x Phi(x), with the error function as the integral of a Gaussian (Simpson's rule)."""
    steps = np.linspace(0.0, 1.0, 2001)
    weights = np.where(np.arange(2001) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    inner = np.exp(-((x[..., None] * steps) ** 2) / 2) @ weights / 6000
    return x * (0.5 + x * inner / np.sqrt(2 * np.pi))


def encoder(params, order, activation, *, eps, tokens=TOKENS, types=TYPES, rows=None, valid=VALID):
    """The states of all layers [L+1,B,S,D]; rows [B,S]: of the position table."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    rows = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if rows is None else rows
    x = p["embed"]["table"][tokens] + p["positions"]["table"][rows] + p["types"]["table"][types]
    x = layer_norm(x, **p["norm"], eps=eps)
    if "project" in p:
        x = x @ p["project"]["kernel"] + p["project"]["bias"]
    states = [x]
    for index in order:
        layer = jax.tree.map(operator.itemgetter(index), p["layers"])
        x = layer_norm(x + self_attention(x, layer["attn"], valid), **layer["norm1"], eps=eps)
        m = layer["mlp"]
        y = activation(x @ m["up"] + m["up_bias"]) @ m["down"] + m["down_bias"]
        x = layer_norm(x + y, **layer["norm2"], eps=eps)
        states.append(x)
    return np.stack(states)


def self_attention(x, a, valid):
    out = np.zeros(x.shape) + a["o_bias"]
    for i in range(x.shape[0]):
        for h in range(a["q"].shape[1]):
            q, k, v = (x[i] @ a[n][:, h] + a[f"{n}_bias"][h] for n in "qkv")
            scores = np.where(valid[i], q @ k.T / np.sqrt(q.shape[1]), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[i] += weights / weights.sum(axis=1, keepdims=True) @ v @ a["o"][h]
    return out


def word_logits(params, x, activation, *, eps):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    t = p["head"]["transform"]
    x = layer_norm(activation(x @ t["dense"]["kernel"] + t["dense"]["bias"]), **t["norm"], eps=eps)
    return x @ p["embed"]["table"].T + p["head"]["bias"]


@pytest.mark.parametrize(
    "model, order, activation, head_activation, first_row",
    [
        (BERT, (0, 1), gelu, gelu, 0),
        (ROBERTA, (0, 1), lambda x: np.maximum(x, 0), gelu, 5),
        (ALBERT, ALBERT_ORDER, gelu_tanh, gelu_tanh, 0),
    ],
    ids=["bert", "roberta", "albert"],
)
def test_states_and_logits_are_the_papers(model, order, activation, head_activation, first_row):
    params = random_params(model)
    out = run(model, params, token_types=TYPES, valid=VALID, record=True)
    rows = np.broadcast_to(first_row + np.arange(13), (2, 13))
    states = encoder(params, order, activation, eps=1e-2, rows=rows)
    assert_close(out.states[:, VALID], states[:, VALID])
    assert_close(out.hidden, out.states[-1])
    module = build(model, params)
    assert_close(module.logits(out.hidden)[VALID], word_logits(params, states[-1], head_activation, eps=1e-2)[VALID])
    if isinstance(model.task, MaskedLMAndPair):
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        pooled = np.tanh(states[-1][0, 0] @ p["pooler"]["dense"]["kernel"] + p["pooler"]["dense"]["bias"])
        pair = pooled @ p["pair"]["out"]["kernel"] + p["pair"]["out"]["bias"]
        assert_close(module.pair_logits(out.hidden)[0], pair)


def test_roberta_labels_are_a_dense_layer_on_the_first_token():
    model = dataclasses.replace(ROBERTA, task=SequenceClassification(n_labels=7))
    params, x = random_params(model), RNG.normal(size=(2, 13, 21)).astype(np.float32)
    module = build(model, params)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["labeler"])
    dense = np.tanh(x[:, 0] @ p["dense"]["kernel"] + p["dense"]["bias"])
    assert_close(module.labels(module.pooled(x)), dense @ p["out"]["kernel"] + p["out"]["bias"])


# --- what holds for all -----------------------------------------------------------------------------------------------


@MODELS
def test_padding_does_not_change_real_tokens(model):
    params = random_params(model)
    full = run(model, params, valid=VALID).hidden
    other = np.where(VALID, TOKENS, 5 + (TOKENS + 1) % 48).astype(np.int32)
    assert_close(run(model, params, other, valid=VALID).hidden[VALID], full[VALID])
    assert_close(run(model, params, TOKENS[:1, :9]).hidden, full[:1, :9])


@MODELS
def test_texts_packed_in_a_row_do_not_see_each_other(model):
    params = random_params(model)
    segments = np.array([[1] * 8 + [2] * 5])
    positions = np.array([[*range(8), *range(5)]])
    packed = run(model, params, TOKENS[:1], positions=positions, segments=segments).hidden
    assert_close(packed[:, :8], run(model, params, TOKENS[:1, :8]).hidden)
    assert_close(packed[:, 8:], run(model, params, TOKENS[:1, 8:]).hidden)


@MODELS
def test_token_types_are_0_unless_given(model):
    params = random_params(model)
    given = run(model, params, token_types=np.zeros_like(TOKENS), record=True).states
    assert_close(run(model, params, record=True).states, given)
    assert np.abs(np.asarray(run(model, params, token_types=TYPES, record=True).states - given)).max() > 0.1


def gradient(model, params):
    """Of a weighted sum of the logits."""
    weights = 0.1 * np.random.default_rng(1).normal(size=(2, 13, 53)).astype(np.float32)

    def f(params):
        module = build(model, params)
        return jnp.sum(module.logits(module(TOKENS, dtype=jnp.float32, valid=VALID).hidden) * weights)

    return jax.jit(jax.grad(f))(params)


@MODELS
def test_gradients_do_not_depend_on_scan(model):
    model = dataclasses.replace(model, n_layers=2)
    params = random_params(model)
    assert_close(
        gradient(dataclasses.replace(model, compute=Compute(scan=False, remat="none")), params), gradient(model, params)
    )


@pytest.mark.parametrize("model", [dataclasses.replace(BERT, pad_id=4), ROBERTA], ids=["bert", "roberta"])
def test_padding_teaches_no_row_of_its_own(model):
    """As torch's padding_idx: of the padding token and, in RoBERTa, of its position. Here padding is attended to."""
    tokens = np.where(VALID, TOKENS, 4).astype(np.int32)
    positions = (np.cumsum(VALID, axis=1) * VALID - 1).astype(np.int32) if model is ROBERTA else None

    def f(params):
        return jnp.sum(build(model, params)(tokens, dtype=jnp.float32, positions=positions).hidden[..., 0])

    grad = jax.jit(jax.grad(f))(random_params(model))
    assert (grad["embed"]["table"][4] == 0).all()
    assert (np.abs(grad["embed"]["table"][tokens[VALID]]).max(axis=1) > 0).all()
    learnt = np.abs(grad["positions"]["table"]).max(axis=1) > 0
    assert list(np.flatnonzero(learnt)) == (list(range(5, 15)) if model is ROBERTA else list(range(13)))


def test_a_shared_layer_gets_the_sum_of_the_gradients_of_its_uses():
    shared = dataclasses.replace(ALBERT, n_layers=3, n_groups=1, inner_layers=1, task=LanguageModeling())
    params = random_params(shared)
    alone = dict(params, layers=jax.tree.map(lambda a: np.repeat(a, 3, axis=0), params["layers"]))
    of_each = gradient(dataclasses.replace(shared, n_groups=3), alone)
    of_all = gradient(shared, params)
    assert_close(of_all["layers"], jax.tree.map(lambda g: g.sum(axis=0, keepdims=True), of_each["layers"]))
    assert_close(of_all["project"], of_each["project"])


def test_a_shared_layer_counts_in_the_flops_as_often_as_it_runs():
    shared = dataclasses.replace(ALBERT, n_layers=6, n_groups=1, inner_layers=1, task=LanguageModeling())
    alone = dataclasses.replace(shared, n_groups=6)
    flops = [flops_per_token(model, abstract(model).infos, 13) for model in (shared, alone)]
    assert flops[0] == flops[1]


@pytest.mark.parametrize("model, drops", [(BERT, False), (ALBERT, True)], ids=["bert", "albert"])
def test_only_albert_drops_before_the_label_of_a_pair(model, drops):
    model = dataclasses.replace(model, classifier_dropout=0.5)
    module = build(model, random_params(model))
    x = RNG.normal(size=(2, 13, 21)).astype(np.float32)
    difference = module.pair_logits(x, key=jax.random.key(0)) - module.pair_logits(x)
    assert (np.abs(difference).max() > 0.01) == drops


@MODELS
def test_each_task_has_its_own_head_and_no_other(model):
    def heads(task: Task) -> set[str]:
        return abstract(dataclasses.replace(model, task=task)).params.keys() & {"head", "pooler", "pair", "labeler"}

    assert heads(LanguageModeling()) == {"head"}
    assert heads(TokenClassification(n_labels=5)) == heads(QuestionAnswering()) == {"labeler"}
    assert heads(SequenceClassification(n_labels=5)) == ({"labeler"} if model is ROBERTA else {"pooler", "labeler"})


def test_an_untied_head_has_a_table_of_its_own():
    tied, own = (paths(abstract(dataclasses.replace(BERT, tied=t)).infos) for t in (True, False))
    assert own.keys() - tied.keys() == {"head.table"}


@pytest.mark.parametrize(
    "recipe, n",
    [("bert_base", 110_106_428), ("roberta_base", 124_697_433), ("albert_xxlarge", 223_158_450)],
)
def test_recipes_have_the_published_number_of_parameters(recipe, n):
    """BertForPreTraining of bert-base-uncased, RobertaForMaskedLM of roberta-base, AlbertForPreTraining of
    albert-xxlarge-v2."""
    assert count(abstract(load(recipe).model).infos) == n


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: dataclasses.replace(BERT, n_types=0), "model.n_types: expected at least 1, got 0"),
        (lambda: dataclasses.replace(BERT, max_positions=0), "model.max_positions: expected at least 1, got 0"),
        (lambda: dataclasses.replace(BERT, classifier_dropout=1.0), "model.classifier_dropout: expected a rate"),
        (lambda: dataclasses.replace(BERT, n_heads=4), "model.n_heads: 4 does not divide model.d_model 21"),
        (lambda: dataclasses.replace(ALBERT, n_groups=6), "model.n_groups: expected at most model.n_layers 5, got 6"),
        (lambda: dataclasses.replace(ALBERT, inner_layers=0), "model.inner_layers: expected at least 1, got 0"),
        (lambda: dataclasses.replace(ALBERT, d_embed=0), "model.d_embed: expected at least 1, got 0"),
        (lambda: dataclasses.replace(ROBERTA, pad_id=-1), "model.pad_id: expected 0 or more, .* got -1"),
        (lambda: dataclasses.replace(ROBERTA, pad_id=None), "model.pad_id: expected 0 or more, .* got None"),
        (lambda: dataclasses.replace(ROBERTA, pad_id=18), "model.max_positions: expected more than the 19 rows"),
        (
            lambda: dataclasses.replace(ROBERTA, task=MaskedLMAndPair()),
            "model.task: .* for Roberta, got MaskedLMAndPair",
        ),
        (lambda: abstract(dataclasses.replace(BERT, task=Task())), "model.task: .* for an encoder, got Task"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        change()


def test_roberta_keeps_the_first_rows_of_its_positions_for_padding():
    assert ROBERTA.max_seq_len == 19 - 5
    assert abstract(ROBERTA).params["positions"]["table"].shape == (19, 21)
