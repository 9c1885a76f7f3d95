"""What people are shown of a corpus: rows as text, where they are from, its counts, and files that are damaged."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lm import codec
from lm.data import BatchPhase, BatchSchedule, Exclude, ExcludeDocuments, ExcludeExamples, Stream
from lm.data.inspect import provenance, stats
from lm.data.inspect.preview import Reading, names_of_ids, preview, read_batch
from lm.data.loader.loader import make_loader
from lm.data.stream.batches import BatchShape
from lm.errors import UserError
from lm.objectives import CausalLM, MaskedLM, PrefixLM, SpanCorruption, UL2Decoder
from tests.data.conftest import sample_texts, write_store

V, T, B = 420, 61, 7
MASK, CLS, SEP, SENTINEL = V, V + 1, V + 2, V + 40
BERT = dict(mask_id=MASK, cls_id=CLS, sep_id=SEP, vocab_size=V)
RAMP, SHAPE = BatchSchedule((), batch_size=B, seq_len=T), BatchShape(B, B, T)
SPANS = SpanCorruption(first_sentinel_id=SENTINEL, n_sentinels=30)
CLEAN = sample_texts(23, seed=5, words=19)
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("stores")
    ids = tokenizer.encode_batch(CLEAN)
    return {
        "a": write_store(folder / "a" / "train", [ids[:9], ids[9:14]]),
        "b": write_store(folder / "b" / "train", [ids[14:]]),
    }


def stream_of(stores, **kw) -> Stream:
    return Stream(stores, **{"weights": {"a": 2.0, "b": 1.0}, "seq_len": T, "seed": 3} | kw)


def shown(text: str) -> list[dict[str, str]]:
    """Of each row of a preview, the text of each array of tokens, read back."""
    rows = []
    for block in re.split(r"^--- row .*\n", text, flags=re.M)[1:]:
        arrays = re.findall(r"^(\w+) \(\d+\):\n((?:  \| .*\n?)+)", block, flags=re.M)
        rows.append({name: re.sub(r"^  \| ", "", body, flags=re.M).rstrip("\n") for name, body in arrays})
    return rows


# --- preview ----------------------------------------------------------------------------------------------------------


@few
@given(documents=st.lists(st.text(st.characters(categories=("L", "N", "P", "S"), include_characters=" \n\t"))))
def test_text_is_shown_as_it_is_with_the_ends_of_documents(tokenizer, documents):
    ids = np.array([1, *(i for text in documents for i in [*tokenizer.encode(text), 1])], np.int32)
    expected = "".join(["</s>", *(f"{text}</s>" for text in documents)])
    got = Reading(tokenizer, {}).text(ids)
    assert re.sub(r"</s>\*(\d+)", lambda m: "</s>" * int(m[1]), got) == expected


def test_paddings_are_counted_ids_beyond_the_tokenizer_named_and_control_characters_shown(tokenizer):
    reading = Reading(tokenizer, {MASK: "mask"})
    text = tokenizer.encode("a\x1b[2J\r\x9b!")
    ids = np.array([1, 0, *text, MASK, MASK, V + 5, 0, 0, 0], np.int32)
    assert reading.text(ids) == "</s><pad>a\\x1b[2J\\x0d\\x9b!<mask>*2<id:425><pad>*3"


def test_ids_are_named_as_the_objective_calls_them():
    names = names_of_ids(UL2Decoder(first_sentinel_id=80, n_sentinels=3, r_id=91, s_id=92, x_id=93))
    assert [names[i] for i in (80, 79, 78, 91, 92, 93)] == ["extra_id_0", "extra_id_1", "extra_id_2", "r", "s", "x"]
    assert 77 not in names


@pytest.mark.parametrize(
    "objective", [CausalLM(), MaskedLM(**BERT, pair="nsp"), PrefixLM(), SPANS], ids=lambda o: type(o).__name__
)
def test_rows_are_those_of_the_training_batch(stores, tokenizer, objective):
    stream = stream_of(stores)
    sharding = NamedSharding(jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]), PartitionSpec("d"))
    kw = dict(examples=objective.examples_for(tokenizer), extra_rows=objective.extra_rows)
    with make_loader(stream, sharding=sharding, batch_size=B, **kw) as batches:
        _, _, third = (jax.device_get(next(batches)) for _ in range(3))
    got = read_batch(stream, first=2 * B, rows=3, **kw)
    assert got.arrays.keys() == third.keys()
    for name, x in third.items():
        np.testing.assert_array_equal(got.arrays[name], x[:3], err_msg=name)
    assert [r.id for r in got.rows] == [2 * B, 2 * B + 1, 2 * B + 2]


def test_preview_of_a_row_of_text_is_the_text_around_it(stores, tokenizer):
    whole = {
        "a": "</s>" + "".join(f"{t}</s>" for t in CLEAN[:14]),
        "b": "</s>" + "".join(f"{t}</s>" for t in CLEAN[14:]),
    }
    out = preview(stream_of(stores), tokenizer, CausalLM(), step=2, ramp=RAMP, rows=5)
    assert out.startswith("batch after 2 steps (step 3 of the log), ids 14 to 20; rows 0 to 4\n")
    sources = re.findall(r"^--- row \d: id \d+, source (\w)", out, flags=re.M)
    rows = shown(out)
    assert len(rows) == len(sources) == 5
    for source, row in zip(sources, rows, strict=True):
        inner = re.sub("^\ufffd+|\ufffd+$", "", row["tokens"])  # a window may begin and end within a character
        assert len(inner) > T // 2
        assert inner in whole[source]


def test_masked_places_show_their_targets(stores, tokenizer):
    stream, objective = stream_of(stores), MaskedLM(**BERT, rate=0.3, mask_share=0.5, random_share=0.25)
    out = preview(stream, tokenizer, objective, step=1, ramp=RAMP, rows=B)
    arrays = read_batch(stream, first=B, rows=B, examples=objective.examples).arrays
    kinds = Counter()
    for i, row in enumerate(shown(out)):
        assert row.keys() == {"tokens"}
        marks = re.findall(r"<mask:(.*?)(?:\|(kept|shown:.*?))?>(?![>|])", row["tokens"].replace("<0x", "[0x"))
        weights = arrays["weights"][i] > 0
        assert row["tokens"].startswith("<cls>")
        assert "<sep>" in row["tokens"]
        assert row["tokens"].count("<mask:") == weights.sum()
        places, targets = arrays["positions"][i][weights], arrays["targets"][i][weights]
        seen = arrays["tokens"][i][places]
        expected = Counter(
            {"mask": (seen == MASK).sum(), "kept": (seen == targets).sum()}
            | {"shown": ((seen != MASK) & (seen != targets)).sum()}
        )
        got = Counter(how.partition(":")[0] or "mask" for _, how in marks)
        assert +got == +expected
        kinds += got
        kept = [t for t, how in marks if how == "kept"]
        expected = [int(t) for s, t in zip(seen, targets, strict=True) if s == t]
        for mark, i_target in zip(kept, expected, strict=True):
            text = tokenizer.decode([i_target]).replace("\n", "\\n")
            assert mark in (text, tokenizer.pieces([i_target])[0].replace("<0x", "[0x").rstrip(">"))
    assert min(kinds[k] for k in ("mask", "kept", "shown")) > 0


def test_inputs_and_targets_of_spans_put_together_are_the_text(stores, tokenizer):
    stream = stream_of(stores)
    out = preview(stream, tokenizer, SPANS, step=0, ramp=RAMP, rows=B)
    plain = preview(stream, tokenizer, CausalLM(), step=0, ramp=RAMP, rows=B)
    for row, text in zip(shown(out), shown(plain), strict=True):
        assert list(row) == ["inputs", "targets"]
        spans = dict(re.findall(r"(<extra_id_\d+>)(.*?)(?=<extra_id_|\Z)", row["targets"].removesuffix("</s>"), re.S))
        assert len(spans) == SPANS.lengths(T).spans
        put = re.sub(r"<extra_id_\d+>", lambda m, spans=spans: spans[m[0]], row["inputs"].removesuffix("</s>"))
        # A span may cut a character in bytes, and the row of text has one token more.
        if "\ufffd" not in put:
            assert text["tokens"].startswith(put)


def test_prefixes_are_marked_in_the_tokens_they_hold(stores, tokenizer):
    stream, objective = stream_of(stores), PrefixLM(min_prefix=0.4, max_prefix=0.6)
    arrays = read_batch(stream, first=0, rows=B, examples=objective.examples).arrays
    reading = Reading(tokenizer, {})
    for i, row in enumerate(shown(preview(stream, tokenizer, objective, step=0, ramp=RAMP, rows=B))):
        inside = "".join(re.findall(r"<prefix>(.*?)</prefix>", row["tokens"], re.S))
        flags = np.append(arrays["prefix"][i], False)
        ids = arrays["tokens"][i]
        runs = np.split(ids, np.flatnonzero(np.diff(flags)) + 1)
        marked = [run for run, on in zip(runs, flags[np.r_[0, np.flatnonzero(np.diff(flags)) + 1]], strict=True) if on]
        assert inside == "".join(reading.text(run) for run in marked)
        assert row["tokens"].replace("<prefix>", "").replace("</prefix>", "") == "".join(map(reading.text, runs))


def test_other_arrays_are_runs_of_numbers(stores, tokenizer):
    objective = MaskedLM(**BERT, pair="sop")
    out = preview(stream_of(stores), tokenizer, objective, step=0, ramp=RAMP, rows=1)
    x = read_batch(stream_of(stores), first=0, rows=1, examples=objective.examples).arrays
    assert f"\npair: {x['pair'][0]}\n" in out
    runs = re.search(r"^token_types: (.*)$", out, re.M)[1].split()
    back = [int(v) for run in runs for v in [run.partition("*")[0]] * int(run.partition("*")[2] or 1)]
    assert back == x["token_types"][0].tolist()


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        (dict(step=-1, rows=1), "--step: expected 0 to 2147483648, got -1"),
        (dict(step=0, rows=0), "--rows: expected at least 1, got 0"),
    ],
)
def test_preview_refuses_steps_and_rows_that_are_none(stores, tokenizer, kw, message):
    with pytest.raises(UserError, match=re.escape(message)):
        preview(stream_of(stores), tokenizer, CausalLM(), ramp=RAMP, **kw)


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_documents_of_a_row_hold_its_tokens(stores, packing):
    stream = stream_of(stores, packing=packing, exclude=(ExcludeExamples(ranges=((8, 11),)),))
    lines = provenance.where(stream, step=5, first=13, shape=SHAPE).splitlines()
    assert lines[0] == "batch after 5 steps (step 6 of the log), ids 13 to 19"
    assert len(lines) == 2 + B
    rows = stream.rows(np.arange(13, 13 + B))
    for i, line in enumerate(lines[1:-1]):
        number, source = re.match(r"row (\d+): id (\d+), example \d+, source (\w),", line).groups()[1:]
        assert line.startswith(f"row {i}: ")
        assert int(number) == 13 + i
        pieces = re.findall(r"(\d+)\[(\d+):(\d+)\]", line)
        tokens = [t for d, start, stop in pieces for t in stores[source].document(int(d))[int(start) : int(stop)]]
        row = rows[i].tolist()
        # The eos that opens a store and padding are of no document.
        assert [t for t in row if t != 0][-len(tokens) :] == tokens
        assert len(row) - len(tokens) <= 1 or packing == "best_fit"


def test_excluded_documents_are_said_to_be(stores):
    stream = stream_of(stores, exclude=(ExcludeDocuments(source="a", numbers=(3,)),))
    out = provenance.where(stream, step=0, first=0, shape=BatchShape(60, 60, T))
    assert re.search(r"source a,.* 3\[\d+:\d+\] \(excluded\)", out)
    assert {d for d in re.findall(r"(\d+)\[\d+:\d+\] \(excluded\)", out)} == {"3"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Excluding:
    exclude: tuple[Exclude, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    data: Excluding


def test_where_says_how_to_pass_over_the_batch(stores):
    exclude = (ExcludeExamples(ranges=((8, 11), (15, 16))),)
    out = provenance.where(stream_of(stores, exclude=exclude), step=1, first=B, shape=SHAPE, exclude=exclude)
    override = re.search(r'^to pass over this batch: "(data.exclude=.*)"$', out, flags=re.M)[1]
    more = codec.override(Root(data=Excluding(exclude=exclude)), override).data.exclude
    passed = stream_of(stores, exclude=more)
    before, without = stream_of(stores, exclude=exclude), passed.locate(np.arange(40)).example
    gone = before.locate(np.arange(B, 2 * B)).example
    assert gone.tolist() == [7, 11, 12, 13, 14, 16, 17]
    rest = [e for e in before.locate(np.arange(40 + B)).example.tolist() if e not in gone.tolist()]
    assert without.tolist() == rest


def test_rows_of_a_shorter_stage_are_shown_as_pieces_of_their_examples(stores, tokenizer):
    ramp = BatchSchedule([BatchPhase(until_examples=9, batch_size=3, seq_len=20)], batch_size=B, seq_len=60)
    stream = stream_of(stores, seq_len=60)
    out = preview(stream, tokenizer, CausalLM(), step=2, ramp=ramp, rows=7)
    assert out.startswith("batch after 2 steps (step 3 of the log), ids 6 to 8, each cut into 3 rows of 20")
    rows = re.findall(r"^--- row (\d): part (\d) of 3 of id (\d+),", out, flags=re.M)
    assert [tuple(map(int, r)) for r in rows] == [(i, i % 3, 6 + i // 3) for i in range(7)]
    assert preview(stream, tokenizer, CausalLM(), step=3, ramp=ramp, rows=1).startswith(
        "batch after 3 steps (step 4 of the log), ids 9 to 15; rows 0 to 0"
    )


def test_where_shows_as_many_rows_as_asked(stores):
    out = provenance.where(stream_of(stores), step=0, first=0, shape=SHAPE, rows=2).splitlines()
    assert out[0].endswith("ids 0 to 6; rows 0 to 1")
    assert len(out) == 4
    with pytest.raises(UserError, match="--rows: expected at least 1, got 0"):
        provenance.where(stream_of(stores), step=0, first=0, shape=SHAPE, rows=0)


# --- stats ------------------------------------------------------------------------------------------------------------


@few
@given(shards=st.lists(st.lists(st.integers(0, 70), max_size=12), min_size=1, max_size=3))
def test_every_document_is_in_the_bucket_of_its_length(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("lengths")
    store = write_store(folder, [[[5] * n for n in lengths] for lengths in shards])
    lengths = [n for shard in shards for n in shard]
    buckets = stats.length_histogram(store)
    for b in buckets:
        assert b.documents == sum(b.low <= n <= b.high for n in lengths)
    assert sum(b.documents for b in buckets) == len(lengths)
    assert all(b.low == b.high == 0 or b.high == 2 * b.low - 1 for b in buckets)
    assert [b.low for b in buckets[1:]] == [b.high + 1 for b in buckets[:-1]]
    assert not buckets or (buckets[0].documents and buckets[-1].documents)


def test_stats_are_those_of_meta_json(tmp_path):
    store = write_store(tmp_path / "a", [[[5] * 3, [5] * 3, [5] * 9], [[5] * 2]], n_bytes=11)
    lines = stats.stats({"a/train": store}).splitlines()
    assert lines[0] == "a/train: 4 documents, 22 tokens, 44 bytes of text, 2.00 bytes/token, 2 shard(s)"
    assert [line.split() for line in lines[2:]] == [
        ["2-3", "3", "75.00%", "#" * 40],
        ["4-7", "0", "0.00%"],
        ["8-15", "1", "25.00%", "#" * 14],
    ]


# --- folders and files ------------------------------------------------------------------------------------------------


def test_a_corpus_a_source_and_a_split_are_found(tmp_path):
    for name in ("b", "a", "raw"):
        write_store(tmp_path / name / "train", [[[5, 6]]])
    write_store(tmp_path / "a" / "validation", [[[7]]])
    assert list(stats.find_stores(tmp_path)) == ["a/train", "a/validation", "b/train"]
    assert list(stats.find_stores(tmp_path / "a")) == ["a/train", "a/validation"]
    assert list(stats.find_stores(tmp_path / "a" / "validation")) == ["a/validation"]


def test_a_folder_without_a_corpus_and_one_unfinished_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: expected the folder of a prepared corpus"):
        stats.find_stores(tmp_path)
    write_store(tmp_path / "a" / "train", [[[5, 6]]])
    (tmp_path / "a" / "train" / "meta.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'a' / 'train'}: expected a prepared store"):
        stats.find_stores(tmp_path)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "docs-00000.u64", "tokens-00001.bin", "docs-00001.u64"])
def test_verify_names_the_file_in_which_one_bit_differs(tmp_path, name):
    write_store(tmp_path / "a" / "train", [[[5, 6], [7]], [[8]]])
    write_store(tmp_path / "b" / "train", [[[5, 6], [7]], [[8]]])
    stores = stats.find_stores(tmp_path)
    assert [line.split(":")[0] for line in stats.verify(stores)] == ["a/train", "b/train"]
    path = tmp_path / "b" / "train" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    done = stats.verify(stats.find_stores(tmp_path))
    assert next(done).startswith("a/train: 2 shard(s), ")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: expected sha256 .*; the file is damaged"):
        next(done)


def test_verify_counts_the_bytes_of_the_files(tmp_path):
    store = write_store(tmp_path / "a" / "train", [[[5, 6], [7]], [[8]]])
    size = sum(p.stat().st_size for p in store.path.iterdir() if p.name != "meta.json")
    assert list(stats.verify({"a": store})) == [f"a: 2 shard(s), {size} bytes, as written"]


def test_verify_refuses_a_tokenizer_that_the_store_was_not_made_with(tmp_path, tokenizer):
    write_store(tmp_path / "a" / "train", [[[5, 6]]], tokenizer=tokenizer.fingerprint)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    assert len(list(stats.verify(stats.find_stores(tmp_path)))) == 1
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes() + b"\0")
    with pytest.raises(UserError, match=f"^{tmp_path}/tokenizer.model: expected sha256 "):
        list(stats.verify(stats.find_stores(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"fingerprint": "0123456789abcdef"}', "expected fingerprint .*, got 0123456789ab; copy it again"),
        ("{}", None),  # of a tokenizer that was made elsewhere
        ('{"made_from": {}}', "expected fingerprint .*, got None; copy it again"),
        ('{"fingerprint"', "expected the settings of a tokenizer as JSON"),
        ("[]", "expected the settings of a tokenizer as JSON, got a list"),
    ],
)
def test_verify_reads_the_settings_of_the_tokenizer(tmp_path, tokenizer, settings, message):
    write_store(tmp_path / "a" / "train", [[[5, 6]]], tokenizer=tokenizer.fingerprint)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    (tmp_path / "tokenizer.json").write_text(settings)
    stores = stats.find_stores(tmp_path)
    if message is None:
        assert len(list(stats.verify(stores))) == 1
        return
    with pytest.raises(UserError, match=f"^{tmp_path}/tokenizer.json: {message}"):
        list(stats.verify(stores))
