"""One order for any number of hosts, and from `examples_seen` on for any other number and batch size."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import ExcludeDocuments, ExcludeExamples, Phase, Stream
from lm.data.loader.reader import HostReader
from tests.data.conftest import random_store

T = 13
HOSTS = [1, 2, 4, 8]
MIXED = (
    Phase(until_examples=53, weights={"a": 0.5, "b": 0.5}),
    Phase(until_examples=131, weights={"a": 0.2, "b": 0.5, "c": 0.3}),
    Phase(weights={"b": 0.1, "c": 0.9}),
)
EXCLUDE = (
    ExcludeExamples(ranges=((40, 60), (128, 133))),
    ExcludeDocuments(source="a", numbers=(2, 9), ranges=((4, 7),)),
    ExcludeDocuments(source="c", ranges=((0, 5),)),
)
CASES = {
    "one source": dict(weights={"a": 1.0}),
    "mixture": dict(weights={"a": 0.6, "b": 0.3, "c": 0.1}),
    "phases": dict(weights=MIXED),
    "packed": dict(weights=None, packing="best_fit"),
    "limits": dict(weights={"a": 1.0, "b": 1.0, "c": 1.0}, epochs={"a": 0.5, "c": 1.2}, when_exhausted="hand_over"),
    "excluded": dict(weights={"a": 0.6, "b": 0.3, "c": 0.1}, exclude=EXCLUDE),
    "all": dict(
        weights=MIXED,
        packing="best_fit",
        weigh="tokens",
        epochs={"c": 0.7},
        when_exhausted="hand_over",
        exclude=EXCLUDE,
    ),
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    stores = {n: random_store(folder / n, 800, seed=i) for i, n in enumerate("abc")}
    make = lambda kw: Stream(
        {n: stores[n] for n in ("a" if len(kw["weights"] or "abc") == 1 else "abc")}, seq_len=T, seed=3, **kw
    )
    return {name: make(kw) for name, kw in CASES.items()}


def with_ids(batch):
    return {"tokens": batch["tokens"], "example": batch["id"] + 0}


def global_batches(stream, hosts, batch_size, start, steps):
    """As `steps` batches of the hosts together: tokens [n, T+1] and the examples [n] they are."""
    shares = np.split(np.arange(batch_size), hosts)
    readers = [HostReader(stream, rows, batch_size=batch_size, start=start, examples=with_ids) for rows in shares]
    batches = [[reader(step) for reader in readers] for step in range(steps)]
    join = lambda name: np.concatenate([host[name] for step in batches for host in step])
    return join("tokens"), join("example")


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_hosts_reads_the_same_batches(streams, case):
    digests = {
        hashlib.sha256(b"".join(x.tobytes() for x in global_batches(streams[case], hosts, 16, 8, 12))).hexdigest()
        for hosts in HOSTS
    }
    assert len(digests) == 1
    tokens, example = global_batches(streams[case], 4, 16, 8, 12)
    assert np.array_equal(tokens, streams[case].rows(8 + np.arange(192)))
    assert np.array_equal(example, streams[case].locate(8 + np.arange(192)).example)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_run_killed_anywhere_goes_on_with_other_hosts_and_batches(streams, case, data):
    """Each part runs on what it is given and is killed after some steps, of which the last may be lost."""
    stream, seen, tokens, examples = streams[case], 0, [], []
    for _ in range(data.draw(st.integers(2, 5))):
        hosts = data.draw(st.sampled_from(HOSTS))
        batch_size = hosts * data.draw(st.integers(1, 5))
        steps, saved = data.draw(st.tuples(st.integers(1, 6), st.integers(0, 6)).map(sorted).map(reversed))
        got, ids = global_batches(stream, hosts, batch_size, seen, max(steps, 1))
        tokens.append(got[: saved * batch_size])
        examples.append(ids[: saved * batch_size])
        seen += saved * batch_size
    whole = np.arange(seen)
    assert np.array_equal(np.concatenate(tokens), stream.rows(whole))
    assert np.array_equal(np.concatenate(examples), stream.locate(whole).example)


@pytest.mark.parametrize("case", CASES)
def test_no_row_is_read_twice_in_an_epoch_nor_left_out(streams, case):
    stream = streams[case]
    located = stream.locate(np.arange(400))
    skipped = {i for a, b in ((40, 60), (128, 133)) for i in range(a, b)} if "exclude" in CASES[case] else set()
    assert located.example.tolist() == [i for i in range(426) if i not in skipped][:400]
    every = Stream(
        dict(zip(stream.names, stream.stores, strict=True)), seq_len=T, seed=3, **CASES[case] | {"exclude": ()}
    ).locate(np.arange(int(located.example[-1]) + 1))
    for s, n in enumerate(stream.n_rows):
        mine = every.source == s
        rows = every.epoch[mine] * n + every.row[mine]
        assert len(np.unique(rows)) == len(rows)
        for epoch in range(int(every.epoch[mine].max(initial=0))):  # those that ended
            assert sorted(every.row[mine & (every.epoch == epoch)].tolist()) == list(range(n))
    assert np.array_equal(located.row, every.row[located.example]) and np.array_equal(
        located.epoch, every.epoch[located.example]
    )
