import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.index import BLOCK, Mixture, epoch_key, mix, permute

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


def test_all_orders_of_a_small_range_come_up():
    keys = epoch_key(0, "a", np.arange(2400))
    orders = np.stack([permute(np.full(2400, i), 4, keys) for i in range(4)], 1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.max() < 2 * 100


def test_epochs_sources_and_seeds_differ():
    keys = {int(epoch_key(s, n, np.array([e]))[0]) for s in range(3) for n in "abc" for e in range(5)}
    assert len(keys) == 45
    assert len(set(mix(np.arange(1000, dtype=np.uint64)).tolist())) == 1000


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
