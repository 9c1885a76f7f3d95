from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.models import Llama
from lm.models.base import abstract
from lm.nn.kernels.reference import attend
from lm.nn.mask import causal_mask
from lm.nn.position import Rope
from lm.objectives import CausalLM, PrefixLM, noise
from lm.objectives.causal_lm import unpack
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal

V, S = 53, 12
START, PAD = 3, 7
IDS = dict(start_id=START, pad_id=PAD)
LLAMA = Llama(vocab_size=V, d_model=12, n_layers=2, n_heads=2, d_ff=20, rope=Rope(theta=50.0))
A, C = [20, 31, 5, 44, 11], [9, 50, 16]


def row(*tokens: int) -> np.ndarray:
    return np.array([[*tokens, *[PAD] * (S + 1 - len(tokens))]], np.int32)


def text(n: int, seq_len: int, seed: int = 0, ends: float = 0.1, padded: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, V, (n, seq_len + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < ends] = START
    for i in range(min(padded, n)):
        tokens[i, rng.integers(0, seq_len + 1) :] = PAD
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 11 + 40}


def may_see(segments, prefix, window):
    """bool [B,S,S] in loops."""
    b, s = segments.shape
    out = np.zeros((b, s, s), bool)
    for i in range(b):
        for q in range(s):
            for k in range(s):
                near = window is None or q - k < window
                out[i, q, k] = segments[i, q] == segments[i, k] and near and (k <= q or prefix[i, k])
    return out


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("block", [0, 3, 5])
def test_attention_with_a_prefix_agrees_with_numpy_for_any_blocks(window, block):
    rng = np.random.default_rng(1)
    b, s, h, k = 3, 23, 2, 5
    q, key, v = (rng.normal(size=(b, s, h, k)).astype(np.float32) for _ in range(3))
    segments = np.cumsum(rng.random((b, s)) < 0.15, axis=1)
    prefix = rng.random((b, s)) < 0.4  # any keys, contiguous or not
    seen = may_see(segments, prefix, window)
    mask = causal_mask(s, jnp.asarray(segments), jnp.asarray(prefix)).within(window)
    np.testing.assert_array_equal(np.asarray(mask.dense())[:, 0], seen)
    scores = np.einsum("bshk,bthk->bhst", q, key).astype(np.float64) / np.sqrt(k)
    weights = np.exp(np.where(seen[:, None], scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhst,bthk->bshk", weights, v)
    assert_close(jax.jit(functools.partial(attend, block=block))(q, key, v, mask), expected)


def test_a_window_still_skips_the_keys_before_it():
    prefix = jnp.zeros((1, 40), bool)
    assert causal_mask(40, None, prefix).within(4).keys_for(slice(20, 25)) == slice(17, 40)
    assert causal_mask(40).within(4).keys_for(slice(20, 25)) == slice(17, 25)


@functools.cache
def model_of():
    graphdef, params = abstract(LLAMA).graphdef, random_params(LLAMA)

    def hidden(params, tokens, prefix):
        packed = unpack(tokens, START, PAD)
        within = {"positions": packed.positions, "segments": packed.segments}
        return nnx.merge(graphdef, params)(packed.inputs, dtype=jnp.float32, prefix=prefix, **within).hidden

    return functools.partial(jax.jit(hidden), params)


def test_a_token_of_the_prefix_is_seen_by_those_before_it_in_its_document_and_by_no_other():
    tokens = row(START, *A, START, *C, START, 20)
    prefix = np.zeros((1, S), bool)
    prefix[0, :4] = prefix[0, 6:8] = True  # START A0 A1 A2 | A3 A4; START C0 | C1 C2
    before = np.asarray(model_of()(tokens, prefix))

    def moved(at):
        other = tokens.copy()
        other[0, at] = 33
        return set(np.flatnonzero(np.abs(np.asarray(model_of()(other, prefix)) - before).max(axis=(0, 2)) > 1e-6))

    assert moved(3) == {0, 1, 2, 3, 4, 5}  # the last of the prefix
    assert moved(4) == {4, 5}  # the first after it
    assert moved(7) == {6, 7, 8, 9}


def split(objective, tokens, i) -> list[bool]:
    """The prefix of one row, document by document."""
    u = noise.uniform(noise.draw(objective.noise_seed, "prefix_lm", np.array([i]), len(tokens) - 1))[0]
    inputs, out, begin = tokens[:-1], [], 0
    opens = [p for p, t in enumerate(inputs) if t == START and p > 0] if objective.document_mask else []
    for end in [*opens, len(inputs)]:
        n = sum(t != PAD for t in tokens[begin + 1 : end + 1])
        share = objective.min_prefix + (objective.max_prefix - objective.min_prefix) * u[begin]
        p = 1 + min(int(share * n), n - 1) if n else 0
        out += [True] * p + [False] * (end - begin - p)
        begin = end
    return out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seq_len=st.integers(1, 60),
    ends=st.floats(0.0, 0.6),
    bounds=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2).map(sorted),
    document_mask=st.booleans(),
    seed=st.integers(0, 9),
)
def test_documents_are_split_where_the_plain_account_says(seq_len, ends, bounds, document_mask, seed):
    objective = PrefixLM(
        **IDS, min_prefix=bounds[0], max_prefix=bounds[1], document_mask=document_mask, noise_seed=seed
    )
    rows = text(5, seq_len, seed, ends)
    batch = objective.examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(5, seq_len).items()
    }
    assert batch["tokens"] is rows["tokens"]
    expected = [split(objective, tokens, i) for tokens, i in zip(rows["tokens"].tolist(), rows["id"])]
    np.testing.assert_array_equal(batch["prefix"], expected)


@pytest.mark.parametrize("document_mask", [True, False])
def test_targets_count_from_the_first_after_the_prefix_on(document_mask):
    objective = PrefixLM(**IDS, document_mask=document_mask)
    batch = objective.examples(text(40, 37, ends=0.15, padded=9))
    packed = unpack(jnp.asarray(batch["tokens"]), START, PAD)
    weights = np.asarray(objective.weights({k: jnp.asarray(v) for k, v in batch.items()}, packed))
    everything = np.asarray(dataclass_all(objective).weights(batch, packed))
    for tokens, prefix, own, all_own in zip(batch["tokens"], batch["prefix"], weights, everything):
        for p in range(37):
            next_known = p + 1 < 37 and prefix[p + 1] and not (document_mask and tokens[p + 1] == START)
            assert own[p] == (tokens[p + 1] != PAD and not next_known)
            assert all_own[p] == (tokens[p + 1] != PAD)
    has_text = (batch["tokens"][:, 1:] != PAD).any(axis=1)
    assert (weights.sum(axis=1)[has_text] >= 1).all()


def dataclass_all(objective):
    return PrefixLM(**IDS, document_mask=objective.document_mask, loss_on="all")


def test_the_split_is_uniform():
    rows = {"tokens": np.full((4000, 11), 20, np.int32), "id": np.arange(4000)}
    n = PrefixLM(**IDS).examples(rows)["prefix"].sum(axis=1)
    hits = np.bincount(n, minlength=11)[1:] / 4000
    assert len(hits) == 10 and np.abs(hits - 0.1).max() < 4.5 * np.sqrt(0.1 * 0.9 / 4000)


@functools.cache
def loss_fn(objective):
    graphdef, params = abstract(LLAMA).graphdef, random_params(LLAMA)
    f = jax.jit(lambda p, batch: objective.loss(nnx.merge(graphdef, p), batch, dtype=jnp.float32, key=None))
    return lambda batch: f(params, batch)


def test_without_a_prefix_the_loss_is_that_of_causal_lm():
    rows = text(5, S, ends=0.2)
    objective = PrefixLM(**IDS, max_prefix=0.0, z_loss=0.01)
    assert_close(loss_fn(objective)(objective.examples(rows)), loss_fn(CausalLM(**IDS, z_loss=0.01))(rows))


def test_packed_documents_lose_what_each_loses_alone():
    f = loss_fn(PrefixLM(**IDS))

    def prefix(*lengths):
        out = np.zeros((1, S), bool)
        for at, n in lengths:
            out[0, at : at + n] = True
        return out

    alone = [
        f({"tokens": row(START, *A, START), "prefix": prefix((0, 3))}),
        f({"tokens": row(START, *C, START), "prefix": prefix((0, 2))}),
    ]
    assert [float(x.weight) for x in alone] == [4, 3]
    together = f({"tokens": row(START, *A, START, *C, START), "prefix": prefix((0, 3), (6, 2))})
    assert_close(together, jax.tree.map(jnp.add, *alone))


@pytest.mark.parametrize("loss_on", ["suffix", "all"])
def test_documents_around_one_left_out_are_cut_and_lose_as_they_would_alone(loss_on):
    objective = PrefixLM(**IDS, min_prefix=0.5, max_prefix=0.5, loss_on=loss_on)
    f = loss_fn(objective)
    made = lambda *tokens: objective.examples({"tokens": row(*tokens), "id": np.arange(1)})
    first, second = made(START, *A[:3], START), made(START, *C, START)
    batch = made(START, *A[:3], START, PAD, PAD, PAD, START, *C, START)
    np.testing.assert_array_equal(batch["prefix"][0, :4], first["prefix"][0, :4])
    assert not batch["prefix"][0, 4:8].any()  # a row that ends there has no prefix there either
    np.testing.assert_array_equal(batch["prefix"][0, 8:], second["prefix"][0, :4])
    assert_close(f(batch), jax.tree.map(jnp.add, f(first), f(second)))
    assert_close(f(made(PAD, PAD, START, *C, START)), f(second))


def test_a_row_that_is_one_text_is_cut_without_the_documents_left_out():
    objective = PrefixLM(**IDS, document_mask=False)
    with_hole, without = (
        objective.examples({"tokens": row(*tokens), "id": np.arange(1)})
        for tokens in ([*A, START, PAD, PAD, START, *C], [*A, START, *C])
    )
    assert_equal(with_hole, without)


def test_score_counts_the_bytes_of_the_suffix_alone():
    objective = PrefixLM(**IDS, min_prefix=0.5, max_prefix=0.5, z_loss=0.1)
    graphdef, params = abstract(LLAMA).graphdef, random_params(LLAMA)
    batch = objective.examples({"tokens": row(START, *A, START, *C, START), "id": np.arange(1)})
    token_bytes = np.arange(100, 100 + V).astype(np.int32)
    f = jax.jit(lambda p, b, n: objective.score(nnx.merge(graphdef, p), b, n, dtype=jnp.float32))
    score = jax.tree.map(np.sum, f(params, batch, token_bytes))
    suffix = [*A[3:], START, *C[2:], START]  # of 6 and of 4 targets, floor(f n) are known
    assert float(score.weight) == len(suffix) and int(score.n_bytes) == sum(100 + t for t in suffix)
    assert_equal(score.nll, loss_fn(PrefixLM(**IDS, min_prefix=0.5, max_prefix=0.5))(batch).nll)
    assert objective.unit == "suffix token" and dataclass_all(objective).unit == "target"


def test_rows_are_the_same_whatever_the_batch():
    objective, rows = PrefixLM(**IDS), text(23, 31)
    whole = objective.examples(rows)["prefix"]
    parts = [objective.examples({k: v[i] for k, v in rows.items()})["prefix"] for i in np.array_split(np.arange(23), 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (whole != PrefixLM(**IDS, noise_seed=1).examples(rows)["prefix"]).any()


@pytest.mark.parametrize("bounds", [(-0.1, 1.0), (0.6, 0.5), (0.0, 1.1)])
def test_a_range_that_is_none_is_refused(bounds):
    with pytest.raises(UserError, match="objective.min_prefix, objective.max_prefix: expected shares .* min <= max"):
        PrefixLM(min_prefix=bounds[0], max_prefix=bounds[1])
