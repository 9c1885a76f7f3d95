import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import ExcludeDocuments, ExcludeExamples, Stream
from lm.data.loader.reader import HostReader
from lm.data.stream.exclude import SkippedExamples, merge
from tests.data.conftest import random_store

T, EOS, PAD = 13, 1, 0
RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {n: random_store(folder / n, 700, seed=i) for i, n in enumerate("ab")}


def stream(stores, *exclude, packing="split"):
    return Stream(stores, weights={"a": 2.0, "b": 1.0}, seq_len=T, seed=0, packing=packing, exclude=exclude)


@settings(max_examples=50, deadline=None)
@given(ranges=RANGES, seen=st.integers(0, 500))
def test_reads_are_the_examples_outside_of_the_ranges_in_order(ranges, seen):
    skips, inside = SkippedExamples(ranges), {i for r in ranges for i in range(*r)}
    left = [i for i in range(900) if i not in inside]
    assert skips.example(np.arange(600)).tolist() == left[:600]
    assert [skips.reads_before(e) for e in range(0, 400, 7)] == [sum(i < e for i in left) for e in range(0, 400, 7)]
    assert skips.passed(seen) == (left[seen - 1] + 1 if seen else 0)
    assert {i for a, b in merge(ranges).tolist() for i in range(a, b)} == inside


def test_examples_are_passed_over_and_nothing_else_moves(stores):
    plain, holey = stream(stores), stream(stores, ExcludeExamples(ranges=((20, 30), (64, 65))))
    ids = np.arange(100)
    left = np.array([i for i in range(111) if not (20 <= i < 30 or i == 64)])
    assert np.array_equal(holey.rows(ids), plain.rows(left))
    assert [r.example for r in holey.where(ids)] == left.tolist() and [r.id for r in holey.where(ids)] == ids.tolist()
    seen = []
    reader = HostReader(
        holey, np.arange(100), batch_size=100, start=0, examples=lambda b: seen.append(b["id"]) or {"x": b["tokens"]}
    )
    reader(0)
    assert np.array_equal(seen[0], left)  # what randomness is drawn from


def blanked(store, tokens, offsets, numbers):
    """By hand: tokens of excluded documents become padding but where they separate from one that is kept."""
    out, of = tokens.copy(), [store.document_at(int(o)) if o > 0 else None for o in offsets]
    for i, document in enumerate(of):
        if document in numbers:
            opens = tokens[i] == EOS and i + 1 < len(of) and of[i + 1] is not None and of[i + 1] not in numbers
            out[i] = tokens[i] if opens else PAD
    return out


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_excluded_documents_are_padding_and_nothing_else_changes(stores, packing, data):
    store = stores["a"]
    numbers = data.draw(st.sets(st.integers(0, store.n_documents - 1), min_size=1, max_size=9))
    start = data.draw(st.integers(0, store.n_documents - 4))
    excluded = numbers | set(range(start, start + 3))
    exclude = ExcludeDocuments(source="a", numbers=tuple(numbers), ranges=((start, start + 3),))
    plain, holey = stream(stores, packing=packing), stream(stores, exclude, packing=packing)
    ids = np.arange(120)
    before, after, where = plain.rows(ids), holey.rows(ids), plain.where(ids)
    for row, old, new in zip(where, before, after, strict=True):
        if row.source == "b":
            assert np.array_equal(old, new)
            continue
        n = sum(p.length for p in row.spans)
        offsets = np.concatenate([store.document_start(p.document) + p.offset + np.arange(p.length) for p in row.spans])
        if n < (old != PAD).sum():
            offsets = np.concatenate([[0], offsets])
        offsets = np.concatenate([offsets, np.zeros(T + 1 - len(offsets), np.int64)])
        assert np.array_equal(new, blanked(store, old, offsets, excluded))
    for old, new in zip(where, holey.where(ids), strict=True):
        assert [p._replace(excluded=False) for p in new.spans] == old.spans and new._replace(spans=old.spans) == old
        assert [p.excluded for p in new.spans] == [new.source == "a" and p.document in excluded for p in new.spans]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_document_after_an_excluded_one_still_has_its_separator(stores, packing):
    """It would be read as part of the one before it."""
    kept = 0
    for number in range(2, 25):
        exclude = ExcludeDocuments(source="a", ranges=((0, number),))
        holey = stream(stores, exclude, packing=packing)
        ids = np.arange(60)
        for row, tokens in zip(holey.where(ids), holey.rows(ids), strict=True):
            column = 0
            for span in row.spans:
                if row.source == "a" and span.document == number and span.offset == 0 and column:
                    assert tokens[column - 1] == EOS and tokens[column] != PAD
                    kept += bool(column > 1 and packing == "split" and tokens[column - 2] == PAD)
                column += span.length
    assert kept or packing == "best_fit"


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_stands_for_whole_documents_or_their_parts(stores, packing, data):
    """What an objective relies on: before padding a document ends or the row begins, after it one opens."""
    n = stores["a"].n_documents
    numbers = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    tokens = stream(stores, ExcludeDocuments(source="a", numbers=tuple(numbers)), packing=packing).rows(np.arange(120))
    is_padding = tokens == PAD
    assert (tokens[:, 1:][is_padding[:, :-1] & ~is_padding[:, 1:]] == EOS).all()
    assert (tokens[:, :-1][~is_padding[:, :-1] & is_padding[:, 1:]] == EOS).all()
    without = stream(stores, packing=packing).rows(np.arange(120))
    assert (tokens == without)[~is_padding].all()


def test_exclusions_may_change_on_resume_where_nothing_was_read(stores):
    saved = stream(stores, ExcludeExamples(ranges=((20, 30),))).fingerprint
    for seen in (0, 19, 20, 500):
        stream(stores, ExcludeExamples(ranges=((20, 30),))).check(saved, seen)
    more = stream(stores, ExcludeExamples(ranges=((20, 30), (100, 200))), ExcludeDocuments(source="b", numbers=(1,)))
    more.check(saved, 90)  # read up to example 99
    with pytest.raises(ValueError, match="data.exclude: expected to pass over .* as when the checkpoint was written"):
        more.check(saved, 91)
    stream(stores).check(saved, 20)
    for seen in (21, None):
        with pytest.raises(ValueError, match="data.exclude: .*removing the later folders of checkpoints/"):
            stream(stores).check(saved, seen)
    stream(stores).check(stream(stores, ExcludeDocuments(source="a", numbers=(0,))).fingerprint)


def test_refuses_what_is_not_there(stores):
    with pytest.raises(ValueError, match="expected numbers below the .* documents of .* got 9999"):
        stream(stores, ExcludeDocuments(source="a", numbers=(9999,)))
    with pytest.raises(ValueError, match=r"expected a source of \['a', 'b'\], got 'c'"):
        stream(stores, ExcludeDocuments(source="c", numbers=(1,)))
    with pytest.raises(ValueError, match="expected numbers or ranges, got none"):
        ExcludeDocuments(source="a")
    for bad in ((5, 5), (-1, 3), (7, 2)):
        with pytest.raises(ValueError, match="expected ranges .start, stop. with 0 <= start < stop"):
            ExcludeExamples(ranges=(bad,))
