from __future__ import annotations

import dataclasses
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
from lm.nn.position import Rope
from lm.objectives import CausalLM, FillInTheMiddle, noise
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal

V = 47
PRE, SUF, MID = V, V + 1, V + 2
START, PAD = 3, 5
FIM = FillInTheMiddle(prefix_id=PRE, suffix_id=SUF, middle_id=MID, start_id=START, pad_id=PAD)


def with_(**changes) -> FillInTheMiddle:
    return dataclasses.replace(FIM, **changes)


def text(n: int, width: int, seed: int = 0, ends: float = 0.1, padded: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, V, (n, width)).astype(np.int32)
    tokens[rng.random(tokens.shape) < ends] = START
    for i in range(min(padded, n)):
        tokens[i, rng.integers(0, width) :] = PAD
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 13 + 7}


def pieces(tokens: list[int]) -> list[list[int]]:
    """Documents, and parts of them, between ends; padding at the end is taken off."""
    while tokens and tokens[-1] == PAD:
        tokens = tokens[:-1]
    out: list[list[int]] = [[]]
    for t in tokens:
        if t == START:
            out.append([])
        else:
            out[-1].append(t)
    return out


def undone(document: list[int]) -> list[int]:
    """The document as it was written, from what it says of itself."""
    if not document or document[0] != PRE:
        return document
    assert [document.count(t) for t in (PRE, SUF, MID)] == [1, 1, 1]
    suf, mid = document.index(SUF), document.index(MID)
    assert suf < mid
    first, suffix, middle = document[1:suf], document[suf + 1 : mid], document[mid + 1 :]
    return first + middle + suffix  # suffix-prefix-middle has an empty first part


def plain(objective, tokens: list[int], i: int) -> list[int]:
    """A row, document by document, before it is cut to its width."""
    out = []
    parts = pieces(tokens)
    bits = noise.draw(objective.noise_seed, "fim", np.array([i]), 4 * len(parts))
    u = noise.uniform(bits)[0].reshape(-1, 4)
    for k, own in enumerate(parts):
        a, b = sorted(int(x * (len(own) + 1)) for x in u[k, 2:])
        p, m, s = own[:a], own[a:b], own[b:]
        if own and u[k, 0] < objective.rate:
            own = [PRE, SUF, *s, MID, *p, *m] if u[k, 1] < objective.spm_share else [PRE, *p, SUF, *s, MID, *m]
        out += [*own, START]
    return out[:-1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(2, 70),
    ends=st.floats(0.0, 0.6),
    rate=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    spm_share=st.sampled_from([0.0, 0.4, 1.0]),
    padded=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_rows_are_those_of_the_plain_account_and_undo_to_the_original(width, ends, rate, spm_share, padded, seed):
    objective = with_(rate=rate, spm_share=spm_share, noise_seed=seed)
    rows = text(5, width, seed, ends, padded)
    out = objective.examples(rows)["tokens"]
    assert out.shape == rows["tokens"].shape and out.dtype == np.int32
    for tokens, i, got in zip(rows["tokens"].tolist(), rows["id"].tolist(), out.tolist()):
        full = plain(objective, tokens, i)
        assert [undone(d) for d in pieces(full)] == pieces(tokens)
        assert got == (full + [PAD] * width)[:width]
        whole = pieces(got) if len(full) <= width else pieces(got)[:-1]  # the last one is cut
        assert [undone(d) for d in whole] == pieces(tokens)[: len(whole)]
        assert len(full) - len([t for t in tokens if t != PAD]) == 3 * sum(d[:1] == [PRE] for d in pieces(full))


def test_rates_and_cuts_are_those_asked_for_within_binomial_bounds():
    rows = text(3000, 19, padded=0, ends=0.0)
    rows["tokens"][:, 9:] = PAD
    out = with_(rate=0.6, spm_share=0.3).examples(rows)
    first = out["tokens"][:, :2]
    changed, spm = first[:, 0] == PRE, (first == [PRE, SUF]).all(axis=1)
    n = changed.sum()
    assert abs(changed.mean() - 0.6) < 4 * np.sqrt(0.6 * 0.4 / 3000)
    empty = 1 - (9 / 10) ** 2  # the lesser of two cuts among 10 is 0: prefix-suffix-middle begins with [PRE] [SUF] too
    share = 0.3 + 0.7 * empty
    assert abs(spm.sum() / n - share) < 4 * np.sqrt(share * (1 - share) / n)
    psm = with_(rate=1.0, spm_share=0.0).examples(rows)
    prefix = (psm["tokens"] == SUF).argmax(axis=1) - 1
    expected = np.array([((10 - k) ** 2 - (9 - k) ** 2) / 100 for k in range(10)])
    hits = np.bincount(prefix, minlength=10) / 3000
    assert (np.abs(hits - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 3000)).all()


def test_what_is_padding_within_a_row_gives_way_before_its_text_does():
    tokens = np.full((1, 20), 20, np.int32)
    tokens[0, [3, 12]] = START
    tokens[0, 4:12] = PAD  # a document that was left out
    out = with_(rate=1.0).examples({"tokens": tokens, "id": np.arange(1)})["tokens"][0].tolist()
    assert [undone(d) for d in pieces(out)] == [[20] * 3, [20] * 7] and out[-3:] == [PAD] * 3


def test_rows_are_the_same_whatever_the_batch_and_the_input_is_left_alone():
    rows = text(23, 41)
    whole = FIM.examples(rows)["tokens"]
    parts = [FIM.examples({k: v[i] for k, v in rows.items()})["tokens"] for i in np.array_split(np.arange(23), 5)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(rows["tokens"], text(23, 41)["tokens"])
    assert (whole != with_(noise_seed=1).examples(rows)["tokens"]).any()
    assert_equal(with_(rate=0.0).examples(rows)["tokens"], rows["tokens"])


LLAMA = Llama(vocab_size=V + 3, d_model=12, n_layers=1, n_heads=2, d_ff=20, rope=Rope(theta=50.0))


@functools.cache
def fn(objective):
    graphdef, params = abstract(LLAMA).graphdef, random_params(LLAMA)
    f = jax.jit(lambda p, batch: objective.loss(nnx.merge(graphdef, p), batch, dtype=jnp.float32, key=None))
    return lambda batch: f(params, batch)


def test_the_loss_is_causal_lm_of_the_changed_rows():
    batch = FIM.examples(text(4, 24))
    assert_equal(fn(FIM)(batch), fn(CausalLM(start_id=START, pad_id=PAD))(batch))


def test_without_loss_on_sentinels_the_others_count_as_before():
    batch = with_(rate=1.0).examples(text(4, 24, padded=1))
    targets = batch["tokens"][:, 1:]
    quiet, full = fn(with_(sentinel_loss=False)), fn(FIM)
    n_sentinels = np.isin(targets, [PRE, SUF, MID]).sum()
    assert n_sentinels and float(full(batch).weight - quiet(batch).weight) == n_sentinels
    graphdef, params = abstract(LLAMA).graphdef, random_params(LLAMA)
    objective = with_(sentinel_loss=False)
    f = jax.jit(lambda p, b, n: objective.score(nnx.merge(graphdef, p), b, n, dtype=jnp.float32))
    token_bytes = np.arange(100, 103 + V).astype(np.int32)
    score = f(params, batch, token_bytes)
    counted = (targets != PAD) & ~np.isin(targets, [PRE, SUF, MID])
    assert_close(
        tuple(map(np.sum, score)), (quiet(batch).nll, float(counted.sum()), float((100 + targets)[counted].sum()))
    )
    assert (with_(sentinel_loss=False).unit, FIM.unit) == ("token of text", "token")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(suffix_id=PRE), "expected different ids of 0 and more for pad_id, .* got 5, 3, 47, 47, 49"),
        (dict(middle_id=-1), "expected different ids of 0 and more"),
        (dict(rate=1.1), "objective.rate: expected a share from 0 to 1, got 1.1"),
        (dict(spm_share=-0.1), "objective.spm_share: expected a share from 0 to 1, got -0.1"),
        (dict(chunks=0), "objective.chunks: expected at least 1, got 0"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        with_(**change)


def test_a_sentinel_that_the_text_has_is_refused():
    rows = text(3, 20)
    rows["tokens"][2, 4] = 17
    with pytest.raises(UserError, match="objective.suffix_id: .* never makes of text, got 17, which the corpus has"):
        with_(suffix_id=17).examples(rows)
