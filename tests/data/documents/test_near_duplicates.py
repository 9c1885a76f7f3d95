import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import NearDuplicates
from lm.data.documents.near_duplicates import find_clusters
from lm.data.documents.ngrams import ngram_hashes, word_hashes, words


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    ws = words(text)
    n = min(n, len(ws))
    return {tuple(ws[i : i + n]) for i in range(len(ws) - n + 1)} if ws else set()


def jaccard(a: str, b: str) -> float:
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


def document(rng: random.Random, n: int) -> list[str]:
    return ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(n)]


def edited(rng: random.Random, ws: list[str], n: int) -> list[str]:
    out = list(ws)
    for _ in range(n):
        out[rng.randrange(len(out))] = "edit" + str(rng.randrange(10**6))
    return out


def signatures(texts, how=None):
    how = how or NearDuplicates()
    return np.stack([how.signature(t) for t in texts])


def test_ngram_hashes_are_equal_just_where_ngrams_are():
    rng = random.Random(1)
    text = " ".join(rng.choice("abc") for _ in range(500))
    for n in (1, 2, 5, 13):
        hashes = ngram_hashes(word_hashes(text), n)
        ws = words(text)
        grams = [tuple(ws[i : i + n]) for i in range(len(ws) - n + 1)]
        assert len(hashes) == len(grams) and len(set(hashes.tolist())) == len(set(grams))
        assert len(set(zip(hashes.tolist(), grams))) == len(set(grams))
    assert len(ngram_hashes(word_hashes("one two"), 3)) == 0


def test_words_forget_case_layout_and_punctuation():
    assert words("The ÉTÉ, it's\n  (2) done_x!") == ["the", "été", "it", "s", "2", "done_x"]
    assert (NearDuplicates().signature("A b, c d e f!") == NearDuplicates().signature("a  B\nc d; e f")).all()


def test_a_signature_estimates_the_similarity():
    rng = random.Random(2)
    for n_edits in (0, 2, 5, 12, 40):
        a = document(rng, 400)
        b = edited(rng, a, n_edits)
        s = signatures([" ".join(a), " ".join(b)], NearDuplicates(bands=64, rows=16))
        true = jaccard(" ".join(a), " ".join(b))
        assert abs((s[0] == s[1]).mean() - true) < 4 * (0.25 / 1024) ** 0.5 + 1e-9
    unrelated = signatures([" ".join(document(rng, 300)) for _ in range(2)])
    assert (unrelated[0] == unrelated[1]).sum() == 0


def test_a_signature_is_the_same_on_every_machine():
    signature = NearDuplicates(bands=2, rows=2).signature("one two three four five six")
    assert signature.tolist() == [1651863046, 149388512, 403702624, 2857269232]


def test_near_copies_are_found_and_others_kept():
    """Recall at and above the threshold, precision below it, against the true similarity of every pair."""
    rng = random.Random(3)
    texts: list[str] = []
    for _ in range(60):
        base = document(rng, rng.randint(80, 300))
        texts.append(" ".join(base))
        for share in (0.003, 0.01, 0.02, 0.05, 0.15):
            texts.append(" ".join(edited(rng, base, max(1, round(share * len(base))))))
    first = find_clusters([signatures(texts)], NearDuplicates()).first
    found = missed = wrong = 0
    for i in range(len(texts)):
        family = i - i % 6
        similar = [jaccard(texts[i], texts[j]) for j in range(family, i)]
        best = max(similar, default=0.0)
        if best >= 0.88:
            found, missed = found + (first[i] != i), missed + (first[i] == i)
        elif first[i] != i and best < 0.72:
            wrong += 1
        assert family <= first[i] <= i, "clusters never join what shares nothing"
    assert found >= 60 and missed <= 0.02 * found and wrong == 0


def plain_clusters(s: np.ndarray, how: NearDuplicates) -> list[int]:
    """Every pair that shares a band and agrees enough, joined."""
    root = list(range(len(s)))

    def top(i):
        while root[i] != i:
            i = root[i]
        return i

    for i in range(len(s)):
        for j in range(i):
            bands = (s[i] == s[j]).reshape(how.bands, how.rows).all(1)
            if bands.any() and (s[i] == s[j]).mean() >= how.threshold and (s[i] != 2**32 - 1).any():
                a, b = sorted((top(i), top(j)))
                root[b] = a
    return [top(i) for i in range(len(s))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), max_size=40), st.integers(1, 39), st.booleans())
def test_clusters_keep_the_first_and_join_only_what_is_near(rows, cut, exact):
    how = NearDuplicates(bands=3, rows=2, threshold=1.0 if exact else 0.6)
    s = np.array(rows, np.uint32).reshape(-1, 6)
    got = find_clusters([s[:cut], s[cut:]], how)
    first = got.first.tolist()
    assert first == find_clusters([s], how).first.tolist()
    plain = plain_clusters(s, how)
    assert all(first[f] == f <= i for i, f in enumerate(first))
    if exact:
        assert first == plain
    assert all(plain[i] == plain[f] for i, f in enumerate(first)), "nothing is joined that no chain of pairs joins"
    for i, f in enumerate(first):  # what stays is near to no earlier document that stays, where a band compares them
        for j in range(i):
            if f == i and first[j] == j:
                shared = (s[i] == s[j]).reshape(3, 2).all(1).any()
                assert not shared or (s[i] == s[j]).mean() < how.threshold
    assert sum(got.sizes.values()) == len(s) - sum(1 for i, f in enumerate(first) if f == i and first.count(i) == 1)


def test_texts_without_words_are_left_alone_and_short_ones_compared_whole():
    first = find_clusters([signatures(["...", "!!!", "one two", "One, two", "one three"])], NearDuplicates()).first
    assert first.tolist() == [0, 1, 2, 2, 4]


def test_a_bucket_of_many_kinds_is_counted():
    rng = np.random.default_rng(0)
    s = rng.integers(0, 2**31, (100, 6)).astype(np.uint32)
    s[:, :2] = 7
    got = find_clusters([s], NearDuplicates(bands=3, rows=2))
    assert got.n_cut == 1 and (got.first == np.arange(100)).all()
    assert find_clusters([s[:64]], NearDuplicates(bands=3, rows=2)).n_cut == 0


def test_refuses_what_makes_no_sense():
    for kw, message in (
        (dict(ngram=0), "ngram: expected at least 1"),
        (dict(threshold=1.5), "threshold: expected 0 <"),
    ):
        with pytest.raises(ValueError, match=f"data.near_duplicates.{message}"):
            NearDuplicates(**kw)
