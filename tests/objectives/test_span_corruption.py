from __future__ import annotations

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.objectives import SpanCorruption
from tests.models import reference
from tests.objectives.fakes import EncoderDecoder
from tests.tolerances import assert_close

V, N_SENTINELS = 43, 30
FIRST = V + N_SENTINELS - 1
PAD, EOS = 0, 1
N, S = 19, 53


def text(n=N, seq_len=S, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, V, (n, seq_len + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.05] = EOS
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 5 + 30}


def parse(row: list[int]) -> list[list[int]]:
    """What stands between sentinels, which must come in order; eos and padding at the end are taken off."""
    while row[-1] == PAD:
        row = row[:-1]
    assert row[-1] == EOS
    pieces: list[list[int]] = [[]]
    for token in row[:-1]:
        if token >= V:
            assert token == FIRST - (len(pieces) - 1)
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


def restored(inputs, targets) -> list[int]:
    kept, lost = parse(inputs.tolist()), parse(targets.tolist())
    assert lost[0] == [] and kept[-1] == [] and len(kept) == len(lost)
    assert all(kept[:-1]) and all(lost[1:])  # no span is empty, on either side
    return [t for k, n in zip(kept, lost[1:]) for t in k + n]


def helper_of_t5(inputs_length: int, density: float, mean: float) -> tuple[int, int]:
    """(tokens, targets) that `random_spans_helper` of the T5 code gives for the length of the inputs."""

    def both(n):
        n_noise = int(round(n * density))
        spans = int(round(n_noise / mean))
        return n - n_noise + spans + 1, n_noise + spans + 1

    n = inputs_length - 1
    while both(n + 1)[0] <= inputs_length:
        n += 1
    return n, both(n)[1]


@pytest.mark.parametrize("inputs", [64, 100, 128, 256, 512, 1024])
@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.15, 8.0), (0.3, 3.0), (0.25, 2.0)])
def test_lengths_are_those_of_the_t5_code(inputs, density, mean):
    objective = SpanCorruption(first_sentinel_id=999, noise_density=density, mean_span=mean)
    n, targets = helper_of_t5(inputs, density, mean)
    assert objective.raw_length(inputs) == n and objective.lengths(n).targets == targets
    assert objective.lengths(n).inputs <= inputs < objective.lengths(n + 1).inputs


def test_the_published_lengths_of_t5():
    objective = SpanCorruption(first_sentinel_id=32099)
    assert objective.raw_length(512) == 568
    assert objective.lengths(568) == (85, 28, 512, 114)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seq_len=st.integers(2, 90),
    density=st.floats(0.01, 0.95),
    mean=st.floats(1.0, 9.0),
    padding=st.integers(0, 90),
    seed=st.integers(0, 9),
)
def test_inputs_and_targets_give_the_row_back(seq_len, density, mean, padding, seed):
    objective = SpanCorruption(
        first_sentinel_id=FIRST, n_sentinels=N_SENTINELS, noise_density=density, mean_span=mean, noise_seed=seed
    )
    lengths = objective.lengths(seq_len)
    assume(lengths.spans <= N_SENTINELS)
    objective.check(seq_len)
    rows = text(3, seq_len, seed)
    n_real = seq_len - min(padding, seq_len)
    rows["tokens"][0, n_real:] = PAD
    batch = objective.examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(3, seq_len).items()
    }
    for i in range(3):
        real = rows["tokens"][i, :-1][: n_real if i == 0 else seq_len]
        if len(real) < 2:
            assert not batch["inputs"][i].any() and not batch["targets"][i].any()
            continue
        inputs, targets = batch["inputs"][i], batch["targets"][i]
        assert restored(inputs, targets) == real.tolist()
        own = objective.lengths(len(real))
        assert ((inputs != PAD).sum(), (targets != PAD).sum()) == (own.inputs, own.targets)
        assert len(parse(targets.tolist())) == own.spans + 1
    if n_real == seq_len:
        assert (batch["inputs"] != PAD).all() and (batch["targets"] != PAD).all()


def noise_mask_of_t5(rng, n: int, density: float, mean: float) -> np.ndarray:
    """bool [n]: `random_spans_noise_mask` of the T5 code, a step at a time."""
    n_noise = int(round(n * density))
    spans = int(round(n_noise / mean))

    def segments(total):
        opens = rng.permutation(np.arange(total - 1) < spans - 1)
        number = np.cumsum(np.concatenate([[0], opens]))
        return [int(np.sum(number == i)) for i in range(spans)]

    turns = zip(segments(n - n_noise), segments(n_noise))
    return np.array([is_noise for k, m in turns for is_noise in [False] * k + [True] * m])


def test_noise_falls_where_that_of_the_t5_code_does():
    n, seq_len = 4000, 61
    rows = {"tokens": np.tile(np.arange(4, 4 + seq_len + 1, dtype=np.int32), (n, 1)), "id": np.arange(n)}
    targets = SpanCorruption(first_sentinel_id=199).examples(rows)["targets"]
    hits = np.bincount(targets.reshape(-1), minlength=200)[4 : 4 + seq_len] / n
    rng = np.random.default_rng(1)
    expected = np.mean([noise_mask_of_t5(rng, seq_len, 0.15, 3.0) for _ in range(n)], axis=0)
    assert hits[0] == expected[0] == 0 and hits[-1] == expected[-1] == 1
    assert (np.abs(hits - expected) <= 4.5 * np.sqrt(2 * expected * (1 - expected) / n)).all()


def test_lengths_of_spans_are_those_of_a_uniform_composition():
    """12 noise tokens in 4 spans: P(length k) = C(11 - k, 2) / C(11, 3), of each span."""
    n, seq_len = 3000, 80
    rows = {"tokens": np.full((n, seq_len + 1), 20, np.int32), "id": np.arange(n)}
    objective = SpanCorruption(first_sentinel_id=FIRST, n_sentinels=N_SENTINELS)
    assert objective.lengths(seq_len)[:2] == (12, 4)
    spans = [[len(p) for p in parse(t.tolist())[1:]] for t in objective.examples(rows)["targets"]]
    for k in range(1, 10):
        p = comb(11 - k, 2) / comb(11, 3)
        share = np.mean(np.array(spans) == k, axis=0)
        assert np.abs(share - p).max() < 4.5 * np.sqrt(p * (1 - p) / n)


def test_rows_are_the_same_whatever_the_batch():
    rows = text()
    rows["tokens"][4, 20:] = PAD
    objective = SpanCorruption(first_sentinel_id=FIRST, n_sentinels=N_SENTINELS)
    whole = objective.examples(rows)
    parts = [objective.examples({k: v[i] for k, v in rows.items()}) for i in np.array_split(np.arange(N)[::-1], 4)]
    for name, x in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts])[::-1], x)
    np.testing.assert_array_equal(rows["tokens"][:4], text()["tokens"][:4])


def test_another_id_or_seed_gives_other_noise():
    rows = text()
    rows["tokens"][:] = rows["tokens"][0]
    first = SpanCorruption(first_sentinel_id=FIRST, n_sentinels=N_SENTINELS).examples(rows)["inputs"]
    other = SpanCorruption(first_sentinel_id=FIRST, n_sentinels=N_SENTINELS, noise_seed=1).examples(rows)["inputs"]
    assert len(np.unique(first, axis=0)) == N and (first != other).any(axis=1).all()


D = 5
rng = np.random.default_rng(0)
TABLES = {
    "source": rng.normal(size=(FIRST + 1, D)),
    "target": rng.normal(size=(FIRST + 1, D)),
    "head": rng.normal(size=(D, FIRST + 1)),
}


PARAMS = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), TABLES)


def in_numpy(batch, z_loss, start):
    sums = np.zeros(3)
    for inputs, targets in zip(batch["inputs"], batch["targets"]):
        real = targets != PAD
        if real.any():
            source = TABLES["source"][inputs[inputs != PAD]].mean(axis=0)
            logits = (TABLES["target"][[start, *targets[real][:-1]]] + source) @ TABLES["head"]
            sums[:2] += reference.cross_entropy(logits[None], targets[real][None], np.ones((1, real.sum())), z_loss, 0)
            sums[2] += real.sum()
    return tuple(sums)


def test_loss_and_score_agree_with_numpy():
    rows = text()
    rows["tokens"][4, 20:] = PAD
    rows["tokens"][5] = PAD
    objective = SpanCorruption(first_sentinel_id=FIRST, n_sentinels=N_SENTINELS, z_loss=0.01, chunks=2)
    objective.check(S)
    batch = objective.examples(rows)
    loss = jax.jit(lambda p, b: objective.loss(EncoderDecoder(p), b, dtype=jnp.float32, key=None))(PARAMS, batch)
    assert_close(tuple(loss), in_numpy(batch, 0.01, start=PAD))
    token_bytes = np.arange(100, 101 + FIRST).astype(np.int32)  # sentinels too: the objective must not count them
    token_bytes[EOS] = 0
    score = objective.score(EncoderDecoder(PARAMS), batch, token_bytes, dtype=jnp.float32)
    lost = [t for row in batch["targets"] for t in row if EOS < t < V]
    assert_close(tuple(map(np.sum, score)), (*in_numpy(batch, 0.0, start=PAD)[1:], float(sum(100 + t for t in lost))))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(noise_density=1.0), "objective.noise_density: expected a share between 0 and 1, got 1.0"),
        (dict(mean_span=0.5), "objective.mean_span: expected at least 1 token, got 0.5"),
        (dict(n_sentinels=0), "objective.n_sentinels: expected at least 1, got 0"),
        (dict(first_sentinel_id=50, n_sentinels=50), "above the specials 0 and 1 .* got 50 down to 1; set"),
        (dict(first_sentinel_id=50, n_sentinels=70), "got 50 down to -19; set"),
        (dict(chunks=0), "objective.chunks: expected at least 1, got 0"),
        (dict(z_loss=-1.0), "objective.z_loss: expected 0 or more, got -1.0"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        SpanCorruption(**{"first_sentinel_id": 199} | change)


def test_a_sequence_that_does_not_fit_is_refused():
    objective = SpanCorruption(first_sentinel_id=199, n_sentinels=10, chunks=5)
    with pytest.raises(UserError, match="data.seq_len: expected at least 2, to keep one token and corrupt one, got 1"):
        objective.check(1)
    with pytest.raises(UserError, match="objective.n_sentinels: expected at least 28, .* data.seq_len 568, got 10"):
        objective.check(568)
    with pytest.raises(UserError, match="objective.chunks: 5 does not divide the 12 targets of data.seq_len 53"):
        objective.check(53)
    with pytest.raises(UserError, match="n_inputs: expected at least 3, .* got 2"):
        objective.raw_length(2)
