from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.objectives import Seq2Seq
from lm.objectives.seq2seq import places
from tests.models import reference
from tests.tolerances import assert_close

PAD, EOS, SEP, START = 0, 1, 3, 2
V = 29
Pair = tuple[list[int], list[int]]


def pairs_of(row: list[int]) -> list[Pair]:
    """The whole pairs of a row of the store, with lists."""
    out = []
    ends = [i for i, t in enumerate(row) if t == EOS]
    for begin, end in zip(ends, ends[1:]):
        document = row[begin + 1 : end]
        if SEP in document:
            cut = document.index(SEP)
            if document[:cut] and document[cut + 1 :]:
                out.append((document[:cut], document[cut + 1 :]))
    return out


def packed(pairs: list[Pair], max_source: int, max_target: int) -> list[Pair]:
    """The pairs that fit, in order."""
    kept: list[Pair] = []
    source = target = 0
    for s, t in pairs:
        if source + len(s) + 1 <= max_source and target + len(t) + 1 <= max_target:
            kept.append((s, t))
            source, target = source + len(s) + 1, target + len(t) + 1
    return kept


def joined(parts: list[list[int]], width: int) -> list[int]:
    out = [t for p in parts for t in [*p, EOS]]
    return out + [PAD] * (width - len(out))


def random_rows(rng, n: int, width: int) -> np.ndarray:
    tokens = rng.integers(4, V, (n, width)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.2] = SEP
    tokens[rng.random(tokens.shape) < 0.2] = EOS
    return tokens


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seq_len=st.integers(4, 80),
    max_source=st.integers(2, 50),
    max_target=st.integers(2, 50),
    padding=st.integers(0, 80),
    seed=st.integers(0, 99),
)
def test_every_whole_pair_that_fits_is_packed_in_order(seq_len, max_source, max_target, padding, seed):
    objective = Seq2Seq(max_source=max_source, max_target=max_target)
    objective.check(seq_len)
    tokens = random_rows(np.random.default_rng(seed), 5, seq_len + 1)
    tokens[0, seq_len + 1 - min(padding, seq_len + 1) :] = PAD
    before = tokens.copy()
    batch = objective.examples({"tokens": tokens, "id": np.arange(5)})
    np.testing.assert_array_equal(tokens, before)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(5, seq_len).items()
    }
    for row, inputs, targets in zip(tokens.tolist(), batch["inputs"], batch["targets"]):
        kept = packed(pairs_of(row), max_source, max_target)
        assert inputs.tolist() == joined([s for s, _ in kept], max_source)
        assert targets.tolist() == joined([t for _, t in kept], max_target)


def test_nothing_is_lost_of_whole_documents_in_rows_as_wide_as_the_text():
    row = [EOS, 4, 5, 6, SEP, 7, EOS, 8, SEP, 9, SEP, 10, EOS, 11, SEP, 12, 13, EOS]
    batch = Seq2Seq(max_source=16, max_target=16).examples({"tokens": np.array([row], np.int32), "id": np.arange(1)})
    assert batch["inputs"][0].tolist() == [4, 5, 6, EOS, 8, EOS, 11, EOS] + [PAD] * 8
    assert batch["targets"][0].tolist() == [7, EOS, 9, SEP, 10, EOS, 12, 13, EOS] + [PAD] * 7


def test_a_batch_without_a_pair_is_padding():
    tokens = np.full((3, 12), 7, np.int32)
    batch = Seq2Seq(max_source=5, max_target=7).examples({"tokens": tokens, "id": np.arange(3)})
    assert not batch["inputs"].any() and not batch["targets"].any()


def test_rows_are_the_same_whatever_the_batch():
    tokens = random_rows(np.random.default_rng(0), 19, 60)
    objective = Seq2Seq(max_source=17, max_target=23)
    whole = objective.examples({"tokens": tokens, "id": np.arange(19)})
    parts = [objective.examples({"tokens": tokens[i], "id": i}) for i in np.array_split(np.arange(19)[::-1], 4)]
    for name, x in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts])[::-1], x)


def test_places_number_the_sequences_of_a_row():
    tokens = np.array([[5, 6, EOS, 7, EOS, 8, 9, EOS, PAD, PAD], [5, EOS, 7, 8, 9, 9, 9, 9, 9, EOS], [PAD] * 10])
    segments, positions = places(jnp.asarray(tokens), EOS, PAD)
    np.testing.assert_array_equal(segments, [[1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [1, 1] + [2] * 8, [0] * 10])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 0, 1, 2, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7], [0] * 10])
    assert segments.dtype == positions.dtype == jnp.int32


D, S, T = 5, 17, 15
rng = np.random.default_rng(0)
TABLES = {
    "source": rng.normal(size=(V, D)),
    "target": rng.normal(size=(V, D)),
    "source_place": rng.normal(size=(S, D)),
    "target_place": rng.normal(size=(T, D)),
    "head": rng.normal(size=(D, V)),
}


class EncoderDecoder:
    """The decoder adds up its own segment so far; of the source it reads the mean of that segment's valid tokens."""

    def __init__(self, p):
        self.p = p

    def __call__(
        self,
        inputs,
        targets_in,
        *,
        dtype,
        valid=None,
        segments=None,
        positions=None,
        target_segments=None,
        target_positions=None,
        key=None,
    ):
        p = self.p
        source = p["source"][inputs] * p["source_place"][positions]
        reads = (target_segments[:, :, None] == segments[:, None]) & valid[:, None]
        n = jnp.maximum(jnp.sum(reads, axis=2, keepdims=True), 1)
        same = jnp.tril(target_segments[:, :, None] == target_segments[:, None])
        x = p["target"][targets_in] * p["target_place"][target_positions]
        x = jnp.einsum("btu,bud->btd", same * 1.0, x) + jnp.einsum("bts,bsd->btd", reads * 1.0, source) / n
        return types.SimpleNamespace(hidden=(x / 4).astype(dtype))

    def head_fn(self):
        return lambda params, x: (x @ params).astype(jnp.float32), self.p["head"]


PARAMS = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), TABLES)


def in_numpy(pairs: list[Pair], z_loss: float, label_smoothing: float):
    """Sums over pairs, each alone, in float64."""
    sums = np.zeros(3)
    for s, t in pairs:
        s, t = [*s, EOS], [*t, EOS]
        source = np.mean([TABLES["source"][x] * TABLES["source_place"][i] for i, x in enumerate(s)], axis=0)
        read = [TABLES["target"][x] * TABLES["target_place"][i] for i, x in enumerate([START, *t[:-1]])]
        logits = (np.cumsum(read, axis=0) + source) / 4 @ TABLES["head"]
        sums[:2] += reference.cross_entropy(logits[None], np.array([t]), np.ones((1, len(t))), z_loss, label_smoothing)
        sums[2] += len(t)
    return tuple(sums)


OBJECTIVE = Seq2Seq(max_source=S, max_target=T, decoder_start_id=START, z_loss=0.01, chunks=3)
TOKENS = random_rows(np.random.default_rng(3), 7, 50)
PAIRS = [p for row in TOKENS.tolist() for p in packed(pairs_of(row), S, T)]


def test_packed_pairs_lose_what_each_loses_alone():
    assert len(PAIRS) > len(TOKENS)
    batch = OBJECTIVE.examples({"tokens": TOKENS, "id": np.arange(7)})
    loss = jax.jit(lambda p, b: OBJECTIVE.loss(EncoderDecoder(p), b, dtype=jnp.float32, key=None))(PARAMS, batch)
    assert_close(tuple(loss), in_numpy(PAIRS, 0.01, 0.1))


def test_score_is_the_bare_nll_and_the_bytes_of_the_targets():
    batch = OBJECTIVE.examples({"tokens": TOKENS, "id": np.arange(7)})
    token_bytes = np.arange(100, 100 + V).astype(np.int32)
    token_bytes[EOS] = 0
    score = OBJECTIVE.score(EncoderDecoder(PARAMS), batch, token_bytes, dtype=jnp.float32)
    n_bytes = sum(100 + x for _, t in PAIRS for x in t)
    assert_close(tuple(map(np.sum, score)), (*in_numpy(PAIRS, 0.0, 0.0)[1:], float(n_bytes)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(max_source=1), "objective.max_source: expected at least 2, a token and eos, got 1"),
        (dict(max_target=0), "objective.max_target: expected at least 2, a token and eos, got 0"),
        (dict(separator_id=1), "objective.separator_id: expected a token of text, got 1"),
        (dict(decoder_start_id=-1), "expected ids of 0 and more, got 3, -1"),
        (dict(chunks=0), "objective.chunks: 0 does not divide objective.max_target 12"),
        (dict(chunks=5), "objective.chunks: 5 does not divide objective.max_target 12"),
        (dict(label_smoothing=1.0), r"objective.label_smoothing: expected a rate in \[0, 1\), got 1.0"),
        (dict(z_loss=-0.1), "objective.z_loss: expected 0 or more, got -0.1"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        Seq2Seq(**{"max_source": 10, "max_target": 12} | change)


def test_a_sequence_too_short_for_a_pair_is_refused():
    with pytest.raises(UserError, match="data.seq_len: expected at least 4, .* got 3"):
        Seq2Seq(max_source=10, max_target=12).check(3)
