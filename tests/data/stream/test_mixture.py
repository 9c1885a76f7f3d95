import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import codec
from lm.data import BatchSchedule, Data, Docstrings, ExcludeDocuments, ExcludeExamples, Phase, Stdlib, Stream
from lm.data.stream.index import BLOCK, Mixture
from lm.data.stream.mixture import MixtureSchedule, as_phases, mean_weight
from lm.errors import UserError
from tests.data.conftest import random_store, write_store

T = 13
NAMES = ["a", "b", "c"]
A, B, C = range(3)


def phases(*pairs):
    return tuple(Phase(until_examples=until, weights=weights) for until, weights in pairs)


def one_at_a_time(names, changes, n):
    """(source, drawn) of n examples by counting: a mixture from each change on, and a counter for each source."""
    counters, out = dict.fromkeys(names, 0), []
    for (start, weights), (end, _) in zip(changes, [*changes[1:], (n, None)], strict=True):
        order = [n for n in names if n in weights]
        source, _ = Mixture({n: weights[n] for n in order})(np.arange(end - start))
        for s in source.tolist():
            out.append((names.index(order[s]), counters[order[s]]))
            counters[order[s]] += 1
    return out


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_sources_go_on_across_phases(data):
    n_phases = data.draw(st.integers(1, 4))
    ends = sorted(data.draw(st.sets(st.integers(1, 3000), min_size=n_phases - 1, max_size=n_phases - 1)))
    weight = st.dictionaries(st.sampled_from(NAMES), st.floats(0.05, 1), min_size=1)
    weights = [data.draw(weight) for _ in range(n_phases)]
    schedule = MixtureSchedule(NAMES, phases(*zip([*ends, None], weights, strict=True)), {}, hand_over=False)
    source, drawn = schedule(np.arange(4000))
    assert list(zip(source.tolist(), drawn.tolist(), strict=True)) == one_at_a_time(
        NAMES, list(zip([0, *ends], weights, strict=True)), 4000
    )
    ids = np.random.default_rng(0).integers(0, 4000, 300)
    again = schedule(ids)
    assert np.array_equal(again[0], source[ids]) and np.array_equal(again[1], drawn[ids])


def test_a_phase_longer_than_a_block_ends_with_the_right_counts():
    end = 3 * BLOCK + 12345
    schedule = MixtureSchedule(NAMES, phases((end, {"a": 1, "b": 3}), (None, {"a": 1, "c": 1})), {}, hand_over=False)
    source, drawn = schedule(np.arange(end + 10))
    for s in (A, B):
        mine = drawn[source == s]
        assert np.array_equal(mine, np.arange(len(mine)))
    assert set(source[end:].tolist()) == {A, C}


def test_phases_of_equal_weights_deal_as_if_there_were_none_in_sum():
    """The pattern starts anew, the counters do not."""
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    split = MixtureSchedule(NAMES, phases((777, weights), (None, weights)), {}, hand_over=False)
    source, drawn = split(np.arange(2000))
    plain, _ = MixtureSchedule(NAMES, phases((None, weights)), {}, hand_over=False)(np.arange(2000))
    assert np.array_equal(source[:777], plain[:777])
    assert [abs(int((source == s).sum() - (plain == s).sum())) <= 2 for s in range(3)] == [True] * 3
    assert all(np.array_equal(drawn[source == s], np.arange((source == s).sum())) for s in range(3))


@settings(max_examples=40, deadline=None)
@given(
    weights=st.tuples(*[st.floats(0.1, 1)] * 3),
    limits=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 400), max_size=3),
    cut=st.integers(1, 900),
)
def test_a_source_at_its_limit_hands_over_and_gives_no_more(weights, limits, cut):
    named = dict(zip(NAMES, weights, strict=True))
    schedule = MixtureSchedule(NAMES, phases((cut, named), (None, named)), limits, hand_over=True)
    n = 2000 if schedule.end is None else schedule.end
    source, drawn = schedule(np.arange(n))
    for s, name in enumerate(NAMES):
        mine = source == s
        assert np.array_equal(drawn[mine], np.arange(mine.sum()))
        assert mine.sum() <= limits.get(name, n)
        if schedule.out.get(name, n) < n:
            assert mine.sum() == limits[name] and not mine[schedule.out[name] :].any()
    if schedule.end is None:
        assert len(limits) < 3
    else:
        assert n == sum(limits.values()) and len(limits) == 3
        assert len(schedule(np.arange(n, n + 50))[0]) == 50  # readers read ahead


def test_the_others_share_what_a_source_leaves_by_their_weights():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    schedule = MixtureSchedule(NAMES, phases((None, weights)), {"a": 100}, hand_over=True)
    out = schedule.out["a"]
    source, _ = schedule(np.arange(out + 5000))
    assert (source[:out] == A).sum() == 100 and abs(out - 200) <= 2
    assert (source[out:] == B).sum() == 3000 and (source[out:] == C).sum() == 2000


def test_without_handing_over_nothing_changes_but_the_end_is_known():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    free = MixtureSchedule(NAMES, phases((None, weights)), {}, hand_over=False)
    limited = MixtureSchedule(NAMES, phases((None, weights)), {"a": 100, "c": 90}, hand_over=False)
    source, drawn = limited(np.arange(1000))
    assert np.array_equal(source, free(np.arange(1000))[0])
    for s, name in ((A, "a"), (C, "c")):
        first = int(np.flatnonzero((source == s) & (drawn >= {"a": 100, "c": 90}[name]))[0])
        assert limited.out[name] == first
    assert limited.end == limited.out["a"] and free.end is None and free.out == {}


@pytest.mark.parametrize(("epochs", "rows"), [(0.29, 29), (1.15, 115), (2.3, 230), (0.999, 99), (3, 300), (1e-2, 1)])
def test_epochs_are_the_number_as_it_is_written(tmp_path, epochs, rows):
    """Of 100 rows; as floats, 0.29 * 100 is 28.999999999999996."""
    store = write_store(tmp_path, [[[5] * (T * 100 - 1)]])
    stream = Stream({"a": store}, weights=None, seq_len=T, seed=0, epochs={"a": epochs})
    assert stream.n_rows == [100]
    assert stream.exhausted(rows) == {} and stream.exhausted(rows + 1) == {"a": rows}


def test_a_run_is_told_in_which_step_its_text_ends(tmp_path):
    stores = {n: write_store(tmp_path / n, [[[5] * 12] * k]) for n, k in (("a", 100), ("b", 40))}
    kw = dict(weights={"a": 1.0, "b": 1.0}, seq_len=T, seed=0)
    ramp = BatchSchedule((), batch_size=8, seq_len=T)
    enough = dict(step=0, examples_seen=0, ramp=ramp)
    limited = Stream(stores, **kw, epochs={"b": 1.5})  # 60 rows, every other one: examples 0..119
    assert limited.exhausted(120) == {} and list(limited.exhausted(122)) == ["b"]
    limited.check_epochs(steps=15, **enough)
    with pytest.raises(
        ValueError, match=r"data.epochs\['b'\]: expected text for 17 steps, got 1.5 .* end in step 16; "
    ):
        limited.check_epochs(steps=17, **enough)
    with pytest.raises(ValueError, match="end in step 16; .* or set data.when_exhausted=hand_over"):
        limited.check_epochs(step=10, examples_seen=80, steps=17, ramp=ramp)
    with pytest.raises(ValueError, match="which ended 39 examples before step 20; raise it"):  # it was lowered
        limited.check_epochs(step=20, examples_seen=160, steps=21, ramp=ramp)
    limited.check_epochs(step=20, examples_seen=160, steps=20, ramp=ramp)  # reads nothing more
    shared = Stream(stores, **kw, epochs={"b": 1.5}, when_exhausted="hand_over")
    shared.check_epochs(steps=10**6, **enough)
    both = Stream(stores, **kw, epochs={"a": 1, "b": 1.5}, when_exhausted="hand_over")  # 160 rows in all
    both.check_epochs(steps=20, **enough)
    with pytest.raises(ValueError, match=r"data.epochs\['a'\]: .* end in step 21; .*; no other source has more"):
        both.check_epochs(steps=21, **enough)
    assert both.locate(np.arange(160)).epoch[both.locate(np.arange(160)).source == 0].max() == 0


@pytest.fixture
def stores(tmp_path):
    return {n: random_store(tmp_path / n, 700, seed=i) for i, n in enumerate(NAMES)}


def test_what_lies_ahead_may_change_and_what_was_read_may_not(stores):
    old = {"a": 1.0, "b": 1.0}
    ab = {n: stores[n] for n in "ab"}
    make = lambda w, s=ab, **kw: Stream(s, weights=w, seq_len=T, seed=0, **kw)
    saved = make(phases((100, old), (None, {"a": 1.0, "b": 3.0}))).fingerprint
    later = make(phases((100, old), (None, {"a": 9.0, "b": 1.0})))
    later.check(saved, 100)
    for seen in (101, None):
        with pytest.raises(ValueError, match="data.weights: expected .* as when the checkpoint was written"):
            later.check(saved, seen)
    make(phases((60, old), (None, {"a": 1.0, "b": 2.0}))).check(make(old).fingerprint, 60)
    with pytest.raises(ValueError, match="data.weights"):
        make(phases((59, old), (None, {"a": 1.0, "b": 2.0}))).check(make(old).fingerprint, 60)
    more = make(phases((60, old), (None, {"a": 1.0, "c": 2.0})), stores)  # another source comes in
    more.check(make(old).fingerprint, 60)
    ids = np.arange(60)
    assert np.array_equal(more.rows(ids), make(old).rows(ids))
    with pytest.raises(ValueError, match="data.weights|data.stores"):
        more.check(make(old).fingerprint, 61)
    make(old, epochs={"a": 3.0}).check(make(old).fingerprint, 60)
    limited = make(old, epochs={"a": 0.5}, when_exhausted="hand_over")
    limited.check(make(old).fingerprint, limited.exhausted(10**6)["a"])
    with pytest.raises(ValueError, match="data.weights"):
        limited.check(make(old).fingerprint, limited.exhausted(10**6)["a"] + 1)


def test_a_small_source_may_come_in_or_go_later(stores, tmp_path):
    """Sources of up to 32 rows have another order since version 2, which the others do not meet."""
    old = {"a": 1.0, "b": 1.0}
    stores = {"a": stores["a"], "b": stores["b"], "c": random_store(tmp_path / "small", 100)}
    alone = Stream({n: stores[n] for n in "ab"}, weights=old, seq_len=T, seed=0)
    more = Stream(stores, weights=phases((60, old), (None, {"a": 1.0, "c": 1.0})), seq_len=T, seed=0)
    assert [s.fingerprint["order_version"] for s in (alone, more)] == [1, 2]
    for saved, now in ((alone, more), (more, alone)):
        now.check(saved.fingerprint, 60)
        with pytest.raises(ValueError, match="expected .* as when the checkpoint was written"):
            now.check(saved.fingerprint, 61)
    more.check(more.fingerprint, 100)
    for version in (1, 3):  # what was read of c has another order
        with pytest.raises(ValueError, match=f"data.order_version: expected {version} "):
            more.check(more.fingerprint | {"order_version": version}, 100)


def test_refuses_phases_and_limits_that_say_nothing(stores):
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    for bad in (
        (),
        phases((5, weights)),
        phases((None, weights), (None, weights)),
        phases((0, weights), (None, weights)),
    ):
        with pytest.raises(ValueError, match="expected phases of rising until_examples"):
            as_phases(bad, NAMES)
    with pytest.raises(ValueError, match=r"expected each of \['a', 'b', 'c'\] in one phase or more, got \['a'\]"):
        as_phases(phases((None, {"a": 1.0})), NAMES)
    assert mean_weight(phases((9, {"a": 1.0, "b": 3.0}), (None, {"b": 5.0})), "b") == (0.75 + 1) / 2
    for epochs in ({"d": 1.0}, {"a": 0.0}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="data.epochs: expected positive numbers for some of"):
            Stream(stores, weights=None, seq_len=T, seed=0, epochs=epochs)


def test_the_fields_travel_through_json_and_the_command_line():
    data = Data(
        path="corpus",
        sources={"a": Stdlib(), "b": Docstrings()},
        tokenizer="some.model",
        weights=phases((100, {"a": 1.0}), (None, {"a": 1.0, "b": 2.0})),
        weigh="tokens",
        packing="best_fit",
        epochs={"b": 1.5},
        when_exhausted="hand_over",
        exclude=(ExcludeExamples(ranges=((3, 5),)), ExcludeDocuments(source="a", numbers=(1,))),
        seq_len=T,
        batch_size=8,
    )
    assert codec.decode(Data, json.loads(json.dumps(codec.encode(data)))) == data
    given = codec.override(data, "weights=[Phase(until_examples=9, weights={'a': 1}), Phase(weights={'a': 1, 'b': 1})]")
    assert given.weights == phases((9, {"a": 1.0}), (None, {"a": 1.0, "b": 1.0}))
    plain = codec.override(data, "weights={'a': 1, 'b': 3}", "exclude=[ExcludeDocuments(source=b, ranges=[[3, 9]])]")
    assert plain.weights == {"a": 1.0, "b": 3.0} and plain.exclude[0].ranges == ((3, 9),)
    for change, message in {
        "weights={'a': 1}": "data.weights: expected one for each of",
        "weights=[Phase(until_examples=3, weights={'a': 1, 'b': 1})]": "data.weights: expected phases of rising",
        "epochs={'c': 1.0}": "data.epochs: expected positive numbers for some of",
        "exclude=[ExcludeDocuments(source=c, numbers=[3])]": "data.exclude: expected a source of .* got 'c'",
        "packing=packed": "packing: expected one of 'split', 'best_fit', got 'packed'",
    }.items():
        with pytest.raises(ValueError, match=message):
            codec.override(data, change)


def test_a_source_that_handed_over_in_one_phase_ends_the_run_in_another_that_has_only_it(tmp_path):
    stores = {n: random_store(tmp_path / n, 400, seed=i) for i, n in enumerate("ab")}
    phases = (Phase(until_examples=100, weights={"a": 1.0, "b": 1.0}), Phase(weights={"b": 1.0}))
    limited = Stream(stores, weights=phases, seq_len=10, seed=0, epochs={"b": 1.0}, when_exhausted="hand_over")
    ramp = BatchSchedule((), batch_size=8, seq_len=10)
    limited.check_epochs(step=0, examples_seen=0, steps=12, ramp=ramp)
    with pytest.raises(UserError, match="'b'.*end in step 13"):
        limited.check_epochs(step=0, examples_seen=0, steps=50, ramp=ramp)
    p = limited.locate(np.arange(100))
    assert set(p.epoch[p.source == 1].tolist()) == {0}


def test_weights_whose_sum_is_not_finite_are_refused():
    with pytest.raises(UserError, match="finite sum"):
        Mixture({"a": 1e308, "b": 1e308})
