from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.objectives import MaskedLM
from tests.models import reference
from tests.tolerances import assert_close

V = 47  # of the tokenizer; the specials follow
IDS = dict(mask_id=V, cls_id=V + 1, sep_id=V + 2, vocab_size=V)
PAD, EOS, NEWLINE, MASK, CLS, SEP = 0, 1, 3, V, V + 1, V + 2
N, S = 23, 61


def text(n=N, seq_len=S, seed=0, newlines=0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, V, (n, seq_len + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.05] = EOS
    tokens[rng.random(tokens.shape) < newlines] = NEWLINE
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 7 + 100}


def restored(batch) -> np.ndarray:
    """The rows before they were masked."""
    tokens = batch["tokens"].copy()
    for row, (at, targets, weights) in enumerate(zip(batch["positions"], batch["targets"], batch["weights"])):
        for p, t, w in zip(at, targets, weights):
            if w:
                tokens[row, p] = t
    return tokens


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seq_len=st.integers(3, 80),
    rate=st.floats(0.01, 0.9),
    span=st.integers(1, 5),
    padding=st.integers(0, 80),
    seed=st.integers(0, 9),
)
def test_inputs_and_targets_give_the_row_back(seq_len, rate, span, padding, seed):
    objective = MaskedLM(**IDS, rate=rate, span=span, noise_seed=seed)
    objective.check(seq_len)
    rows = text(5, seq_len, seed)
    rows["tokens"][0, seq_len + 1 - min(padding, seq_len + 1) :] = PAD
    batch = objective.examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(5, seq_len).items()
    }
    for row, back in zip(rows["tokens"], restored(batch)):
        own = row[: seq_len - 2]
        own = own[own != PAD]
        np.testing.assert_array_equal(back, [CLS, *own, SEP, *[PAD] * (seq_len - 2 - len(own))])
    n_real = np.array([sum(t not in (PAD, EOS) for t in row[: seq_len - 2]) for row in rows["tokens"]])
    counts = np.where(n_real, np.maximum(np.floor(rate * n_real + 0.5), 1), 0)
    np.testing.assert_array_equal(batch["weights"].sum(axis=1), counts)
    assert (np.diff(batch["weights"], axis=1) <= 0).all()
    for at, weights in zip(batch["positions"], batch["weights"]):
        at = at[weights > 0]
        assert (np.diff(at) > 0).all()


def test_specials_padding_and_ends_of_documents_are_never_touched():
    rows = text(newlines=0.1)
    rows["tokens"][2, 9:] = PAD
    rows["tokens"][3] = PAD
    for pair in ("none", "sop"):
        batch = MaskedLM(**IDS, rate=0.95, mask_share=1.0, random_share=0.0, pair=pair).examples(rows)
        before, counted = restored(batch), batch["weights"] > 0
        assert not np.isin(batch["targets"][counted], [PAD, EOS, MASK, CLS, SEP]).any()
        changed = before != batch["tokens"]
        assert changed.sum() == counted.sum() and (batch["tokens"][changed] == MASK).all()
        assert (batch["targets"][~counted] == PAD).all() and (batch["positions"][~counted] == 0).all()
        assert not counted[3].any() and (batch["tokens"][3] != MASK).all()


def test_shares_are_those_asked_for_within_binomial_bounds():
    rows = text(400, 127)
    batch = MaskedLM(**IDS, rate=0.3, mask_share=0.7, random_share=0.2).examples(rows)
    counted = batch["weights"] > 0
    shown = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)[counted]
    targets = batch["targets"][counted]
    n = len(targets)
    n_random = V - 2  # every id of the tokenizer but padding and eos
    for share, hits in [
        (0.7, shown == MASK),
        (0.1 + 0.2 / n_random, shown == targets),
        (0.2 * (1 - 1 / n_random), (shown != MASK) & (shown != targets)),
    ]:
        assert abs(hits.mean() - share) < 4 * np.sqrt(share * (1 - share) / n)
    drawn = np.bincount(shown[(shown != MASK) & (shown != targets)], minlength=V)
    assert set(np.flatnonzero(drawn)) == set(range(V)) - {PAD, EOS}


def test_random_tokens_skip_specials_that_lie_within_the_vocabulary():
    objective = MaskedLM(
        mask_id=5, cls_id=9, sep_id=10, vocab_size=14, rate=0.9, mask_share=0.0, random_share=1.0, pad_id=0, start_id=1
    )
    rows = text(60, 83)
    rows["tokens"] = np.where(rows["tokens"] > 13, 12, 11).astype(np.int32)
    batch = objective.examples(rows)
    shown = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)[batch["weights"] > 0]
    assert set(np.unique(shown)) == set(range(14)) - {0, 1, 5, 9, 10}


@pytest.mark.parametrize("span", [1, 3])
def test_every_place_is_predicted_equally_often(span):
    rows = text(3000, 41)
    rows["tokens"][:] = 20
    batch = MaskedLM(**IDS, span=span).examples(rows)
    hits = np.bincount(batch["positions"][batch["weights"] > 0], minlength=41)[1:-1] / 3000
    p = 6 / 39  # round(0.15 * 39) of 39
    assert np.abs(hits - p).max() < 4 * np.sqrt(p * (1 - p) / 3000)


def test_spans_have_lengths_in_proportion_to_their_inverse():
    rows = text(300, 1021)
    rows["tokens"][:] = 20
    batch = MaskedLM(**IDS, rate=0.03, span=3).examples(rows)
    lengths = []
    for at, weights in zip(batch["positions"], batch["weights"]):
        runs = np.split(at[weights > 0], np.flatnonzero(np.diff(at[weights > 0]) > 1) + 1)
        lengths += [len(r) for r in runs]
    share = np.bincount(lengths, minlength=4)[1:4] / len(lengths)
    # 6 : 3 : 2; neighbouring spans that run together and the cut last one move a few per cent.
    np.testing.assert_allclose(share, np.array([6, 3, 2]) / 11, atol=0.04)


def test_no_span_crosses_the_end_of_a_document():
    """Where every second token is an end, tokens are predicted one by one: two picks are neighbours by chance alone."""
    rows = {"tokens": np.full((2000, 42), 20, np.int32), "id": np.arange(2000)}
    rows["tokens"][:, 1::2] = EOS
    batch = MaskedLM(**IDS, rate=0.1, span=3).examples(rows)
    picks = batch["positions"][batch["weights"].sum(axis=1) == 2, :2]
    assert len(picks) == 2000
    chance = 2 / 20  # of the 20 * 19 / 2 pairs, 19 are neighbours
    assert abs(np.mean(picks[:, 1] - picks[:, 0] == 2) - chance) < 4 * np.sqrt(chance * (1 - chance) / 2000)


@pytest.mark.parametrize("changes", [{}, {"span": 3}, {"pair": "sop"}])
def test_rows_are_the_same_whatever_the_batch(changes):
    objective, rows = MaskedLM(**IDS, **changes), text(newlines=0.1)
    whole = objective.examples({k: v.copy() for k, v in rows.items()})
    parts = [objective.examples({k: v[i] for k, v in rows.items()}) for i in np.array_split(np.arange(N)[::-1], 4)]
    for name, x in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts])[::-1], x)


def test_examples_leaves_the_rows_alone():
    for pair in ("none", "sop"):
        rows = text(newlines=0.1)
        MaskedLM(**IDS, pair=pair).examples(rows)
        np.testing.assert_array_equal(rows["tokens"], text(newlines=0.1)["tokens"])


def test_another_id_or_seed_gives_other_noise():
    rows = text(2)
    rows["tokens"][1] = rows["tokens"][0]
    batch = MaskedLM(**IDS).examples(rows)
    assert (batch["positions"][0] != batch["positions"][1]).any()
    other = MaskedLM(**IDS, noise_seed=1).examples(rows)
    assert (batch["positions"] != other["positions"]).any(axis=1).all()


def sop_row(tokens: list[int], seq_len: int, swapped: bool) -> tuple[list[int], list[int]]:
    """(tokens, types) of one row, written with lists."""
    own = [t for t in tokens[: seq_len - 3] if t != PAD]
    cuts = [i + 1 for i, t in enumerate(own[:-1]) if t in (NEWLINE, EOS)]
    cut = min(cuts, key=lambda c: abs(2 * c - len(own))) if cuts else len(own) // 2
    a, b = (own[cut:], own[:cut]) if swapped else (own[:cut], own[cut:])
    out, types = [CLS, *a, SEP, *b, SEP], [0] * (len(a) + 2) + [1] * (len(b) + 1)
    padding = [0] * (seq_len - len(out))
    return out + padding, types + padding


def test_sentence_order_cuts_at_the_boundary_nearest_the_middle_and_swaps_half():
    rows = text(300, newlines=0.03)
    rows["tokens"][1, 12:] = PAD
    rows["tokens"][2, 2:] = PAD
    rows["tokens"][3, 1:] = PAD
    rows["tokens"][4] = PAD
    rows["tokens"][5] = 20  # no boundary
    batch = MaskedLM(**IDS, pair="sop").examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in MaskedLM(**IDS, pair="sop").features(300, S).items()
    }
    for i, (row, back) in enumerate(zip(rows["tokens"].tolist(), restored(batch))):
        expected, kinds = sop_row(row, S, batch["pair"][i] == 1)
        assert back.tolist() == expected and batch["token_types"][i].tolist() == kinds, i
    assert batch["pair"].tolist()[3:5] == [-1, -1] and set(batch["pair"].tolist()[5:] + [batch["pair"][2]]) == {0, 1}
    assert abs(batch["pair"][5:].mean() - 0.5) < 4 * 0.5 / np.sqrt(295)


D = 5
rng = np.random.default_rng(0)
TABLES = {
    "token": rng.normal(size=(V + 3, D)),
    "type": rng.normal(size=(2, D)),
    "place": rng.normal(size=(S, D)),
    "head": rng.normal(size=(D, V + 3)),
    "pair": rng.normal(size=(D, 2)),
}


class Encoder:
    """A model whose hidden states tell the token, the place, the type and the number of valid tokens."""

    def __init__(self, p):
        self.p = p

    def __call__(self, tokens, *, dtype, token_types=None, valid=None, key=None):
        x = self.p["token"][tokens] + self.p["place"][: tokens.shape[1]]
        x = x + (0.0 if token_types is None else self.p["type"][token_types])
        return types.SimpleNamespace(hidden=(x * jnp.sum(valid, axis=1)[:, None, None] / S).astype(dtype), router=None)

    def head_fn(self):
        return lambda params, x: (x @ params).astype(jnp.float32), self.p["head"]

    def pair_logits(self, hidden):
        return (hidden[:, 0] @ self.p["pair"]).astype(jnp.float32)


PARAMS = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), TABLES)


def in_numpy(batch, z_loss):
    """(total, nll, weight) of one row after another, in float64."""
    sums = np.zeros(3)
    for i in range(len(batch["tokens"])):
        tokens = batch["tokens"][i]
        hidden = TABLES["token"][tokens] + TABLES["place"]
        if "pair" in batch:
            hidden = hidden + TABLES["type"][batch["token_types"][i]]
        hidden = hidden * sum(tokens != PAD) / S
        counted = batch["weights"][i] > 0
        logits = hidden[batch["positions"][i][counted]] @ TABLES["head"]
        total, nll = reference.cross_entropy(
            logits[None], batch["targets"][i][counted][None], np.ones((1, counted.sum())), z_loss, 0.0
        )
        if "pair" in batch and batch["pair"][i] >= 0:
            two = hidden[0] @ TABLES["pair"]
            total += counted.sum() * (np.log(np.exp(two).sum()) - two[batch["pair"][i]])
        sums += total, nll, counted.sum()
    return tuple(sums)


@pytest.mark.parametrize("pair", ["none", "sop", "nsp"])
def test_loss_agrees_with_numpy(pair):
    rows = text(7, newlines=0.1)
    rows["tokens"][1, 9:] = PAD
    rows["tokens"][2, 1:] = PAD
    rows["tokens"][3] = PAD
    objective = MaskedLM(**IDS, pair=pair, z_loss=0.01, chunks=5)
    objective.check(S)
    batch = objective.examples(rows | {"other": text(7, seed=1)["tokens"]})
    loss = jax.jit(lambda p, b: objective.loss(Encoder(p), b, dtype=jnp.float32, key=None))(PARAMS, batch)
    assert_close(tuple(loss), in_numpy(batch, 0.01))


def test_the_mean_of_a_loss_with_pairs_is_the_sum_of_two_means():
    rows = text(6, newlines=0.1)
    rows["tokens"][rows["tokens"] == EOS] = 20  # as many predictions in every row
    batch = MaskedLM(**IDS, pair="sop").examples(rows)
    loss = MaskedLM(**IDS, pair="sop").loss(Encoder(PARAMS), batch, dtype=jnp.float32, key=None)
    hidden = TABLES["token"][batch["tokens"]] + TABLES["type"][batch["token_types"]] + TABLES["place"]
    two = hidden[:, 0] @ TABLES["pair"]
    pair = np.log(np.exp(two).sum(axis=1)) - two[np.arange(6), batch["pair"]]
    assert_close(loss.total / loss.weight, float(loss.nll / loss.weight) + pair.mean())


def test_score_is_the_bare_nll_and_the_bytes_of_the_masked_tokens():
    rows = text(5, newlines=0.1)
    objective = MaskedLM(**IDS, pair="sop", z_loss=0.1)
    batch = objective.examples(rows)
    token_bytes = np.arange(100, 103 + V).astype(np.int32)
    score = jax.jit(lambda p, b, n: objective.score(Encoder(p), b, n, dtype=jnp.float32))(PARAMS, batch, token_bytes)
    _, nll, weight = in_numpy(batch, 0.0)
    assert_close(tuple(map(np.sum, score)), (nll, weight, float(np.sum(batch["weights"] * (100 + batch["targets"])))))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sep_id=V), "expected different ids of 0 and more for pad_id, .* got 0, 1, 47, 48, 47"),
        (dict(cls_id=-1), "expected different ids of 0 and more"),
        (dict(vocab_size=2), "objective.vocab_size: expected ids that are no specials below it, got 2"),
        (dict(rate=0.0), "objective.rate: expected a share between 0 and 1, got 0.0"),
        (dict(mask_share=0.8, random_share=0.3), r"sum of at most 1, got \(0.8, 0.3\)"),
        (dict(mask_share=-0.1), "objective.mask_share"),
        (dict(span=0), "objective.span: expected at least 1, got 0"),
        (dict(chunks=0), "objective.chunks: expected at least 1, got 0"),
        (dict(z_loss=-1.0), "objective.z_loss: expected 0 or more, got -1.0"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        MaskedLM(**IDS | change)


def test_a_row_too_short_and_chunks_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="data.seq_len: expected at least 3 with objective.pair='none'.* got 2"):
        MaskedLM(**IDS).check(2)
    with pytest.raises(UserError, match="data.seq_len: expected at least 5 with objective.pair='sop'.* got 4"):
        MaskedLM(**IDS, pair="sop").check(4)
    MaskedLM(**IDS, pair="sop").check(5)
    with pytest.raises(UserError, match="4 does not divide the 10 predictions of rate 0.15 at data.seq_len 61"):
        MaskedLM(**IDS, chunks=4).check(61)
