import contextlib
import threading
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.data import Phase, Stream
from lm.data.loader import tfdata
from lm.data.loader.evaluation import eval_batches
from lm.data.loader.host_rows import HostRows
from lm.data.loader.loader import make_loader
from lm.data.loader.reader import HostReader, identity
from lm.data.loader.tfdata import GROUP, host_batches
from tests.data.conftest import random_store, write_store

T, B = 13, 16


@pytest.fixture
def stream(tmp_path):
    stores = {n: random_store(tmp_path / n, 2000, seed=i) for i, n in enumerate("ab")}
    return Stream(stores, weights={"a": 0.7, "b": 0.3}, seq_len=T, seed=3)


ROWS = P("data")


def sharding(shape=(8,), names=("data",), spec=ROWS):
    mesh = jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )
    return NamedSharding(mesh, spec)


def take(loader, n):
    with loader:
        return [np.asarray(next(loader)["tokens"]) for _ in range(n)]


def row_keyed(batch):
    """As an objective may: randomness from the ids, arrays of several shapes and types."""
    noise = (batch["id"][:, None] * 2654435761 + np.arange(T)) % 97
    return {"tokens": batch["tokens"], "noise": noise.astype(np.float32), "length": (batch["id"] % 7).astype(np.int32)}


@pytest.mark.parametrize("group_bytes", [1, 5 * B * (T + 1) * 4, 2**30])  # 1, 5 and 16 batches at once
def test_batches_are_the_rows_of_consecutive_ids(stream, monkeypatch, group_bytes):
    monkeypatch.setattr("lm.data.loader.tfdata.GROUP_BYTES", group_bytes)
    loader = make_loader(stream, sharding=sharding(), batch_size=B, start=5)
    for step, tokens in enumerate(take(loader, 70)):
        assert np.array_equal(tokens, stream.rows(5 + step * B + np.arange(B)))


def test_resume_at_any_step_equals_uninterrupted(stream):
    whole = take(make_loader(stream, sharding=sharding(), batch_size=B), 9)
    with make_loader(stream, sharding=sharding(), batch_size=B) as loader:
        for _ in range(4):
            next(loader)
        seen = loader.examples_seen
    assert seen == 4 * B
    rest = take(make_loader(stream, sharding=sharding(), batch_size=B, start=seen), 5)
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_a_resumed_run_may_change_its_batch_size(stream):
    small = take(make_loader(stream, sharding=sharding(), batch_size=8, start=16), 4)
    large = take(make_loader(stream, sharding=sharding(), batch_size=32, start=16), 1)
    assert np.array_equal(np.concatenate(small), large[0])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_read_what_one_reads(stream, hosts):
    kw = dict(batch_size=B, start=7, examples=row_keyed)
    whole = HostReader(stream, np.arange(B), **kw)
    parts = [HostReader(stream, rows, **kw) for rows in np.split(np.arange(B), hosts)]
    for step in (0, 1, 200, 3):
        expected = whole(step)
        got = [part(step) for part in parts]
        for name in expected:
            assert np.array_equal(np.concatenate([g[name] for g in got]), expected[name])


@pytest.mark.parametrize(
    "layout",
    [
        ((1,), ("data",), P("data")),
        ((8,), ("data",), P("data")),
        ((4, 2), ("data", "tensor"), P("data")),
        ((2, 4), ("data", "fsdp"), P(("data", "fsdp"))),
        ((8,), ("data",), P()),
    ],
    ids=str,
)
def test_every_sharding_gives_the_same_global_batch(stream, layout):
    target = sharding(*layout)
    with make_loader(stream, sharding=target, batch_size=B, examples=row_keyed) as loader:
        batch = next(loader)
    expected = row_keyed({"tokens": stream.rows(np.arange(B)), "id": np.arange(B)})
    assert set(batch) == {"tokens", "noise", "length"}
    for name, x in batch.items():
        assert np.array_equal(x, expected[name]) and x.dtype == expected[name].dtype
        assert x.sharding.is_equivalent_to(NamedSharding(target.mesh, P(*target.spec[:1])), x.ndim)


def test_a_process_reads_only_the_rows_of_its_devices(monkeypatch):
    target = sharding((4, 2), ("data", "tensor"))
    everything = NamedSharding.addressable_devices_indices_map
    mine = set(target.mesh.devices[[1, 3]].flat)  # a process may hold rows that are not neighbours
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {d: i for d, i in everything(self, shape).items() if d in mine},
    )
    assert HostRows(target, B).rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_closing_leaves_no_thread_and_no_more_batches(stream):
    take(make_loader(stream, sharding=sharding(), batch_size=B), 2)  # TensorFlow's own threads exist from here on
    before = threading.active_count()
    loader = make_loader(stream, sharding=sharding(), batch_size=B)
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() <= before
    with pytest.raises(ValueError, match="after close"):
        next(loader)


def test_closing_waits_for_the_batch_that_is_read_and_not_for_its_group(stream, monkeypatch):
    made, closed, waits, closing = [], [], threading.Event(), threading.Event()
    monkeypatch.setattr(tfdata, "threading", types.SimpleNamespace(Event=lambda: closing))

    def examples(batch):
        made.append(int(batch["id"][0]) // B)
        if made[-1] == GROUP + 2:  # of the second group, read ahead
            waits.set()
            closed.append(closing.wait(60))
        return batch

    reader = HostReader(stream, np.arange(B), batch_size=B, start=0, examples=examples)
    batches = host_batches(reader, prefetch=2)
    next(batches)
    assert waits.wait(60)
    batches.close()
    assert closed == [True] and made == [0, *range(GROUP + 3)]


def test_an_error_in_examples_arrives_as_itself(stream):
    class Odd(Exception):
        pass

    def examples(batch):
        if batch["id"][0] >= 5 * B:
            raise Odd("row 80")
        return batch

    with make_loader(stream, sharding=sharding(), batch_size=B, examples=examples) as loader:
        with pytest.raises(Odd, match="row 80"):
            for _ in range(10):
                next(loader)


@pytest.mark.parametrize("group_bytes", [1, 5 * B * (T + 1) * 4, 2**30])
def test_an_error_comes_at_its_batch_however_many_are_read_at_once(stream, monkeypatch, group_bytes):
    def examples(batch):
        if batch["id"][0] >= 12 * B:
            raise KeyError("batch 12")
        return batch

    monkeypatch.setattr("lm.data.loader.tfdata.GROUP_BYTES", group_bytes)
    reader = HostReader(stream, np.arange(B), batch_size=B, start=0, examples=examples)
    with contextlib.closing(host_batches(reader, prefetch=2)) as batches:
        for step in range(12):
            assert np.array_equal(next(batches)["tokens"], stream.rows(step * B + np.arange(B)))
        with pytest.raises(KeyError, match="batch 12"):
            next(batches)
    with make_loader(stream, sharding=sharding(), batch_size=B, examples=examples) as loader:
        for _ in range(12):
            next(loader)
        for _ in range(2):  # and no end of the batches, which a loop would take for the end of the run
            with pytest.raises(KeyError, match="batch 12"):
                next(loader)
        assert loader.examples_seen == 12 * B


def test_a_row_that_has_no_pair_stops_at_its_batch(tmp_path):
    stores = {"a": random_store(tmp_path / "a", 2000), "b": write_store(tmp_path / "b", [[list(range(3, 20))]])}
    weights = (Phase(until_examples=5 * B, weights={"a": 1.0}), Phase(weights={"b": 1.0}))
    stream = Stream(stores, weights=weights, seq_len=T, seed=3)
    reader = HostReader(stream, np.arange(B), batch_size=B, start=0, examples=identity, extra_rows=1)
    with contextlib.closing(host_batches(reader, prefetch=2)) as batches:
        for _ in range(5):
            assert set(next(batches)) == {"tokens", "other"}
        with pytest.raises(ValueError, match=r"data.sources\['b'\]: expected at least 2 rows, to pair one with"):
            next(batches)


def test_examples_must_keep_shapes(stream):
    def ragged(batch):
        return {"tokens": batch["tokens"][:, : 5 + int(batch["id"][0] > 0)]}

    with make_loader(stream, sharding=sharding(), batch_size=B, examples=ragged) as loader:
        with pytest.raises(ValueError, match=r"examples\(\): expected 'tokens' .* as in the first batch"):
            for _ in range(5):
                next(loader)


def test_refuses_shardings_and_sizes_it_cannot_serve(stream):
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 8 devices .* got 12"):
        make_loader(stream, sharding=sharding(), batch_size=12)
    with pytest.raises(ValueError, match="splits rows only"):
        make_loader(stream, sharding=sharding((4, 2), ("data", "seq"), P("data", "seq")), batch_size=B)
    with pytest.raises(ValueError, match="batch_size >= 1 and start >= 0"):
        make_loader(stream, sharding=sharding(), batch_size=B, start=-1)


@pytest.mark.parametrize("n_tokens", [2, T, T + 1, T + 2, 8 * T + 1, 17 * T, 400])
def test_evaluation_sees_each_token_once_as_a_target(tmp_path, n_tokens):
    store = write_store(tmp_path, [[[3 + i % 400 for i in range(n_tokens - 2)]]])
    assert store.n_tokens == n_tokens
    batches = [np.asarray(b["tokens"]) for b in eval_batches(store, seq_len=T, batch_size=8, sharding=sharding())]
    assert all(b.shape == (8, T + 1) for b in batches)
    rows = np.concatenate(batches)
    targets = rows[:, 1:].reshape(-1)
    flat = store.read(0, n_tokens)
    assert np.array_equal(targets[targets != 0], flat[1:])
    assert np.array_equal(targets[: n_tokens - 1], flat[1:]) and len(batches) == -(-(n_tokens - 1) // (8 * T))
    assert np.array_equal(rows[: -(-(n_tokens - 1) // T), 0], flat[:-1:T])


def test_evaluation_stops_at_max_batches_and_maps_examples(tmp_path):
    store = random_store(tmp_path, 600)
    kw = dict(seq_len=T, batch_size=8, sharding=sharding())
    assert len(list(eval_batches(store, max_batches=2, **kw))) == 2
    batch = next(eval_batches(store, examples=row_keyed, **kw))
    assert np.array_equal(batch["length"], np.arange(8) % 7)
    assert identity({"tokens": 1}) == {"tokens": 1}
