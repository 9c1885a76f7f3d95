from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.objectives import noise

M, N = 211, 37
IDS = np.arange(M, dtype=np.int64)


def splitmix64(state: int) -> int:
    """One number of the generator, in Python integers, from the reference code of Vigna."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_mix_is_the_output_of_splitmix64():
    # The first three outputs for the seed 1234567, as published with the reference implementation.
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in (1, 2, 3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    np.testing.assert_array_equal(noise.splitmix64(np.array(states, np.uint64)), published)
    assert [splitmix64(s) for s in states] == published


def test_mix_leaves_its_argument_alone():
    x = np.arange(5, dtype=np.uint64)
    noise.splitmix64(x)
    np.testing.assert_array_equal(x, np.arange(5))


def test_a_row_is_a_function_of_its_id_and_not_of_its_place_in_the_batch():
    whole = noise.draw(3, "a", IDS, N)
    shuffled = np.random.default_rng(0).permutation(M)
    np.testing.assert_array_equal(noise.draw(3, "a", IDS[shuffled], N), whole[shuffled])
    np.testing.assert_array_equal(np.vstack([noise.draw(3, "a", i, N) for i in np.array_split(IDS, 4)]), whole)


def test_a_longer_draw_begins_with_the_shorter():
    np.testing.assert_array_equal(noise.draw(3, "a", IDS, N)[:, :11], noise.draw(3, "a", IDS, 11))


def test_seed_purpose_id_and_place_all_matter():
    far = IDS + 2**40
    draws = [noise.draw(s, p, i, N) for s, p, i in [(3, "a", IDS), (4, "a", IDS), (3, "b", IDS), (-3, "a", far)]]
    assert len(np.unique(np.concatenate(draws))) == 4 * M * N


def test_every_bit_is_set_half_of_the_time_and_independent_of_its_neighbours():
    bits = np.unpackbits(noise.draw(0, "a", IDS, N).view(np.uint8).reshape(M, N, 8), axis=2).astype(float)
    sd = 0.5 / np.sqrt(M * N)
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 4.5 * sd
    u = noise.uniform(noise.draw(0, "a", IDS, N))
    for lag in (u[1:] - 0.5) * (u[:-1] - 0.5), (u[:, 1:] - 0.5) * (u[:, :-1] - 0.5):
        assert abs(lag.mean()) < 4 / 12 / np.sqrt(lag.size)


def test_uniform_and_below_are_even():
    bits = noise.draw(0, "a", IDS, N)
    u, k = noise.uniform(bits), noise.below(bits, 7)
    assert 0 <= u.min() and u.max() < 1 and set(np.unique(k)) == set(range(7))
    together = np.bincount(7 * (u * 5).astype(int).reshape(-1) + k.reshape(-1), minlength=35)
    expected = M * N / 35
    assert ((together - expected) ** 2 / expected).sum() < 75  # chi-square with 34 degrees of freedom, p = 6e-5
    assert noise.uniform(np.array([2**64 - 1], np.uint64)) < 1.0
    assert noise.below(np.array([2**64 - 1], np.uint64), 7) == 6


def test_choose_takes_the_smallest_eligible_keys_in_order_of_place():
    keys = noise.draw(0, "a", IDS, N)
    eligible = noise.uniform(noise.draw(0, "b", IDS, N)) < 0.6
    count = np.minimum(eligible.sum(axis=1), IDS % 9)
    out = noise.choose(keys, count, 8, eligible)
    for row in range(M):
        places = np.flatnonzero(eligible[row])
        expected = sorted(places[np.argsort(keys[row, places])][: count[row]])
        np.testing.assert_array_equal(out[row], expected + [N] * (8 - count[row]))
    np.testing.assert_array_equal(noise.choose(keys, 5, 5), np.sort(np.argsort(keys, axis=1)[:, :5], axis=1))


def test_choose_takes_equal_keys_from_left_to_right_and_prefers_any_eligible_place():
    keys = np.full((1, 6), 2**64 - 1, np.uint64)
    np.testing.assert_array_equal(noise.choose(keys, np.array([2]), 3), [[0, 1, 6]])
    eligible = np.array([[False, False, True, False, True, True]])
    np.testing.assert_array_equal(noise.choose(keys, np.array([3]), 3, eligible), [[2, 4, 5]])
    assert noise.choose(keys, 0, 0).shape == (1, 0)


@pytest.mark.parametrize("n, parts", [(1, 1), (5, 1), (5, 5), (6, 3)])
def test_compositions_are_all_equally_likely(n, parts):
    rows = 4000
    out = noise.composition(noise.draw(1, "a", np.arange(rows), n - 1), parts)
    assert out.shape == (rows, parts) and (out >= 1).all() and (out.sum(axis=1) == n).all()
    ways = [w for w in itertools.product(range(1, n + 1), repeat=parts) if sum(w) == n]
    found, counts = np.unique(out, axis=0, return_counts=True)
    assert sorted(map(tuple, found.tolist())) == sorted(ways)
    expected = rows / len(ways)
    assert ((counts - expected) ** 2 / expected).sum() < 35  # at most 9 degrees of freedom, p = 6e-5


def closed_by_hand(row: list[int], pad: int, start: int) -> list[int]:
    """The text of a row without the padding in it, a token at a time, and padding after it."""
    out: list[int] = []
    for before, token in zip([start, *row], row):
        doubled = before == pad and token == start and out[-1:] == [start]  # the separator of a document left out
        if token != pad and not doubled:
            out.append(token)
    return out + [pad] * (len(row) - len(out))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([7, 3, 20, 21, 22]), min_size=11, max_size=11), min_size=1, max_size=5))
def test_rows_close_over_the_padding_in_them_each_on_its_own(rows):
    tokens = np.array(rows, np.int32)
    before = tokens.copy()
    out = noise.closed(tokens, 7, 3)
    assert out.tolist() == [closed_by_hand(row, 7, 3) for row in rows] and out.dtype == np.int32
    np.testing.assert_array_equal(tokens, before)
    assert noise.closed(out, 7, 3) is out


def test_of_the_separators_around_a_document_left_out_one_stays():
    close = lambda *row: [t for t in noise.closed(np.array([row]), 7, 3)[0].tolist() if t != 7]
    assert close(20, 3, 7, 7, 3, 21, 7) == [20, 3, 21]
    assert close(3, 7, 3, 21, 3, 7, 7, 7, 3, 22) == [3, 21, 3, 22]
    assert close(7, 7, 3, 21) == [3, 21]  # it began in the row before
    assert close(20, 3, 7, 7, 3, 3, 21) == [20, 3, 3, 21]  # the document after it is empty
    assert close(20, 3, 3, 21) == [20, 3, 3, 21]


def test_rows_that_have_nothing_to_close_are_the_same_array_whatever_padding_is():
    for row in [[20, 21, 3, 22], [20, 3, 7, 7], [7, 7, 7, 7]]:
        tokens = np.array([row, [20, 21, 22, 23]])
        assert noise.closed(tokens, 7, 3) is tokens
    np.testing.assert_array_equal(noise.closed(np.array([[20, 3, -1, 3, 21]]), -1, 3), [[20, 3, 21, -1, -1]])
    ends = np.array([[20, 7, 7, 7, 21]])  # one id for padding and the separator
    assert noise.closed(ends, 7, 7) is ends


def test_rows_are_grouped_by_their_length_without_padding():
    full = np.array([[4, 5, 6], [7, 8, 9]])
    assert list(noise.by_length(full, 0)) == [(3, slice(None))]
    mixed = np.array([[4, 5, 6], [0, 0, 0], [4, 0, 0], [7, 0, 9], [5, 0, 0]])
    groups = {length: list(which) for length, which in noise.by_length(mixed, 0)}
    assert groups == {0: [1], 1: [2, 4], 3: [0, 3]}
