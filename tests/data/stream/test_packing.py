import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import Stream
from lm.data.stream.packing import Packing, best_fit, cut
from lm.errors import UserError
from tests.data.conftest import random_store, write_store

T = 13
EOS, PAD = 1, 0


def documents(rng, n, longest, first=3):
    """Of tokens that no other has, from `first` on, by the number of the document within."""
    starts = first + np.arange(n) * longest
    return [list(range(start, start + int(rng.integers(0, longest)))) for start in starts.tolist()]


def one_by_one(lengths, capacity):
    """Best-fit decreasing as it is written in books: room left in each bin."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [r for r in rooms if r >= length]
        if fits:
            rooms[rooms.index(min(fits))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def all_rows(packing, pad_id=PAD):
    out = np.empty((packing.n_rows, packing.seq_len + 1), np.int32)
    packing.read(np.arange(packing.n_rows), out, np.arange(packing.n_rows), pad_id)
    return out


@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_bins_are_those_of_best_fit_decreasing(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=90)))
    filled = np.bincount(best_fit(lengths, capacity), lengths).astype(int)
    assert sorted((capacity - filled).tolist()) == one_by_one(lengths.tolist(), capacity)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), seq_len=st.integers(1, 40), n_shards=st.integers(1, 4))
def test_every_token_is_a_target_once_and_what_fits_is_whole(tmp_path_factory, seed, seq_len, n_shards):
    rng = np.random.default_rng(seed)
    shards = [documents(rng, int(rng.integers(1, 12)), 50, 3 + 1000 * i) for i in range(n_shards)]
    store = write_store(tmp_path_factory.mktemp("store"), shards)
    packing = Packing(store, seq_len)
    rows, texts = all_rows(packing), [tuple(d + [EOS]) for shard in shards for d in shard]
    assert packing.n_targets == store.n_tokens - 1 == (rows[:, 1:] != PAD).sum()
    found, whole = [], []
    for row in rows.tolist():
        row = row[: next((i for i, t in enumerate(row) if t == PAD), len(row))]
        assert PAD not in row and len(row) > 1
        found += row[1:]
        begin = 1
        for i, token in enumerate(row[1:], 1):
            if token == EOS:
                whole.append(tuple(row[begin : i + 1]))
                begin = i + 1
        if begin < len(row):  # goes on in another row, so it is as long as a chunk can be
            assert len(row) == seq_len + 1 and begin == 1
    assert sorted(found) == sorted(store.read(1, store.n_tokens).tolist())
    for text in texts:
        if len(text) <= seq_len:
            assert text in whole
            whole.remove(text)
        else:  # the last chunk of it
            assert text[(len(text) - 1) // seq_len * seq_len :] in whole
            whole.remove(text[(len(text) - 1) // seq_len * seq_len :])
    assert not whole


def test_a_row_that_goes_on_with_a_document_reads_the_token_before(tmp_path):
    store = write_store(tmp_path, [[list(range(100, 100 + 2 * T + 4)), [7, 8]]])
    rows = all_rows(Packing(store, T)).tolist()
    assert [EOS, *range(100, 100 + T)] in rows
    assert [100 + T - 1, *range(100 + T, 100 + 2 * T)] in rows
    rest = [100 + 2 * T - 1, *range(100 + 2 * T, 100 + 2 * T + 4), EOS, 7, 8, EOS]
    assert rest + [PAD] * (T + 1 - len(rest)) in rows and len(rows) == 3


def test_pieces_are_cut_as_one_would():
    chunks = cut(np.array([1, 6, 7, 17, 30]), 5)
    assert chunks.start.tolist() == [1, 6, 7, 12, 17, 22, 27]
    assert chunks.length.tolist() == [5, 1, 5, 5, 5, 5, 3]
    assert chunks.rest.tolist() == [False, False, False, True, False, True, True]


def test_an_epoch_of_the_stream_is_every_packed_row_once(tmp_path):
    store = random_store(tmp_path, 900)
    stream = Stream({"a": store}, weights=None, seq_len=T, seed=0, packing="best_fit", pad_id=PAD)
    rows = all_rows(Packing(store, T))
    n = len(rows)
    for epoch in range(2):
        read = stream.rows(np.arange(epoch * n, (epoch + 1) * n))
        assert sorted(read.tolist()) == sorted(rows.tolist()) and read.tolist() != rows.tolist()
    padding = (rows[:, 1:] == PAD).mean()
    assert stream.padding == {"a": pytest.approx(padding)} and 0 < padding < 0.2


def test_where_finds_the_tokens_of_packed_rows(tmp_path):
    store = random_store(tmp_path, 900)
    stream = Stream({"a": store}, weights=None, seq_len=T, seed=0, packing="best_fit")
    ids = np.arange(stream.n_rows[0])
    for row, tokens in zip(stream.where(ids), stream.rows(ids), strict=True):
        parts = [store.document(p.document)[p.offset : p.offset + p.length] for p in row.spans]
        text = np.concatenate(parts)
        opening = [EOS] if len(text) < (tokens != PAD).sum() else []  # the store's first token is of no document
        assert np.array_equal(np.concatenate([opening, text]), tokens[tokens != PAD])


def test_the_plan_is_made_once_whole_and_the_same(tmp_path):
    one, two = random_store(tmp_path / "one", 700), random_store(tmp_path / "two", 700)
    path = Packing(one, T).path
    assert path.parent == one.path and [p.name for p in one.path.glob("*pack*")] == [path.name]
    assert path.read_bytes() == Packing(two, T).path.read_bytes()
    made = path.stat()
    Packing(one, T)
    assert path.stat().st_mtime_ns == made.st_mtime_ns and path.stat().st_ino == made.st_ino
    content = path.read_bytes()
    for damaged in (content[:-4], content[:20], b"", content[:8] + b"\xff" * 8 + content[16:]):
        path.write_bytes(damaged)
        assert len(all_rows(Packing(one, T))) and path.read_bytes() == content
    assert Packing(one, T + 4).path != path
    assert Packing(random_store(tmp_path / "other", 700, seed=9), T).path.name != path.name


def test_a_store_without_documents_is_said(tmp_path):
    with pytest.raises(UserError, match="expected documents to pack, got none; add text"):
        Packing(write_store(tmp_path, [[], []]), T)


def test_packed_rows_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    store = random_store(tmp_path, 300)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="expected to write the packed rows .* got No space left on device; make"):
        Packing(store, T)
    assert not list(store.path.glob("*pack*")) and not list(store.path.glob(".*pack*"))


def test_weights_by_tokens_hold_where_rows_are_not_full(tmp_path):
    stores = {
        "full": write_store(tmp_path / "full", [[[5] * (T - 1)] * 90]),
        "loose": write_store(tmp_path / "loose", [[[6] * 7] * 60]),  # one of 8 tokens a row
    }
    kw = dict(seq_len=T, seed=0, packing="best_fit", weights={"full": 1.0, "loose": 1.0})
    count = lambda s: [int((s.rows(np.arange(4000))[:, 1:] == t).any(1).sum()) for t in (5, 6)]
    tokens = lambda s: [int(x) for x in [((s.rows(np.arange(4000))[:, 0:] == t).sum()) for t in (5, 6)]]
    assert count(Stream(stores, **kw)) == [2000, 2000]
    by_tokens = Stream(stores, **kw, weigh="tokens")
    a, b = count(by_tokens)
    assert abs(a * T - b * 8) <= 2 * T and tokens(by_tokens) == [a * (T - 1), b * 7]
    ends = Stream(stores, **kw | {"weights": None}).locate(np.arange(150))
    assert ends.epoch.max() == 0 and Stream(stores, **kw | {"weights": None}).n_rows == [90, 60]
