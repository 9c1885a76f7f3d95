"""Batches that grow: their shapes by a plain walk through the run, and rows that are cut without a loss."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import BatchPhase, BatchSchedule, Stream
from lm.data.loader.reader import HostReader
from lm.data.stream.batches import BatchShape, cut, row_ids
from lm.errors import UserError
from tests.data.conftest import random_store

T = 12


@st.composite
def ramps(draw):
    ends = sorted(draw(st.sets(st.integers(1, 60), max_size=4)))
    size = st.none() | st.integers(1, 7)
    phases = [
        BatchPhase(
            until_examples=end, batch_size=draw(size), seq_len=draw(st.none() | st.sampled_from([2, 3, 4, 6, 12]))
        )
        for end in ends
    ]
    return BatchSchedule(phases, batch_size=draw(st.integers(1, 9)), seq_len=T), phases


def walk(ramp, phases, steps):
    """The examples seen before each step and the shape of its batch, one step at a time."""
    seen, out = 0, []
    for _ in range(steps):
        phase = next((s for s in phases if seen < s.until_examples), BatchPhase(until_examples=10**9))
        examples, seq_len = phase.batch_size or ramp.shapes[-1].examples, phase.seq_len or T
        if phase.batch_size is None:
            examples = ramp.shape(10**9).examples
        out.append((seen, BatchShape(examples, examples * T // seq_len, seq_len)))
        seen += examples
    return out


@settings(max_examples=200, deadline=None)
@given(ramps(), st.integers(0, 70), st.integers(0, 40))
def test_shapes_and_positions_are_those_of_a_walk_through_the_run(made, example, step):
    ramp, phases = made
    path = walk(ramp, phases, 120)
    assert all(ramp.shape(seen) == shape for seen, shape in path)
    assert [ramp.after(0, i) for i in range(120)] == [seen for seen, _ in path]
    seen = path[step][0]
    assert [ramp.after(seen, i) for i in range(60)] == [s for s, _ in path[step : step + 60]]
    assert ramp.steps_before(seen, example) == sum(seen < s <= example for s, _ in path[step:])
    coming = [shape for s, shape in path[step:] if shape != path[step][1]]
    if coming:  # a phase that a batch passed over whole may be announced, and never comes
        assert ramp.following(seen) is not None
    assert path[-1][1] == ramp.shapes[-1] or len(ramp.shapes) == 1 or path[-1][1] in ramp.shapes
    assert len(set(ramp.shapes)) == len(ramp.shapes)


@pytest.mark.parametrize("rows_per_example", [1, 2, 3, 4, 6, 12])
def test_each_target_of_a_row_is_in_one_of_its_rows_and_follows_its_input(rows_per_example):
    rows = np.arange(5 * (T + 1)).reshape(5, T + 1)
    parts = cut(rows, rows_per_example)
    assert parts.shape == (5 * rows_per_example, T // rows_per_example + 1)
    assert np.array_equal(parts[:, 1:].reshape(5, T), rows[:, 1:])
    assert np.array_equal(parts[:, :-1].reshape(5, T), rows[:, :-1])


def test_ids_of_pieces_are_of_no_other_example():
    ids, rows = np.repeat([0, 7, 2**40], 4), np.tile(np.arange(4), 3)
    made = row_ids(ids, rows)
    assert len(np.unique(made)) == 12 and (made >= 0).all()
    assert made[::4].tolist() == [0, 7, 2**40]


@pytest.mark.parametrize("rows_per_example", [1, 2, 4])
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_read_the_parts_of_the_rows_of_the_order(tmp_path, hosts, rows_per_example):
    stores = {n: random_store(tmp_path / n, 700, seed=i) for i, n in enumerate("ab")}
    stream = Stream(stores, weights={"a": 2.0, "b": 1.0}, seq_len=T, seed=1)
    examples = lambda batch: {"tokens": batch["tokens"], "other": batch["other"], "example": batch["id"] + 0}
    size = 8  # examples; a host may hold some rows of an example only
    for batch_size in (
        (size, size // rows_per_example) if size // rows_per_example * rows_per_example >= hosts else (size,)
    ):
        readers = [
            HostReader(
                stream,
                rows,
                batch_size=batch_size,
                start=5,
                examples=examples,
                extra_rows=1,
                rows_per_example=rows_per_example,
            )
            for rows in np.split(np.arange(batch_size * rows_per_example), hosts)
        ]
        whole = HostReader(
            stream, np.arange(batch_size), batch_size=batch_size, start=5, examples=examples, extra_rows=1
        )
        for step in range(3):
            parts = [r(step) for r in readers]
            got = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
            expected = whole(step)
            for name in ("tokens", "other"):
                assert np.array_equal(got[name], cut(expected[name], rows_per_example))
            assert np.array_equal(got["example"] % 2**48, np.repeat(expected["example"], rows_per_example))
            assert len(np.unique(got["example"])) == batch_size * rows_per_example


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([BatchPhase(until_examples=0, batch_size=1)], "rising until_examples from 1 to 2^48, got [0]"),
        (
            [BatchPhase(until_examples=9), BatchPhase(until_examples=9)],
            "rising until_examples from 1 to 2^48, got [9, 9]",
        ),
        ([BatchPhase(until_examples=10**23)], "rising until_examples from 1 to 2^48"),
        ([BatchPhase(until_examples=9, seq_len=5)], "expected phases whose seq_len divides data.seq_len 12"),
        ([BatchPhase(until_examples=9, seq_len=24)], "expected phases whose seq_len divides data.seq_len 12"),
        ([BatchPhase(until_examples=9, batch_size=0)], "expected batch_size of at least 1, got 0"),
    ],
)
def test_ramps_that_cannot_be_are_refused(phases, message):
    with pytest.raises(UserError, match="data.ramp: ") as e:
        BatchSchedule(phases, batch_size=4, seq_len=T)
    assert message in str(e.value)


def test_a_stage_says_nothing_that_the_data_does_not(tmp_path):
    assert dataclasses.asdict(BatchPhase(until_examples=3)) == {
        "until_examples": 3,
        "batch_size": None,
        "seq_len": None,
    }
    assert BatchSchedule((), batch_size=4, seq_len=T).shapes == [BatchShape(4, 4, T)]
    assert BatchSchedule((), batch_size=4, seq_len=T).end(10) is None
