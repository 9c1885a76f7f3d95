"""Batches that grow: their shapes by a plain walk through the run, and rows that are cut without a loss."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import Ramp, Stage, Stream
from lm.data.loader.reader import HostReader
from lm.data.stream.batches import Shape, cut, piece_ids
from lm.errors import UserError
from tests.data.conftest import random_store

T = 12


@st.composite
def ramps(draw):
    ends = sorted(draw(st.sets(st.integers(1, 60), max_size=4)))
    size = st.none() | st.integers(1, 7)
    stages = [
        Stage(until_examples=end, batch_size=draw(size), seq_len=draw(st.none() | st.sampled_from([2, 3, 4, 6, 12])))
        for end in ends
    ]
    return Ramp(stages, batch_size=draw(st.integers(1, 9)), seq_len=T), stages


def walk(ramp, stages, steps):
    """The examples seen before each step and the shape of its batch, one step at a time."""
    seen, out = 0, []
    for _ in range(steps):
        stage = next((s for s in stages if seen < s.until_examples), Stage(until_examples=10**9))
        examples, seq_len = stage.batch_size or ramp.shapes[-1].examples, stage.seq_len or T
        if stage.batch_size is None:
            examples = ramp.shape(10**9).examples
        out.append((seen, Shape(examples, examples * T // seq_len, seq_len)))
        seen += examples
    return out


@settings(max_examples=200, deadline=None)
@given(ramps(), st.integers(0, 70), st.integers(0, 40))
def test_shapes_and_positions_are_those_of_a_walk_through_the_run(made, example, step):
    ramp, stages = made
    path = walk(ramp, stages, 120)
    assert all(ramp.shape(seen) == shape for seen, shape in path)
    assert [ramp.after(0, i) for i in range(120)] == [seen for seen, _ in path]
    seen = path[step][0]
    assert [ramp.after(seen, i) for i in range(60)] == [s for s, _ in path[step : step + 60]]
    assert ramp.steps_before(seen, example) == sum(seen < s <= example for s, _ in path[step:])
    coming = [shape for s, shape in path[step:] if shape != path[step][1]]
    if coming:  # a stage that a batch passed over whole may be announced, and never comes
        assert ramp.following(seen) is not None
    assert path[-1][1] == ramp.shapes[-1] or len(ramp.shapes) == 1 or path[-1][1] in ramp.shapes
    assert len(set(ramp.shapes)) == len(ramp.shapes)


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 6, 12])
def test_each_target_of_a_row_is_one_of_its_pieces_and_follows_its_input(pieces):
    rows = np.arange(5 * (T + 1)).reshape(5, T + 1)
    parts = cut(rows, pieces)
    assert parts.shape == (5 * pieces, T // pieces + 1)
    assert np.array_equal(parts[:, 1:].reshape(5, T), rows[:, 1:])
    assert np.array_equal(parts[:, :-1].reshape(5, T), rows[:, :-1])


def test_ids_of_pieces_are_of_no_other_example():
    ids, pieces = np.repeat([0, 7, 2**40], 4), np.tile(np.arange(4), 3)
    made = piece_ids(ids, pieces)
    assert len(np.unique(made)) == 12 and (made >= 0).all()
    assert made[::4].tolist() == [0, 7, 2**40]


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_read_the_pieces_of_the_rows_of_the_order(tmp_path, hosts, pieces):
    stores = {n: random_store(tmp_path / n, 700, seed=i) for i, n in enumerate("ab")}
    stream = Stream(stores, weights={"a": 2.0, "b": 1.0}, seq_len=T, seed=1)
    examples = lambda batch: {"tokens": batch["tokens"], "other": batch["other"], "example": batch["id"] + 0}
    size = 8  # examples; a host may hold some pieces of an example only
    for batch_size in (size, size // pieces) if size // pieces * pieces >= hosts else (size,):
        readers = [
            HostReader(stream, rows, batch_size=batch_size, start=5, examples=examples, extra_rows=1, pieces=pieces)
            for rows in np.split(np.arange(batch_size * pieces), hosts)
        ]
        whole = HostReader(
            stream, np.arange(batch_size), batch_size=batch_size, start=5, examples=examples, extra_rows=1
        )
        for step in range(3):
            parts = [r(step) for r in readers]
            got = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
            expected = whole(step)
            for name in ("tokens", "other"):
                assert np.array_equal(got[name], cut(expected[name], pieces))
            assert np.array_equal(got["example"] % 2**48, np.repeat(expected["example"], pieces))
            assert len(np.unique(got["example"])) == batch_size * pieces


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(until_examples=0, batch_size=1)], "rising until_examples from 1 to 2^48, got [0]"),
        ([Stage(until_examples=9), Stage(until_examples=9)], "rising until_examples from 1 to 2^48, got [9, 9]"),
        ([Stage(until_examples=10**23)], "rising until_examples from 1 to 2^48"),
        ([Stage(until_examples=9, seq_len=5)], "expected stages whose seq_len divides data.seq_len 12"),
        ([Stage(until_examples=9, seq_len=24)], "expected stages whose seq_len divides data.seq_len 12"),
        ([Stage(until_examples=9, batch_size=0)], "expected batch_size of at least 1, got 0"),
    ],
)
def test_ramps_that_cannot_be_are_refused(stages, message):
    with pytest.raises(UserError, match="data.ramp: ") as e:
        Ramp(stages, batch_size=4, seq_len=T)
    assert message in str(e.value)


def test_a_stage_says_nothing_that_the_data_does_not(tmp_path):
    assert dataclasses.asdict(Stage(until_examples=3)) == {"until_examples": 3, "batch_size": None, "seq_len": None}
    assert Ramp((), batch_size=4, seq_len=T).shapes == [Shape(4, 4, T)]
    assert Ramp((), batch_size=4, seq_len=T).end(10) is None
