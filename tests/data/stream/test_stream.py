import numpy as np
import pytest

from lm.data import Stream
from tests.data.conftest import random_store, write_store

T = 13


@pytest.fixture
def stores(tmp_path):
    sizes = {"a": 3000, "b": 1100, "c": 500}
    return {n: random_store(tmp_path / n, size, seed=i) for i, (n, size) in enumerate(sizes.items())}


def stream(stores, **kw):
    return Stream(stores, **{"weights": None, "seq_len": T, "seed": 0} | kw)


def test_an_epoch_holds_every_window_once_and_every_token_as_a_target(stores):
    store = stores["a"]
    s = stream({"a": store})
    n = (store.n_tokens - 1) // T
    flat = store.read(0, store.n_tokens)
    for epoch in range(2):
        rows = s.rows(np.arange(epoch * n, (epoch + 1) * n))
        assert rows.shape == (n, T + 1) and rows.dtype == np.int32
        order = s.locate(np.arange(epoch * n, (epoch + 1) * n)).row
        assert np.array_equal(np.concatenate(rows[np.argsort(order)][:, 1:]), flat[1 : n * T + 1])
        assert np.array_equal(rows[np.argsort(order)][:, 0], flat[: n * T : T])
    assert not np.array_equal(s.locate(np.arange(n)).row, s.locate(np.arange(n, 2 * n)).row)


def test_rows_are_a_function_of_ids_alone(stores):
    s = stream(stores, weights={"a": 0.5, "b": 0.2, "c": 0.3})
    ids = np.random.default_rng(0).integers(0, 10**9, 200)
    rows = s.rows(ids)
    assert np.array_equal(rows, np.concatenate([s.rows(ids[i : i + 1]) for i in range(200)]))
    assert np.array_equal(
        rows, stream(dict(reversed(stores.items())), weights={"c": 0.3, "b": 0.2, "a": 0.5}).rows(ids)
    )


def test_seed_and_new_sources_do_what_they_should(stores):
    ids = np.arange(50)
    one, two = stream({"a": stores["a"]}), stream({"a": stores["a"], "b": stores["b"]})
    assert not np.array_equal(one.rows(ids), stream({"a": stores["a"]}, seed=1).rows(ids))
    mixed = two.locate(np.arange(80))
    assert mixed.row[mixed.source == 0].tolist() == one.locate(np.arange((mixed.source == 0).sum())).row.tolist()


def test_default_weights_end_all_epochs_together(stores):
    located = stream(stores).locate(np.arange(2000))
    for s, store in enumerate(stores.values()):
        share = store.n_tokens / sum(x.n_tokens for x in stores.values())
        assert abs((located.source == s).sum() - 2000 * share) <= 2


def test_where_finds_the_tokens_of_each_row(stores):
    s = stream(stores)
    ids = np.array([0, 5, 777, 10**7])
    for row, tokens in zip(s.where(ids), s.rows(ids), strict=True):
        store = stores[row.source]
        parts = [store.document(p.document)[p.offset : p.offset + p.length] for p in row.spans]
        opening = [[1]] if row.row == 0 else []
        assert np.array_equal(np.concatenate(opening + parts), tokens)
        assert all(p.length > 0 for p in row.spans)


def test_fingerprint_tells_what_changed(stores):
    s = stream(stores)
    s.check(s.fingerprint)
    others = {
        "seed": stream(stores, seed=1),
        "seq_len": stream(stores, seq_len=T + 1),
        "weights": stream(stores, weights={"a": 1.0, "b": 1.0, "c": 1.0}),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"data.{name}: expected .* got"):
            other.check(s.fingerprint)
    with pytest.raises(ValueError, match="data.order_version"):
        s.check({})


def test_refuses_what_cannot_be_streamed(stores, tmp_path):
    with pytest.raises(ValueError, match="expected one for each of"):
        stream(stores, weights={"a": 1.0})
    with pytest.raises(ValueError, match="c: expected more than seq_len=1000 tokens"):
        stream(stores, seq_len=1000)
    with pytest.raises(ValueError, match="seq_len: expected at least 1"):
        stream(stores, seq_len=0)
    other = write_store(tmp_path / "other", [[[5] * 50]], tokenizer="another")
    with pytest.raises(ValueError, match="expected one tokenizer, got 2"):
        stream(stores | {"other": other})


def test_a_store_smaller_than_a_block_repeats_in_epochs(tmp_path):
    s = stream({"a": write_store(tmp_path, [[list(range(3, 42))]])})  # 41 tokens, 3 windows
    located = s.locate(np.arange(300))
    assert np.array_equal(np.sort(located.row.reshape(100, 3), 1), np.tile(np.arange(3), (100, 1)))
    assert np.array_equal(located.epoch, np.repeat(np.arange(100), 3))
