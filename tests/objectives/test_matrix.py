"""What every objective promises of its batches, read from a stream as a run reads them."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.data import Stream
from lm.data.loader.evaluation import eval_batches
from lm.data.loader.reader import HostReader
from lm.errors import UserError
from lm.objectives import (
    UL2,
    CausalLM,
    Denoising,
    FillInTheMiddle,
    MaskedLM,
    PrefixLM,
    ReplacedTokens,
    Seq2Seq,
    SpanCorruption,
    UL2Decoder,
)
from lm.objectives.words import WordBoundaries
from tests.data.conftest import random_store, write_store

V, N_SENTINELS, PAD, EOS, NEWLINE = 500, 25, 0, 1, 3
MASK, CLS, SEP, PRE, SUF, MID = range(V, V + 6)
LAST = V + 10  # of the sentinels
FIRST = LAST + N_SENTINELS - 1
MODES = dict(r_id=V + 6, s_id=V + 7, x_id=V + 8)
T, B = 41, 16

BERT = dict(mask_id=MASK, cls_id=CLS, sep_id=SEP, vocab_size=V)
SPANS = dict(first_sentinel_id=FIRST, n_sentinels=N_SENTINELS)
FIM = FillInTheMiddle(prefix_id=PRE, suffix_id=SUF, middle_id=MID)
OBJECTIVES = {
    "causal": CausalLM(),
    "prefix": PrefixLM(),
    "fim": FIM,
    "masked": MaskedLM(**BERT),
    "n-grams": MaskedLM(**BERT, span=3),
    "whole words": MaskedLM(**BERT, whole_word=True),
    "n-grams of whole words": MaskedLM(**BERT, whole_word=True, span=3),
    "sentence order": MaskedLM(**BERT, pair="sop"),
    "next sentence": MaskedLM(**BERT, pair="nsp"),
    "replaced": ReplacedTokens(**BERT),
    "denoising": Denoising(mask_id=MASK),
    "spans": SpanCorruption(**SPANS),
    "ul2": UL2(**SPANS, **MODES),
    "ul2 on a decoder": UL2Decoder(**SPANS, **MODES),
    "pairs": Seq2Seq(max_source=T - 1, max_target=T - 1, separator_id=NEWLINE),
}
MASKED = ("masked", "n-grams", "whole words", "n-grams of whole words", "replaced")
every = pytest.mark.parametrize("name", OBJECTIVES)
# Of the first and last character of each token: two of three tokens go on with a word.
WORDS = WordBoundaries(np.arange(V) % 3 > 0, np.arange(V) % 5 > 0)


def sentences(folder, seed):
    """Documents of 1 to 40 tokens, one in eight of which is a newline."""
    rng = np.random.default_rng(seed)
    document = lambda n: np.where(rng.random(n) < 0.125, NEWLINE, rng.integers(4, V, n)).tolist()
    return write_store(folder, [[document(n) for n in rng.integers(1, 41, 75)]])


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    stores = {n: sentences(folder / n, seed=i) for i, n in enumerate("ab")}
    return Stream(stores, weights={"a": 0.7, "b": 0.3}, seq_len=T, seed=3)


def examples_of(objective):
    whole = isinstance(objective, MaskedLM) and objective.whole_word
    return functools.partial(objective.examples, words=WORDS) if whole else objective.examples


def reader(stream, name, rows=None, *, batch_size=B, start=0):
    objective = OBJECTIVES[name]
    return HostReader(
        stream,
        np.arange(batch_size) if rows is None else rows,
        batch_size=batch_size,
        start=start,
        examples=examples_of(objective),
        extra_rows=objective.extra_rows,
    )


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        assert actual[key].dtype == x.dtype
        np.testing.assert_array_equal(actual[key], x, err_msg=key)


@every
def test_batches_are_as_the_step_was_compiled_for(stream, name):
    features = OBJECTIVES[name].features(B, T)
    batch = reader(stream, name)(3)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (f.shape, f.dtype) for k, f in features.items()}


@every
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_together_make_the_batch_that_one_makes(stream, name, hosts):
    whole = reader(stream, name, start=5)
    for sets in (np.split(np.arange(B), hosts), [np.arange(h, B, hosts) for h in range(hosts)]):
        parts = [reader(stream, name, rows, start=5) for rows in sets]
        back = np.argsort(np.concatenate(sets))
        for step in (0, 7):
            got = [part(step) for part in parts]
            assert_same({k: np.concatenate([g[k] for g in got])[back] for k in got[0]}, whole(step))


@every
def test_rows_are_the_same_for_any_batch_size(stream, name):
    whole = reader(stream, name, batch_size=24, start=8)(2)  # examples 56 to 79
    for size in (4, 8, 12):
        small = reader(stream, name, batch_size=size, start=56)
        parts = [small(i) for i in range(24 // size)]
        assert_same({k: np.concatenate([p[k] for p in parts]) for k in whole}, whole)


@every
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(stream, name):
    whole = reader(stream, name)
    for step in np.random.default_rng(len(name)).integers(1, 200, 3).tolist():
        rest = reader(stream, name, start=step * B)
        for later in (0, 1):
            assert_same(rest(later), whole(step + later))


def unpadded(row) -> list[int]:
    out = [int(t) for t in row]
    while out and out[-1] == PAD:
        out.pop()
    return out


def unspanned(inputs: list[int], targets: list[int]) -> list[int]:
    assert inputs[-1] == targets[-1] == EOS
    parts = {}
    for which, tokens in (("kept", inputs[:-1]), ("lost", targets[:-1])):
        cuts = [i for i, t in enumerate(tokens) if LAST <= t <= FIRST]
        assert [tokens[i] for i in cuts] == [FIRST - n for n in range(len(cuts))]
        parts[which] = [tokens[a + 1 : b] for a, b in zip([-1, *cuts], [*cuts, len(tokens)])]
    (nothing, *lost), kept = parts["lost"], parts["kept"]
    assert nothing == [] and len(kept) == len(lost) + 1
    return [t for k, m in zip(kept, [*lost, []]) for t in k + m]


def unmasked(batch, i) -> list[int]:
    tokens = batch["tokens"][i].copy()
    n = int(batch["weights"][i].sum())
    tokens[batch["positions"][i, :n]] = batch["targets"][i, :n]
    return unpadded(tokens)


def halves(batch, i) -> tuple[list[int], list[int]]:
    tokens = unmasked(batch, i)
    assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
    cut = tokens.index(SEP)
    types = [0] * (cut + 1) + [1] * (len(tokens) - cut - 1)
    assert batch["token_types"][i].tolist() == types + [0] * (T - len(types))
    return tokens[1:cut], tokens[cut + 1 : -1]


def documents(tokens: list[int]) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for t in tokens:
        out[-1].append(t)
        if t == EOS:
            out.append([])
    return out


def unfilled(document: list[int]) -> list[int]:
    if document[:1] != [PRE]:
        return document
    suf, mid = document.index(SUF), document.index(MID)
    end = [EOS] if document[-1] == EOS else []
    return document[1:suf] + document[mid + 1 : len(document) - len(end)] + document[suf + 1 : mid] + end


def restored(name, batch, i) -> list[int]:
    """The text of row i as far as the objective keeps it."""
    if name in ("causal", "prefix"):
        return batch["tokens"][i].tolist()
    if name == "fim":
        return [t for d in documents(batch["tokens"][i].tolist())[:-1] for t in unfilled(d)]
    if name in MASKED:
        tokens = unmasked(batch, i)
        assert tokens[0] == CLS and tokens[-1] == SEP
        return tokens[1:-1]
    if name == "sentence order":
        first, second = halves(batch, i)
        return second + first if batch["pair"][i] else first + second
    if name == "next sentence":
        first, second = halves(batch, i)
        return first if batch["pair"][i] else first + second
    if name == "denoising":
        return batch["targets"][i].tolist()
    if name == "ul2 on a decoder":
        n = batch["prefix"][i].sum()
        return unspanned(batch["tokens"][i, 1:n].tolist(), unpadded(batch["tokens"][i, n:]))
    skip = 1 if name == "ul2" else 0
    return unspanned(unpadded(batch["inputs"][i])[skip:], unpadded(batch["targets"][i]))


KEPT = {"causal": T + 1, "prefix": T + 1, "sentence order": T - 3, "denoising": T, "spans": T, "ul2": T}
KEPT |= {"ul2 on a decoder": T} | dict.fromkeys(MASKED, T - 2)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "pairs"])
def test_the_text_of_a_row_can_be_had_back_and_nothing_else_is_in_it(stream, name):
    kept = 0
    for step in (0, 4):
        batch = reader(stream, name)(step)
        for i, tokens in enumerate(stream.rows(step * B + np.arange(B)).tolist()):
            got = restored(name, batch, i)
            if name in KEPT:
                assert got == tokens[: KEPT[name]]
            else:  # what fills a middle, and what follows from elsewhere, end where the row does
                assert got == tokens[: len(got)]
            kept += len(got)
    assert kept > 0.4 * 2 * B * T


def test_every_pair_of_source_and_target_is_one_of_the_rows_own(stream):
    batch = reader(stream, "pairs")(1)
    n = 0
    for i, tokens in enumerate(stream.rows(B + np.arange(B)).tolist()):
        opens = [p for p, t in enumerate(tokens) if t == EOS]
        expected = []
        for a, b in zip(opens, opens[1:]):
            own = tokens[a + 1 : b]
            if NEWLINE in own[1:-1] and own[0] != NEWLINE:
                cut = own.index(NEWLINE)
                expected.append((own[:cut], own[cut + 1 :]))
        split = [[d[:-1] for d in documents(unpadded(batch[k][i])) if d] for k in ("inputs", "targets")]
        assert list(zip(*split, strict=True)) == expected
        n += len(expected)
    assert n > 0


def test_an_epoch_of_rows_holds_every_token_of_its_store(tmp_path):
    """What the objectives keep of the rows of one epoch, side by side, is the store."""
    store = random_store(tmp_path, 900)
    stream = Stream({"a": store}, weights=None, seq_len=T, seed=1)
    n = stream.n_rows[0]
    windows = stream.locate(np.arange(n)).row
    assert sorted(windows.tolist()) == list(range(n))
    for name in ("causal", "prefix", "denoising", "spans", "ul2", "ul2 on a decoder"):
        batch = reader(stream, name, batch_size=n)(0)
        rows = [restored(name, batch, i)[:T] for i in np.argsort(windows)]
        np.testing.assert_array_equal(np.concatenate(rows), store.read(0, n * T))


def shares(name, batch) -> list[tuple[float, int, float]]:
    """(how many, of how many, the share expected) of what chance decides in a batch."""
    if name == "fim":
        first = (batch["tokens"][:, 0] == PRE).sum()
        return [(first, len(batch["tokens"]), 0.5)]
    if name == "next sentence":
        return [(batch["pair"].sum(), len(batch["pair"]), 0.5)]
    if name == "ul2":
        mode = batch["inputs"][:, 0]
        return [((mode == MODES[f"{m}_id"]).sum(), len(mode), p) for m, p in (("r", 4 / 15), ("s", 0.2), ("x", 8 / 15))]
    counted = batch["weights"] > 0
    shown = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)[counted]
    return [((shown == MASK).sum(), counted.sum(), 0.8)]


@pytest.mark.parametrize("name", ["fim", "next sentence", "ul2", "masked", "whole words"])
def test_what_chance_decides_has_its_share_within_binomial_bounds(stream, name):
    n = 4000
    batch = reader(stream, name, batch_size=n)(0)
    if name == "fim":  # of the rows that do not begin with an end, whose first document is empty
        batch = {"tokens": batch["tokens"][stream.rows(np.arange(n))[:, 0] != EOS]}
    for hits, of, p in shares(name, batch):
        assert abs(hits / of - p) < 4.5 * np.sqrt(p * (1 - p) / of), (hits, of, p)


# --- rows from elsewhere ----------------------------------------------------------------------------------------------


def other_rows(stream, rows, start=0, batch_size=B):
    keep = lambda batch: {"tokens": batch["tokens"], "other": batch["other"]}
    return HostReader(stream, rows, batch_size=batch_size, start=start, examples=keep, extra_rows=1)


def test_the_other_row_is_another_of_the_same_source(stream):
    table = {}
    for s, own in enumerate(stream.n_rows):
        for w in range(own):
            tokens = stream.read(stream.locate(np.arange(1))._replace(source=np.array([s]), row=np.array([w])))
            table[tokens.tobytes()] = (s, w)
    ids = np.arange(40 * B)
    located, got = stream.locate(ids), [other_rows(stream, np.arange(B))(i)["other"] for i in range(40)]
    steps = []
    for tokens, s, w in zip(np.concatenate(got), located.source.tolist(), located.row.tolist()):
        source, window = table[tokens.tobytes()]
        assert source == s and window != w
        if s == 0:
            steps.append((window - w) % stream.n_rows[0])
    hits = np.bincount(steps, minlength=stream.n_rows[0])[1:] / len(steps)  # every other row alike
    p = 1 / (stream.n_rows[0] - 1)
    assert np.abs(hits - p).max() < 5 * np.sqrt(p / len(steps))


def test_a_source_of_one_row_has_no_other(tmp_path):
    store = write_store(tmp_path, [[[5] * (T + 3)]])
    stream = Stream({"tiny": store}, weights=None, seq_len=T, seed=0)
    with pytest.raises(UserError, match=r"data.sources\['tiny'\]: expected at least 2 rows, .* got 1; shorten"):
        other_rows(stream, np.arange(4), batch_size=4)(0)
    with pytest.raises(UserError, match="extra_rows: expected 0 or 1 .* got 2"):
        HostReader(stream, np.arange(4), batch_size=4, start=0, examples=dict, extra_rows=2)


@pytest.mark.parametrize("n_tokens", [T + 1, 3 * T + 9, 20 * T])
def test_evaluation_pairs_rows_of_the_store_with_others_of_it(tmp_path, n_tokens):
    store = random_store(tmp_path, n_tokens, n_shards=1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    kw = dict(seq_len=T, batch_size=8, sharding=NamedSharding(mesh, P("data")), extra_rows=1)
    batches = [{k: np.asarray(x) for k, x in b.items()} for b in eval_batches(store, **kw)]
    tokens, other = (np.concatenate([b[k] for b in batches]) for k in ("tokens", "other"))
    n = -(-(store.n_tokens - 1) // T)
    rows = [t.tobytes() for t in tokens[:n]]
    for i in range(n):
        if n == 1:
            assert (other[i] == PAD).all()
        else:
            assert other[i].tobytes() in rows and other[i].tobytes() != rows[i]
    assert (other[n:] == PAD).all() and (tokens[n:] == PAD).all()
