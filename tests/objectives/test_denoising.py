from __future__ import annotations

from math import exp, factorial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.objectives import Denoising
from tests.models import reference
from tests.objectives.fakes import EncoderDecoder
from tests.tolerances import assert_close

PAD, EOS, NEWLINE = 0, 1, 3
V = 400
MASK = V
N, S = 17, 59


def text(n=N, seq_len=S, seed=0, newlines=0.1) -> dict[str, np.ndarray]:
    """No two tokens of a row are equal but newlines and ends, so that it can be told where each came from."""
    rng = np.random.default_rng(seed)
    tokens = np.array([rng.permutation(np.arange(4, V))[: seq_len + 1] for _ in range(n)], np.int32)
    tokens[rng.random(tokens.shape) < newlines] = NEWLINE
    tokens[rng.random(tokens.shape) < newlines / 2] = EOS
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 3 + 11}


def gaps(inputs: list[int], original: list[int]) -> list[tuple[int, int]]:
    """(masks, tokens that they stand for) between neighbouring kept tokens, from the start to the end of a row of
    different tokens."""
    out, masks, at = [], 0, 0
    for token in [t for t in inputs if t != PAD] + [None]:
        if token == MASK:
            masks += 1
            continue
        here = len(original) if token is None else original.index(token, at)
        out.append((masks, here - at))
        masks, at = 0, here + 1
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seq_len=st.integers(1, 90),
    rate=st.floats(0.01, 0.95),
    mean=st.floats(0.1, 9.0),
    padding=st.integers(0, 90),
    seed=st.integers(0, 9),
)
def test_masks_stand_for_what_is_missing_and_the_targets_are_the_row(seq_len, rate, mean, padding, seed):
    objective = Denoising(mask_id=MASK, rate=rate, mean_span=mean, permute=False, noise_seed=seed)
    rows = text(3, seq_len, seed, newlines=0.0)
    n_real = seq_len - min(padding, seq_len)
    rows["tokens"][0, n_real:] = PAD
    batch = objective.examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(3, seq_len).items()
    }
    np.testing.assert_array_equal(batch["targets"], rows["tokens"][:, :-1])
    for i in range(3):
        original = rows["tokens"][i, : n_real if i == 0 else seq_len].tolist()
        inputs = batch["inputs"][i]
        used = (inputs != PAD).sum()
        assert (inputs[used:] == PAD).all() and used <= len(original)
        if not original:
            continue
        between = gaps(inputs.tolist(), original)  # fails where a kept token is out of order
        assert all(masks > 0 for masks, lost in between if lost)
        assert sum(lost for _, lost in between) == max(round(rate * len(original)), 1)


def test_spans_have_poisson_lengths():
    """With few spans in a long row, hardly any two touch: a gap with one mask is a span."""
    rows = {"tokens": np.tile(np.arange(4, 3005, dtype=np.int32), (120, 1)), "id": np.arange(120)}
    inputs = Denoising(mask_id=4000, permute=False, rate=0.05).examples(rows)["inputs"]
    lengths = []
    for row in inputs:
        kept = np.flatnonzero((row != 4000) & (row != PAD))
        one = np.flatnonzero(np.diff(kept) == 2)
        lengths += (np.diff(row[kept])[one] - 1).tolist()
    assert len(lengths) > 120 * 40
    share = np.bincount(lengths, minlength=9)[:9] / len(lengths)
    expected = np.array([exp(-3) * 3**k / factorial(k) for k in range(9)])
    # The last span of a row is cut, one in fifty.
    assert np.abs(share - expected).max() < 0.02


def lost_of_bart(rng, n: int, rate: float, mean: float) -> np.ndarray:
    """bool [n]: which tokens text infilling takes, a step at a time."""
    left, spans = round(rate * n), []
    kept = n - left
    while left:
        spans.append(min(int(rng.poisson(mean)), left))
        left -= spans[-1]
    is_span = rng.permutation([True] * len(spans) + [False] * kept)
    return np.array([s for span in is_span for s in ([True] * spans.pop(0) if span else [False])])


def test_tokens_are_masked_as_often_as_by_drawing_one_span_after_another():
    n, seq_len = 4000, 31
    rows = {"tokens": np.tile(np.arange(4, 4 + seq_len + 1, dtype=np.int32), (n, 1)), "id": np.arange(n)}
    inputs = Denoising(mask_id=99, permute=False).examples(rows)["inputs"]
    lost = 1 - np.bincount(inputs.reshape(-1), minlength=100)[4 : 4 + seq_len] / n
    rng = np.random.default_rng(1)
    expected = np.mean([lost_of_bart(rng, seq_len, 0.3, 3.0) for _ in range(n)], axis=0)
    assert abs(expected.mean() - 9 / 31) < 1e-9
    assert (np.abs(lost - expected) < 4.5 * np.sqrt(2 * expected * (1 - expected) / n)).all()


def sentences(row: list[int]) -> list[list[tuple[int, ...]]]:
    """By document: sentences with their newline, without the eos of the document."""
    documents: list[list[tuple[int, ...]]] = []
    for document in " ".join(map(str, row)).split(f" {EOS} "):
        out, sentence = [], []
        for token in map(int, document.split()):
            sentence.append(token)
            if token == NEWLINE:
                out.append(tuple(sentence))
                sentence = []
        documents.append(out + ([tuple(sentence)] if sentence else []))
    return documents


def visible_order(objective: Denoising, rows) -> np.ndarray:
    """Rows as the encoder gets them, with the one token that is masked put back."""
    batch = objective.examples(rows)
    out = batch["inputs"].copy()
    for i, row in enumerate(batch["inputs"]):
        missing = set(batch["targets"][i].tolist()) - set(row.tolist())
        masks = np.flatnonzero(row == MASK)
        assert len(masks) == len(missing) == 1
        out[i, masks] = missing.pop()
    return out


def test_sentences_are_shuffled_within_their_documents_and_ends_stay():
    rows = {"tokens": np.arange(4, 4 + S + 1, dtype=np.int32) + np.zeros((200, 1), np.int32), "id": np.arange(200)}
    rows["tokens"][:, [5, 9, 17, 19, 34, 39, 48, S - 1]] = NEWLINE
    rows["tokens"][:, [20, 40]] = EOS
    objective = Denoising(mask_id=MASK, rate=0.001)  # one token is masked
    batch = objective.examples(rows)
    missing = [set(t.tolist()) - set(i.tolist()) for t, i in zip(batch["targets"], batch["inputs"])]
    one_mask = [i for i in range(200) if missing[i]]  # none is missing where a newline or an end is masked
    assert len(one_mask) > 100
    some = {k: v[one_mask] for k, v in rows.items()}
    original = sentences(rows["tokens"][0, :-1].tolist())
    orders = set()
    for row in visible_order(objective, some):
        documents = sentences(row.tolist())
        assert [sorted(d) for d in documents] == [sorted(d) for d in original]
        orders.add(tuple(documents[0]))
        assert np.flatnonzero(row == EOS).tolist() == [20, 40]
    assert len(orders) == 24  # of four sentences


@pytest.mark.parametrize("permute", [False, True])
def test_rows_are_the_same_whatever_the_batch(permute):
    rows = text()
    rows["tokens"][4, 20:] = PAD
    objective = Denoising(mask_id=MASK, permute=permute)
    before = rows["tokens"].copy()
    whole = objective.examples(rows)
    np.testing.assert_array_equal(rows["tokens"], before)
    parts = [objective.examples({k: v[i] for k, v in rows.items()}) for i in np.array_split(np.arange(N)[::-1], 4)]
    for name, x in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts])[::-1], x)


def test_another_id_or_seed_gives_other_noise():
    rows = text()
    rows["tokens"][:] = rows["tokens"][0]
    first, other = (Denoising(mask_id=MASK, noise_seed=seed).examples(rows)["inputs"] for seed in (0, 1))
    assert len(np.unique(first, axis=0)) == N and (first != other).any(axis=1).all()


D = 5
rng = np.random.default_rng(0)
TABLES = {
    "source": rng.normal(size=(V + 1, D)),
    "target": rng.normal(size=(V + 1, D)),
    "head": rng.normal(size=(D, V + 1)),
}


PARAMS = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), TABLES)


def in_numpy(inputs, rows, z_loss):
    sums = np.zeros(3)
    for source, row in zip(inputs, rows):
        real = row[row != PAD]
        if len(real):
            mean = TABLES["source"][source[source != PAD]].mean(axis=0)
            logits = (TABLES["target"][[EOS, *real[:-1]]] + mean) @ TABLES["head"]
            sums[:2] += reference.cross_entropy(logits[None], real[None], np.ones((1, len(real))), z_loss, 0)
            sums[2] += len(real)
    return tuple(sums)


def test_loss_and_score_agree_with_numpy():
    rows = text()
    rows["tokens"][4, 20:] = PAD
    rows["tokens"][5] = PAD
    objective = Denoising(mask_id=MASK, z_loss=0.01, chunks=S)
    objective.check(S)
    batch = objective.examples(rows)
    loss = jax.jit(lambda p, b: objective.loss(EncoderDecoder(p), b, dtype=jnp.float32, key=None))(PARAMS, batch)
    own = rows["tokens"][:, :S]
    assert_close(tuple(loss), in_numpy(batch["inputs"], own, 0.01))
    token_bytes = np.arange(100, 101 + V).astype(np.int32)
    token_bytes[EOS] = 0
    score = objective.score(EncoderDecoder(PARAMS), batch, token_bytes, dtype=jnp.float32)
    assert_close(
        tuple(map(np.sum, score)), (*in_numpy(batch["inputs"], own, 0)[1:], float(np.sum((100 + own) * (own > EOS))))
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mask_id=1), "objective.mask_id: expected an id of its own beside 0 and 1, got 1"),
        (dict(mask_id=-1), "objective.mask_id: expected an id of its own beside 0 and 1, got -1"),
        (dict(rate=1.0), "objective.rate: expected a share between 0 and 1, got 1.0"),
        (dict(mean_span=0.0), "objective.mean_span: expected more than 0 and at most 100 tokens, got 0.0"),
        (dict(chunks=0), "objective.chunks: expected at least 1, got 0"),
        (dict(z_loss=-1.0), "objective.z_loss: expected 0 or more, got -1.0"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        Denoising(**{"mask_id": MASK} | change)


def test_a_sequence_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="data.seq_len: expected at least 2, .* got 1"):
        Denoising(mask_id=MASK).check(1)
    with pytest.raises(UserError, match="objective.chunks: 3 does not divide data.seq_len 59"):
        Denoising(mask_id=MASK, chunks=3).check(59)
