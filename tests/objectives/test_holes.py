"""What every objective does with rows that documents were left out of, read from a stream as a run reads them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lm.data import ExcludeDocuments, Stream
from lm.objectives import CausalLM, MaskedLM, PrefixLM, noise
from lm.objectives.causal_lm import unpack
from tests.data.conftest import write_store
from tests.objectives.test_matrix import (
    CLS,
    EOS,
    KEPT,
    MASK,
    MODES,
    NEWLINE,
    OBJECTIVES,
    PAD,
    PRE,
    SEP,
    SUF,
    B,
    T,
    assert_same,
    documents,
    examples_of,
    reader,
    restored,
    unpadded,
)
from tests.objectives.test_noise import closed_by_hand

KEEP, V = 400, 500  # documents that stay have ids below KEEP, those that are left out the others
IDS = np.arange(6 * B)
# Random tokens below KEEP, so that they are told from those of a document that was left out.
HOLEY = {n: dataclasses.replace(o, vocab_size=KEEP) if isinstance(o, MaskedLM) else o for n, o in OBJECTIVES.items()}
HOLEY |= {"one text": CausalLM(document_mask=False), "prefix of one text": PrefixLM(document_mask=False)}
AS_THEY_ARE = ("causal", "prefix")  # documents apart, with the padding where it was
CUT_FIRST = ("denoising", "spans", "ul2", "ul2 on a decoder")  # the last token of a row is of the next
NOISY = [n for n in HOLEY if n not in ("causal", "one text", "pairs")]
every = pytest.mark.parametrize("name", HOLEY)


@pytest.fixture(scope="module", params=["split", "best_fit"])
def streams(request, tmp_path_factory):
    """(without, with exclusion) of the same text: a third of the documents, some of them neighbours."""
    folder, stores, exclude = tmp_path_factory.mktemp("stores"), {}, []
    for name in "ab":
        rng = np.random.default_rng(ord(name))
        lengths, texts = rng.integers(0, 31, 120), []
        out = (rng.random(120) < 0.33) & (lengths > 0)  # one without text has nothing that could become padding
        for is_out, n in zip(out, lengths):
            text = rng.integers(*((KEEP, V) if is_out else (4, KEEP)), n)
            texts.append(np.where(rng.random(n) < 0.125, NEWLINE, text).tolist())
        stores[name] = write_store(folder / name, [texts])
        exclude.append(ExcludeDocuments(source=name, numbers=tuple(np.flatnonzero(out).tolist())))
    make = lambda exclude: Stream(
        stores, weights={"a": 0.6, "b": 0.4}, seq_len=T, seed=1, packing=request.param, exclude=exclude
    )
    return make(()), make(tuple(exclude))


def rows_of(stream) -> dict[str, np.ndarray]:
    """With other rows of the same stream, for the pairs."""
    return {"tokens": stream.rows(IDS), "id": IDS, "other": stream.rows(IDS[::-1] + len(IDS))}


def by_hand(tokens: np.ndarray) -> np.ndarray:
    return np.array([closed_by_hand(row, PAD, EOS) for row in tokens.tolist()], np.int32)


def has_hole(tokens: np.ndarray) -> np.ndarray:
    return (by_hand(tokens) != tokens).any(axis=1)


def examples(name, rows):
    return examples_of(HOLEY[name])(rows)


def test_a_closed_row_is_what_it_would_be_without_the_documents(streams):
    """By what the stream says of its rows."""
    plain, holey = streams
    closed, n = noise.closed(holey.rows(IDS), PAD, EOS), 0
    for row, before, got in zip(holey.where(IDS), plain.rows(IDS).tolist(), closed.tolist(), strict=True):
        column = int(sum(p.length for p in row.spans) < len(unpadded(before)))  # the separator that opens the store
        expected = [EOS] * column
        for span in row.spans:
            if not span.excluded:
                if column and before[column - 1] == EOS and expected[-1:] != [EOS]:
                    expected.append(EOS)
                expected += before[column : column + span.length]
            column += span.length
        assert got == expected + [PAD] * (T + 1 - len(expected))
        n += any(p.excluded for p in row.spans)
    assert n > 30 and has_hole(holey.rows(IDS)).sum() > 20


@every
def test_no_token_of_a_document_left_out_is_in_any_array(streams, name):
    plain, holey = (examples(name, rows_of(s)) for s in streams)
    out = lambda batch: sum(int(((x >= KEEP) & (x < V)).sum()) for x in batch.values())
    assert out(plain) > 0 and out(holey) == 0


@every
def test_rows_without_holes_are_those_of_the_run_without_exclusion(streams, name):
    rows = [rows_of(s) for s in streams]
    same = (rows[0]["tokens"] == rows[1]["tokens"]).all(axis=1)
    if HOLEY[name].extra_rows:
        same &= (rows[0]["other"] == rows[1]["other"]).all(axis=1)
    assert 0 < same.sum() < len(IDS)
    plain, holey = (examples(name, r) for r in rows)
    assert_same({k: x[same] for k, x in holey.items()}, {k: x[same] for k, x in plain.items()})


@pytest.mark.parametrize("name", [n for n in HOLEY if n not in AS_THEY_ARE])
def test_rows_with_holes_are_treated_as_the_rows_without_the_documents(streams, name):
    rows = rows_of(streams[1])
    closed = {k: by_hand(rows[k]) for k in ("tokens", "other")} | {"id": IDS}
    if name in CUT_FIRST:
        closed["tokens"] = np.hstack([by_hand(rows["tokens"][:, :-1]), rows["tokens"][:, -1:]])
    assert_same(examples(name, rows), examples(name, closed))


@every
def test_the_batch_does_not_change_a_row_with_holes(streams, name):
    rows = rows_of(streams[1])
    whole, order = examples(name, rows), np.random.default_rng(0).permutation(len(IDS))
    parts = [examples(name, {k: v[i] for k, v in rows.items()}) for i in np.array_split(order, 7)]
    assert_same({k: np.concatenate([p[k] for p in parts])[np.argsort(order)] for k in whole}, whole)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_hosts_together_make_the_batch_that_one_makes_of_rows_with_holes(streams, name):
    whole = reader(streams[1], name, start=3)(2)
    parts = [reader(streams[1], name, np.arange(h, B, 4), start=3)(2) for h in range(4)]
    back = np.argsort(np.concatenate([np.arange(h, B, 4) for h in range(4)]))
    assert_same({k: np.concatenate([p[k] for p in parts])[back] for k in whole}, whole)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in (*AS_THEY_ARE, "pairs")])
def test_the_text_that_is_left_can_be_had_back(streams, name):
    rows = rows_of(streams[1])
    batch, kept = examples(name, rows), 0
    text = by_hand(rows["tokens"][:, :-1] if name in CUT_FIRST else rows["tokens"])
    for i, row in enumerate(text):
        own = unpadded(row)[: KEPT.get(name, T + 1)]
        if len(own) < 2:  # nothing to corrupt, or to pair
            continue
        got = unpadded(restored(name, batch, i))
        assert got == (own if name in KEPT else own[: len(got)])
        kept += len(got)
    assert kept > 0.4 * (text != PAD).sum()


def only_at_the_end(tokens: np.ndarray) -> bool:
    return all(PAD not in unpadded(row) for row in tokens)


@every
def test_padding_is_not_seen_predicted_or_changed(streams, name):
    objective, rows = HOLEY[name], rows_of(streams[1])
    batch = examples(name, rows)
    if objective.family == "encoder":  # which attends to what is not padding, and predicts what has a weight
        counted = batch["weights"] > 0
        assert only_at_the_end(batch["tokens"]) and not np.isin(batch["targets"][counted], [PAD, EOS, CLS, SEP]).any()
        at = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)
        assert not np.isin(at[counted], [PAD, EOS, CLS, SEP]).any()
    elif objective.family == "encoder_decoder":
        assert only_at_the_end(batch["inputs"]) and only_at_the_end(batch["targets"])
    else:
        prefix = batch.get("prefix", np.zeros((len(IDS), batch["tokens"].shape[1] - 1), bool))
        packed = unpack(jnp.asarray(batch["tokens"]), EOS, PAD)
        counted = np.asarray(objective._prefix_lm().weights(batch, packed) if "ul2" in name else
                             objective.weights({k: jnp.asarray(x) for k, x in batch.items()}, packed)) > 0  # fmt: skip
        apart = "ul2" not in name and objective.document_mask
        segments = np.asarray(packed.segments) * apart
        place = np.arange(counted.shape[1])
        seen = (segments[:, :, None] == segments[:, None]) & ((place <= place[:, None]) | prefix[:, None])
        inputs, targets = np.asarray(packed.inputs), np.asarray(packed.targets)
        assert (inputs[counted] != PAD).all() and (targets[counted] != PAD).all() and counted.any()
        assert not (seen & counted[:, :, None] & (inputs == PAD)[:, None]).any()


@pytest.mark.parametrize("name", NOISY)
def test_each_id_has_noise_of_its_own(name):
    row = np.array([20, 21, 22, EOS, PAD, PAD, PAD, EOS, *range(30, 40), NEWLINE, *range(41, 64)], np.int32)
    assert len(row) == T + 1
    rows = {"tokens": np.tile(row, (60, 1)), "other": np.tile(row, (60, 1)), "id": np.arange(60)}
    batch = examples(name, rows)
    made = np.hstack([x.reshape(60, -1).astype(np.int64) for x in batch.values()])
    assert len(np.unique(made, axis=0)) > 20
    again = examples(name, rows | {"id": np.tile([5, 9], 30)})
    assert all((x[::2] == batch[k][5]).all() and (x[1::2] == batch[k][9]).all() for k, x in again.items())


def assert_share(hits, p) -> None:
    """hits bool [n], p float or [n]: how likely each was."""
    p = np.broadcast_to(p, np.shape(hits))
    assert abs(np.sum(hits) - p.sum()) < 4.5 * np.sqrt((p * (1 - p)).sum()), (np.mean(hits), p.mean())


def test_what_chance_decides_in_rows_with_holes_has_its_share_within_binomial_bounds(streams):
    ids = np.arange(4000)
    tokens = streams[1].rows(ids)
    which = has_hole(tokens)
    rows = {"tokens": tokens[which], "other": streams[1].rows(ids[::-1] + 4000)[which], "id": ids[which]}
    text = [unpadded(row) for row in by_hand(rows["tokens"])]
    assert len(text) > 1000

    batch = examples("masked", rows)
    counted = batch["weights"] > 0
    shown = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)[counted]
    assert_share(shown == MASK, 0.8)
    assert_share((shown != MASK) & (shown != batch["targets"][counted]), 0.1 * (1 - 1 / (KEEP - 2)))
    n_text = [sum(t != EOS for t in own[: T - 2]) for own in text]
    assert counted.sum(axis=1).tolist() == [max(int(0.15 * n + 0.5), 1) if n else 0 for n in n_text]

    changed, spm, p_spm = [], [], []
    for own, got in zip(text, examples("fim", rows)["tokens"].tolist()):
        for document, made in zip(documents(own), documents(got)[:-1]):  # the last may be cut
            if n := sum(t != EOS for t in document):
                changed.append(made[0] == PRE)
                if changed[-1]:  # suffix-prefix-middle, or prefix-suffix-middle with nothing for a prefix
                    spm.append(made[1] == SUF)
                    p_spm.append(0.5 + 0.5 * (1 - (n / (n + 1)) ** 2))
    assert_share(changed, 0.5)
    assert_share(spm, np.array(p_spm))

    for name in ("sentence order", "next sentence"):
        pair = examples(name, rows)["pair"]
        if name == "next sentence":  # without those that have no other to be paired with
            pair = pair[(by_hand(rows["other"]) != PAD).all(axis=1)]
        assert_share(pair[pair >= 0], 0.5)

    modes = examples("ul2", rows)["inputs"][:, 0]
    modes = modes[modes != PAD]
    for mode, p in (("r", 4 / 15), ("s", 0.2), ("x", 8 / 15)):
        assert_share(modes == MODES[f"{mode}_id"], p)


def test_noise_has_its_density_and_spans_their_mean_in_rows_with_holes(streams):
    rows = rows_of(streams[1])
    texts = [unpadded(row) for row in by_hand(rows["tokens"][:, :-1])]
    spans, masked = HOLEY["spans"], HOLEY["denoising"]
    batch, denoising = examples("spans", rows), examples("denoising", rows)
    for i, own in enumerate(texts):
        if len(own) >= 2:
            expected = spans.lengths(len(own))
            assert len(unpadded(batch["inputs"][i])) == expected.inputs
            assert len(unpadded(batch["targets"][i])) == expected.targets
            assert round(0.15 * len(own)) in (expected.noise, 0)
            assert round(expected.noise / 3) in (expected.spans, 0)
        if own:
            inputs = unpadded(denoising["inputs"][i])
            assert len(own) - sum(t != MASK for t in inputs) == masked.n_masked(len(own))
