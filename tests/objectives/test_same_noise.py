"""A run that is gone on with sees the noise that it began with: the arrays of each objective are those of the first
version, and ways to get them faster give the same bits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.objectives import UL2, Denoising, FillInTheMiddle, MaskedLM, PrefixLM, SpanCorruption, UL2Decoder, noise

V = 401
BERT = dict(mask_id=V, cls_id=V + 1, sep_id=V + 2, vocab_size=V)
MODES = dict(first_sentinel_id=V + 99, r_id=V + 100, s_id=V + 101, x_id=V + 102)
DIGESTS = [
    (MaskedLM(**BERT), "7d087429b75c15ed"),
    (MaskedLM(**BERT, span=3), "f1da08250851afda"),
    (MaskedLM(**BERT, pair="sop", rate=0.4), "a9bfec15d9d09c21"),
    (SpanCorruption(first_sentinel_id=V + 99), "189c2b18b454bbd5"),
    (PrefixLM(), "b07342b2040ab0aa"),
    (PrefixLM(document_mask=False), "d770b81f466279db"),
    (FillInTheMiddle(prefix_id=V, suffix_id=V + 1, middle_id=V + 2), "2c8fe36a6b897728"),
    (UL2(**MODES), "39a2272af2486297"),
    (UL2Decoder(**MODES), "f720f22914cfe370"),
    (Denoising(mask_id=V), "d56379b0e018813b"),
]


def rows(padded: bool) -> dict[str, np.ndarray]:
    """Text with newlines and ends of documents, and padding of all lengths if wanted."""
    n, width = 13, 98
    index = np.arange(n * width).reshape(n, width)
    tokens = (5 + index * index % 389).astype(np.int32)
    tokens[index % 7 == 3] = 3
    tokens[index % 41 == 17] = 1
    if padded:
        for i in range(n):
            tokens[i, width - (i * i) % width :] = 0
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 10**9 + 7}


@pytest.mark.parametrize(("objective", "digest"), DIGESTS, ids=[f"{type(o).__name__}-{d[:4]}" for o, d in DIGESTS])
def test_examples_are_those_of_the_first_version(objective, digest):
    found = hashlib.sha256()
    for padded in (False, True):
        arrays = objective.examples(rows(padded))
        for name in sorted(arrays):
            x = arrays[name]
            found.update(f"{name}{x.dtype}{x.shape}".encode())
            found.update(np.ascontiguousarray(x).tobytes())
    assert found.hexdigest()[:16] == digest


def chosen_by_hand(keys: np.ndarray, count: list[int], width: int, eligible: np.ndarray) -> list[list[int]]:
    """By key, without its lower bits, and then by place: as many of them as the place of a row needs, and one."""
    lower = (keys.shape[1] - 1).bit_length() + 1
    out = []
    for row, n, may in zip(keys.tolist(), count, eligible.tolist()):
        places = sorted((key >> lower, place) for place, key in enumerate(row) if may[place])
        out.append(sorted(place for _, place in places[:n]) + [keys.shape[1]] * (width - n))
    return out


def around_the_bound(draw: np.ndarray) -> np.ndarray:
    """Equal but for the lower bits, which put the first half above what is expected and the other below."""
    n = draw.shape[1]
    lower = np.uint64(2 ** ((n - 1).bit_length() + 1) - 1)
    bound = noise._bound(n // 7, np.array([n]))
    return np.broadcast_to(bound & ~lower | np.where(np.arange(n) < n // 2, lower, np.uint64(0)), draw.shape)


KEYS = {
    "around the bound": around_the_bound,
    "random": lambda draw: draw,
    "all above what is expected": lambda draw: draw | np.uint64(7 << 61),
    "few above": lambda draw: np.where(np.arange(len(draw))[:, None] % 5 == 0, draw | np.uint64(7 << 61), draw),
    "equal in runs": lambda draw: np.repeat(draw[:, ::3], 3, axis=1)[:, : draw.shape[1]],
    "differing in lower bits alone": lambda draw: draw & np.uint64(1023) | (draw & np.uint64(3)) << np.uint64(61),
    "all equal": lambda draw: np.zeros_like(draw),
    "all greatest": lambda draw: np.full_like(draw, noise.MAX),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("n", [257, 401, 512])
def test_choosing_among_the_nearest_keys_is_choosing_among_all(kind, n):
    m = 67
    assert m * n >= noise.FEW  # else it is not done
    keys = KEYS[kind](noise.draw(3, "a", np.arange(m), n))
    whole, width = np.ones((m, n), bool), n // 7
    expected = chosen_by_hand(keys, [width] * m, width, whole)
    np.testing.assert_array_equal(noise.choose(keys, width, width), expected)
    some = noise.uniform(noise.draw(4, "b", np.arange(m), n)) < np.linspace(0, 1, m)[:, None]
    count = np.minimum(some.sum(axis=1), np.arange(m) % (width + 1))
    np.testing.assert_array_equal(
        noise.choose(keys, count, width, some), chosen_by_hand(keys, count.tolist(), width, some)
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.data())
def test_few_keys_are_chosen_as_many_are(m, n, seed, data):
    keys = noise.draw(seed, "a", np.arange(m), n) >> np.uint64(data.draw(st.sampled_from([0, 40, 60])))
    width = data.draw(st.integers(0, n))
    some = noise.uniform(noise.draw(seed, "b", np.arange(m), n)) < 0.7
    count = np.minimum(some.sum(axis=1), np.arange(m) % (width + 1))
    got = noise.choose(keys, count, width, some)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got.reshape(m, width), chosen_by_hand(keys, count.tolist(), width, some))


def test_choosing_from_rows_without_an_eligible_place_gives_none():
    keys = noise.draw(0, "a", np.arange(67), 401)
    got = noise.choose(keys, np.zeros(67, int), 5, np.zeros(keys.shape, bool))
    np.testing.assert_array_equal(got, np.full((67, 5), 401))


def test_a_draw_at_places_is_the_whole_draw_there():
    ids = np.array([0, 7, -3, 2**40], np.int64)
    places = np.array([[0, 5, 5, 36], [36, 1, 0, 2], [3, 3, 3, 3], [9, 8, 7, 6]])
    whole = noise.draw(11, "a", ids, 37)
    np.testing.assert_array_equal(noise.draw_at(11, "a", ids, places), np.take_along_axis(whole, places, axis=1))
