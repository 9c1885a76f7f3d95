import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.stream import index
from lm.data.stream.index import BLOCK, VERSION, Mixture, epoch_key, fmix64, order_version, permute

KEY = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), key=KEY)
def test_permute_is_a_bijection(n, key):
    out = permute(np.arange(n), n, np.array([key], np.uint64))
    assert np.array_equal(np.sort(out), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2**40), keys=st.lists(KEY, min_size=1, max_size=20), data=st.data())
def test_permute_is_elementwise(n, keys, data):
    i = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=len(keys), max_size=len(keys))))
    keys = np.array(keys, np.uint64)
    together = permute(i, n, keys)
    assert together.tolist() == [int(permute(i[j : j + 1], n, keys[j : j + 1])[0]) for j in range(len(keys))]
    assert together.min() >= 0 and together.max() < n


@pytest.mark.parametrize("n", [4099, 65536, 131073])
def test_neighbours_are_uncorrelated(n):
    for seed in range(3):
        x = permute(np.arange(n), n, epoch_key(seed, "a", np.array([0])))
        correlations = [np.corrcoef(x, np.arange(n))[0, 1]]
        correlations += [np.corrcoef(x[:-lag], x[lag:])[0, 1] for lag in (1, 2, 3, 16, 64)]
        assert np.abs(correlations).max() < 4 / np.sqrt(n)


def excess(observed, expected, free):
    """How many standard deviations a chi-square sum is above its mean, by its Gaussian limit."""
    return (((observed - expected) ** 2 / expected).sum() - free) / np.sqrt(2 * free)


def order_statistics(x, buckets=16):
    """Chi-square of (where a row is, where it goes) and of the buckets of rows that follow each other, both with given
    margins, and the largest of 16 serial correlations in standard deviations."""
    n = len(x)
    place, row = np.arange(n) * buckets // n, x * buckets // n
    table = lambda a, b: np.bincount(a * buckets + b, minlength=buckets**2)
    free, each = (buckets - 1) ** 2, n / buckets**2
    lags = [np.corrcoef(x[:-lag], x[lag:])[0, 1] * np.sqrt(n) for lag in range(1, 17)]
    return excess(table(place, row), each, free), excess(table(row[:-1], row[1:]), each, free), np.abs(lags).max()


@pytest.mark.parametrize("n", [2053, 8192, 8193, 65537, 99991])
def test_an_epoch_is_as_random_as_a_random_permutation(n):
    ours = [
        order_statistics(permute(np.arange(n), n, epoch_key(s, "a", np.array([e])))) for s in (0, 7) for e in (0, 9)
    ]
    rng = np.random.default_rng(n)
    truth = [order_statistics(rng.permutation(n)) for _ in range(4)]
    for found in (ours, truth):
        assert np.abs(found).max() < 4.5, found


def test_the_statistics_see_an_order_that_is_not_random():
    n = 8192
    for x in (np.arange(n), (np.arange(n) * 4093 + 11) % n, np.arange(n).reshape(64, 128).T.reshape(-1)):
        assert max(order_statistics(x)) > 10
    assert max(order_statistics(permute(np.arange(n), n, np.array([3], np.uint64)))) < 4.5


def pairs_over_epochs(n, epochs=60_000):
    """Excess of the chi-square of (first row, last row) over many epochs."""
    keys = epoch_key(1, "a", np.arange(epochs))
    first, last = (permute(np.full(epochs, i), n, keys) for i in (0, n - 1))
    counts = np.bincount(first * n + last, minlength=n * n).reshape(n, n)
    assert not counts.diagonal().any()
    return excess(counts[~np.eye(n, dtype=bool)], epochs / (n * (n - 1)), n * (n - 1) - 1)


@pytest.mark.parametrize("n", [2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 61])
def test_epochs_of_few_rows_are_independent_orders(n):
    assert abs(pairs_over_epochs(n)) < 4.5


def test_fewer_bits_would_favour_some_orders(monkeypatch):
    monkeypatch.setattr(index, "MIN_BITS", 2)
    assert pairs_over_epochs(5) > 10 and pairs_over_epochs(7) > 10


@pytest.mark.parametrize(
    ("n", "digest"), [(33, "7397255f"), (1009, "0e6e262e"), (65537, "e3fb9f74"), (10**12 + 39, "669f5738")]
)
def test_the_order_is_that_of_version_1_from_33_rows_on(n, digest):
    """A change of these digests is a new VERSION."""
    out = permute(np.arange(min(n, 2000)), n, epoch_key(5, "a", np.array([3])))
    assert hashlib.sha256(out.astype("<i8").tobytes()).hexdigest().startswith(digest)
    assert order_version([n, 10**6]) == 1 and order_version([n, 32]) == VERSION == 2


def test_all_orders_of_a_small_range_come_up():
    keys = epoch_key(0, "a", np.arange(2400))
    orders = np.stack([permute(np.full(2400, i), 4, keys) for i in range(4)], 1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.max() < 2 * 100


def test_epochs_sources_and_seeds_differ():
    keys = {int(epoch_key(s, n, np.array([e]))[0]) for s in range(3) for n in "abc" for e in range(5)}
    assert len(keys) == 45
    assert len(set(fmix64(np.arange(1000, dtype=np.uint64)).tolist())) == 1000


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), block=st.integers(0, 10**6))
def test_quotas_are_exact_in_every_block_and_near_anywhere(weights, block):
    mixture = Mixture({str(i): w for i, w in enumerate(weights)})
    ids = block * BLOCK + np.arange(BLOCK)
    source, drawn = mixture(ids)
    share = np.array(weights) / sum(weights)
    for s, w in enumerate(share):
        mine = source == s
        assert abs(mine.sum() - w * BLOCK) < 1 and mine.sum() == mixture.quota[s]
        assert np.array_equal(drawn[mine], block * mixture.quota[s] + np.arange(mine.sum()))  # none skipped or repeated
        running = np.cumsum(mine) - w * np.arange(1, BLOCK + 1)
        assert np.abs(running).max() < 1 + len(weights) / 2


def test_mixture_refuses_weights_it_cannot_keep():
    for bad in ({}, {"a": 0.0, "b": 1.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}):
        with pytest.raises(ValueError, match="weights: expected positive"):
            Mixture(bad)
    with pytest.raises(ValueError, match=r"weights\['b'\]: expected at least 1/65536 of the total"):
        Mixture({"a": 1.0, "b": 1e-7})


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5), n=st.integers(0, 3 * BLOCK), k=st.integers(0, 10**6)
)
def test_counts_and_numbers_of_a_source_agree_with_dealing(weights, n, k):
    mixture = Mixture({str(i): w for i, w in enumerate(weights)})
    source, _ = mixture(np.arange(n))
    assert mixture.count(n).tolist() == [(source == s).sum() for s in range(len(weights))]
    for s in range(len(weights)):
        at = np.array([mixture.nth(s, k)])
        assert [int(x[0]) for x in mixture(at)] == [s, k]
