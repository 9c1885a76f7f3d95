import ast
import gzip
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from lm.data import Arrow, Docstrings, HFDataset, Jsonl, Parquet, Source, Stdlib, Text, Tfds
from lm.data.sources import base
from lm.data.sources import text as sources_text
from lm.data.sources.base import Document, Problem
from lm.data.sources.docstrings import docstrings
from lm.data.sources.templates import Missing, parse_template
from lm.data.sources.tfrecord import bytes_feature, read_records
from tests.data.conftest import sample_texts


def raws(source: Source, cache) -> list[bytes]:
    return [d.raw for part in source.parts(cache) for d in source.read(part)]


@pytest.fixture
def small_stretches(monkeypatch):
    monkeypatch.setattr(base, "stretch_bytes", lambda total: 1000)


def test_text_files_come_in_the_order_of_their_names_gzipped_or_not(tmp_path):
    for name, text in (("b.txt", b"two"), ("a/c.txt", b"one\r\n\xff"), ("b.md", b"no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    assert raws(Text(glob=f"{tmp_path}/**/*.txt*"), tmp_path) == [b"one\r\n\xff", b"two", b"three"]


def test_a_separator_cuts_documents_wherever_chunks_end(tmp_path, monkeypatch):
    texts = [re.sub("\n+", "\n", t).strip() for t in sample_texts(40)]
    (tmp_path / "x.txt").write_text("\n\n".join(texts))
    expected = [t.encode() for t in texts]
    for chunk in (7, 100, 10**6):
        monkeypatch.setattr(sources_text, "CHUNK_BYTES", chunk)
        assert raws(Text(glob=f"{tmp_path}/x.txt", separator="\n\n"), tmp_path) == expected


def test_jsonl_is_the_same_cut_and_whole(tmp_path, monkeypatch):
    texts = [*sample_texts(60), "", "é\u2028\x00", "\\n"]
    lines = "\n".join(json.dumps({"body": t, "id": i}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    source = Jsonl(glob=f"{tmp_path}/*.jsonl*", field="body")
    expected = [t.encode() for t in texts] * 2
    assert raws(source, tmp_path) == expected
    for cut in (1, 300, 1000, 10**5):
        monkeypatch.setattr(base, "stretch_bytes", lambda total, cut=cut: cut)
        assert raws(source, tmp_path) == expected
    assert len(source.parts(tmp_path)) == 2


def test_jsonl_passes_bad_utf8_on(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xffb"}\n{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n')
    first, second, third = raws(Jsonl(glob=f"{tmp_path}/a.jsonl"), tmp_path)
    assert third.decode() == "😀"
    for raw in (first, second):
        with pytest.raises(UnicodeDecodeError):
            raw.decode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "expected one JSON object"),
        ('["text"]', "expected a string in field 'text', got list"),
        ('{"body": "x", "id": 1}', r"expected a string in field 'text', got \['body', 'id'\]; set Jsonl\(field=...\)"),
        ('{"text": null}', "expected a string in field 'text', got a NoneType in it"),
    ],
)
@pytest.mark.usefixtures("small_stretches")
def test_jsonl_names_the_line_it_cannot_use(tmp_path, line, message):
    good = [json.dumps({"text": t}) for t in sample_texts(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:40], line, *good[40:]]))
    with pytest.raises(ValueError, match=rf"a\.jsonl:41: {message}"):
        raws(Jsonl(glob=f"{tmp_path}/a.jsonl"), tmp_path)


def test_refuses_no_match_and_damaged_gzip(tmp_path):
    for source in (Text(glob=f"{tmp_path}/*.txt"), Jsonl(glob=f"{tmp_path}/*.jsonl")):
        with pytest.raises(ValueError, match=r"expected files, got no match .* check the glob"):
            source.parts(tmp_path)
    whole = gzip.compress("\n".join(sample_texts(200)).encode())
    for name, content in (("cut", whole[:-200]), ("not", whole[30:]), ("bad", whole[:300] + b"xxxx" + whole[304:])):
        (tmp_path / f"{name}.gz").write_bytes(content)
        for source in (Text(glob=f"{tmp_path}/{name}.gz"), Jsonl(glob=f"{tmp_path}/{name}.gz")):
            with pytest.raises(
                ValueError, match=rf"{name}.gz: expected a whole gzip file, got|{name}.gz:1: expected one"
            ):
                raws(source, tmp_path)
    with pytest.raises(ValueError, match="separator: expected"):
        Text(glob="x", separator="")


def test_identity_follows_the_files(tmp_path):
    source = Text(glob=f"{tmp_path}/*.txt")
    assert source.identity() is None
    (tmp_path / "a.txt").write_text("a")
    before = source.identity()
    assert before == source.identity()
    (tmp_path / "b.txt").write_text("b")
    assert source.identity() != before


def test_links_to_folders_above_are_not_followed_and_links_to_nothing_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / f"t/{name}").mkdir(parents=True)
        (tmp_path / f"t/{name}/x.txt").write_text(name)
        (tmp_path / f"t/{name}/up").symlink_to("..")  # two of them: paths without end
    (tmp_path / "t/other").symlink_to("a")
    for glob in (f"{tmp_path}/**/*.txt", f"{tmp_path}/t/**"):
        assert raws(Text(glob=glob), tmp_path) == [b"a", b"b", b"a"]
    assert raws(Text(glob=f"{tmp_path}/**/b/**/x.txt"), tmp_path) == [b"b"]
    (tmp_path / "t/y.txt").symlink_to("gone")
    source = Text(glob=f"{tmp_path}/t/*.txt")
    with pytest.raises(ValueError, match="t/y.txt: expected a file, got a link to gone, where none is; mend"):
        source.parts(tmp_path)
    assert source.identity() is None


def test_records_are_read_as_tensorflow_writes_them(tmp_path):
    path = str(tmp_path / "x.tfrecord")
    texts = [b"", b"one", b"\x00\xff" * 300]

    def feature(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    with tf.io.TFRecordWriter(path) as w:
        for i, t in enumerate(texts):
            number = tf.train.Feature(int64_list=tf.train.Int64List(value=[i, -1]))
            real = tf.train.Feature(float_list=tf.train.FloatList(value=[0.5]))
            features = {"a/text": feature(t), "text": feature(b"other"), "n": number, "f": real, "none": feature()}
            w.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
    for start, stop in ((0, 3), (1, 3), (2, 2), (0, None)):
        records = list(read_records(path, start, stop))
        assert [bytes_feature(r, "a/text") for r in records] == texts[start:stop]
    assert [bytes_feature(records[0], n) for n in ("text", "n", "none", "missing")] == [b"other", None, None, None]
    content = open(path, "rb").read()
    for size in (len(content) - 1, 5):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut: expected a whole record"):
            list(read_records(tmp_path / "cut"))


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        nested = tfds.features.FeaturesDict({"en": tfds.features.Text()})
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3), "t": nested}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(200, 0), "test": self._generate_examples(20, 1)}

    def _generate_examples(self, n, seed):
        for i, text in enumerate(sample_texts(n, seed)):
            yield i, {"text": text, "label": i % 3, "t": {"en": f"en {i}"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    builder = TinyTexts(data_dir=folder, file_format="tfrecord")
    builder.download_and_prepare()
    return folder, builder


@pytest.mark.usefixtures("small_stretches")
@pytest.mark.parametrize("split", ["train", "test", "train[10:30]", "train[50%:]+test[:3]"])
def test_tfds_gives_what_tfds_itself_gives(tiny, tmp_path, split):
    folder, builder = tiny
    read = tfds.ReadConfig(interleave_cycle_length=1)
    rows = list(tfds.as_numpy(builder.as_dataset(split=split, read_config=read)))
    expected = [bytes(r["text"]) for r in rows]
    assert raws(Tfds(name="tiny_texts", split=split, data_dir=folder), tmp_path) == expected
    nested = raws(Tfds(name="tiny_texts", split=split, field="t/en", data_dir=folder), tmp_path)
    assert nested == [bytes(r["t"]["en"]) for r in rows]


def test_tfds_errors_name_what_there_is(tiny, tmp_path):
    folder, _ = tiny
    with pytest.raises(ValueError, match=r"expected field to be one of its texts \['t/en', 'text'\], got 'label'"):
        Tfds(name="tiny_texts", field="label", data_dir=folder).parts(tmp_path)
    with pytest.raises(ValueError, match=r"expected a split of \['test', 'train'\], got 'validation'"):
        Tfds(name="tiny_texts", split="validation", data_dir=folder).parts(tmp_path)
    with pytest.raises(ValueError, match=r"Tfds\('no_such_thing'\): expected a TFDS name"):
        Tfds(name="no_such_thing", data_dir=folder).parts(tmp_path)
    TinyTexts(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    with pytest.raises(ValueError, match="expected file_format tfrecord, got array_record"):
        Tfds(name="tiny_texts", data_dir=str(tmp_path)).parts(tmp_path)


def test_stdlib_holds_this_interpreters_sources_and_topics_in_order(tmp_path):
    source = Stdlib()
    documents = raws(source, tmp_path)
    assert documents == raws(source, tmp_path)  # the second time from the built dataset
    assert open(ast.__file__, "rb").read() in documents and open(json.__file__, "rb").read() in documents
    from pydoc_data.topics import topics

    assert topics["if"].encode() in documents
    version = ".".join(map(str, sys.version_info[:3]))
    assert (tmp_path / "python_corpus" / "stdlib" / version).is_dir()


def test_docstrings_are_parsed_and_stand_under_their_names(tmp_path):
    documents = raws(Docstrings(packages=("pluggy", "iniconfig")), tmp_path)
    import pluggy

    assert 2 < len(documents) < 40
    found = [d.decode() for d in documents if d.startswith(b"pluggy._manager\n") or b"\npluggy._manager." in d]
    assert len(found) == 1 and "pluggy._manager.PluginManager.register\n\n" in found[0]
    assert pluggy.PluginManager.register.__doc__.split("\n")[0] in found[0]
    with pytest.raises(ValueError, match="expected packages in .* got 'no_such_package'; install or drop it"):
        Docstrings(packages=("no_such_package",)).parts(tmp_path)


def test_docstrings_of_a_module():
    source = '''
"""Module."""
if True:
    class A:
        """Class
           indented."""
        def f(self):
            """Function."""
            def hidden():
                """No."""
        async def g(self): """Async."""
    x = """no docstring"""
'''
    expected = "m.n\n\nModule.\n\nm.n.A\n\nClass\nindented.\n\nm.n.A.f\n\nFunction.\n\nm.n.A.g\n\nAsync.\n"
    assert docstrings(source.encode(), "m/n.py") == expected
    assert docstrings(b"x = 1", "m.py") == docstrings(b'"""cut', "m.py") == docstrings(b'"""\xff\x00"""', "m.py") == ""


def entries(source, cache, max_bytes=1 << 20):
    """Texts, and reasons in brackets."""
    found = [e for part in source.parts(cache) for e in source.entries(part, max_bytes)]
    return [e.raw.decode() if isinstance(e, Document) else [e.reason] for e in found]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as f:
        f.write(content)
    return sink.getvalue().to_pybytes()


def test_zstd_is_read_as_gzip_is_frame_after_frame(tmp_path):
    texts = sample_texts(50)
    lines = [json.dumps({"text": t}).encode() + b"\n" for t in texts]
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b"".join(lines[:20])) + zstd(b"".join(lines[20:])))
    (tmp_path / "a.txt.zst").write_bytes(zstd("\x1f".join(texts).encode()))
    assert entries(Jsonl(glob=f"{tmp_path}/a.jsonl.zst"), tmp_path) == texts
    assert entries(Text(glob=f"{tmp_path}/a.txt.zst", separator="\x1f"), tmp_path) == texts
    whole = (tmp_path / "a.jsonl.zst").read_bytes()
    for name, content in (("cut", whole[:-9]), ("not", whole[30:])):
        (tmp_path / f"{name}.zst").write_bytes(content)
        source = Jsonl(glob=f"{tmp_path}/{name}.zst")
        with pytest.raises(ValueError, match=rf"{name}.zst: expected a whole zstd file, got"):
            raws(source, tmp_path)
        assert entries(source, tmp_path)[-1] == ["unreadable"]


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    for name, content in (("a.zst", zstd(b"x")), ("a.parquet", b"x")):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for source in (Text(glob=f"{tmp_path}/a.zst"), Parquet(glob=f"{tmp_path}/a.parquet")):
        with pytest.raises(ValueError, match=r"pyarrow: expected it for .*; pip install 'lm-pretraining\[arrow\]'"):
            raws(source, tmp_path)


@pytest.mark.usefixtures("small_stretches")
def test_what_is_wrong_stands_in_its_place_and_the_rest_is_read(tmp_path):
    good = [json.dumps({"text": t}) for t in ("one", "two\x00", "three", "four")]
    long = json.dumps({"text": "x" * 3000})
    bad = ["\0" * 400, '{"text": "cut', "[1]", '{"text": 5}', '{"texts": "no"}', long, "[" * 100_000]
    rows = [good[0], bad[0], bad[1], good[1], bad[2], bad[3], "", bad[4], bad[5], good[2], bad[6], good[3]]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    expected = [
        *("one", ["bad_json"], ["bad_json"], "two\x00", ["bad_json"], ["missing_field"], ["missing_field"]),
        *(["too_long"], "three", ["too_long"], "four"),
    ]
    for name in ("a.jsonl", "b.jsonl.gz"):
        source = Jsonl(glob=f"{tmp_path}/{name}")
        assert entries(source, tmp_path, max_bytes=2000) == expected
        messages = [
            e.message for p in source.parts(tmp_path) for e in source.entries(p, 2000) if isinstance(e, Problem)
        ]
        assert [int(re.search(r":(\d+): ", m)[1]) for m in messages] == [2, 3, 5, 6, 8, 9, 11]
    deep = Jsonl(glob=f"{tmp_path}/a.jsonl")
    assert entries(deep, tmp_path, max_bytes=1 << 20)[9:] == [["bad_json"], "four"]


def test_a_long_line_is_passed_over_without_being_held(tmp_path):
    import tracemalloc

    with open(tmp_path / "a.jsonl", "wb") as f:
        f.write(b'{"text": "before"}\n{"text": "')
        for _ in range(100):
            f.write(b"x" * 10**6)
        f.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    got = entries(Jsonl(glob=f"{tmp_path}/a.jsonl"), tmp_path, max_bytes=10**6)
    text = entries(Text(glob=f"{tmp_path}/a.jsonl", separator="\n"), tmp_path, max_bytes=10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got == ["before", ["too_long"], "after"]
    assert text == ['{"text": "before"}', ["too_long"], '{"text": "after"}', ""]
    assert peak < 12 * 10**6


@given(
    st.lists(st.text(st.sampled_from("ab-"), max_size=9), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 9)
)
def test_text_is_cut_as_split_cuts_it_and_long_pieces_are_named(tmp_path_factory, pieces, chunk, limit):
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    content = "--".join(pieces)
    path.write_text(content)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sources_text, "CHUNK_BYTES", chunk)
        got = entries(Text(glob=str(path), separator="--"), path.parent, max_bytes=limit)
        whole = entries(Text(glob=str(path)), path.parent, max_bytes=limit)
    assert got == [p if len(p) <= limit else ["too_long"] for p in content.split("--")]
    assert whole == [content if len(content) <= limit else ["too_long"]]


def test_a_template_joins_fields():
    t = parse_template("Q: {q}\n{{A}}: {a.b.c}{q}", "Jsonl")
    assert t.fields == ("q", "a.b.c")
    assert t.fill({"q": "why?", "a": {"b": {"c": 3.5}}}) == "Q: why?\n{A}: 3.5why?"
    assert t.fill({"q": "x", "a.b.c": "dots"}) == "Q: x\n{A}: dotsx"
    for record, missing in (
        ({"a": {"b": {"c": "x"}}}, Missing("q", "['a']")),
        ({"q": None, "a": {"b": {"c": "x"}}}, Missing("q", "a NoneType in it")),
        ({"q": "x", "a": {"b": ["c"]}}, Missing("a.b.c", "['a', 'q']")),
        ({"q": True, "a": {"b": {"c": "x"}}}, Missing("q", "a bool in it")),
    ):
        assert t.fill(record) == missing
    for template, message in (
        ("{q", "expected fields as '{question}', got expected '}'"),
        ("plain", "expected at least one field"),
        ("{}", "expected only names of fields"),
        ("{q!r}", "expected only names of fields"),
        ("{q:>5}", "expected only names of fields"),
        ("{a..b}", "expected only names of fields"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"Jsonl(template={template!r}): {message}")):
            Jsonl(glob="x", template=template)


RECORDS = [{"q": f"q{i} ß", "a": {"t": f"a{i}", "n": i}, "text": t} for i, t in enumerate(sample_texts(300))]
JOINED = [f"{r['q']}\n{r['a']['t']} {r['a']['n']}" for r in RECORDS]
TEMPLATE = "{q}\n{a.t} {a.n}"


def write_columns(folder, records=RECORDS):
    table = pa.Table.from_pylist(records)
    pq.write_table(table, folder / "a.parquet", row_group_size=37)
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as w:
        w.write_table(table, max_chunksize=41)
    with pa.ipc.new_stream(folder / "b.arrow", table.schema) as w:
        w.write_table(table, max_chunksize=43)
    return table


@pytest.mark.parametrize("cut", [1, 3000, 10**9])
def test_columns_give_their_rows_in_order_however_they_are_cut(tmp_path, monkeypatch, cut):
    write_columns(tmp_path)
    monkeypatch.setattr(base, "stretch_bytes", lambda total: cut)
    monkeypatch.setattr(sys.modules["lm.data.sources.columns"], "stretch_bytes", lambda total: cut)
    texts = [r["text"] for r in RECORDS]
    for kind, name in ((Parquet, "a.parquet"), (Arrow, "a.arrow"), (Arrow, "b.arrow")):
        source = kind(glob=f"{tmp_path}/{name}")
        assert entries(source, tmp_path) == texts
        assert entries(kind(glob=f"{tmp_path}/{name}", template=TEMPLATE), tmp_path) == JOINED
        assert entries(kind(glob=f"{tmp_path}/{name}", field="a.t"), tmp_path) == [f"a{i}" for i in range(300)]
        assert (len(source.parts(tmp_path)) == 1) == (cut == 10**9)
    assert entries(Arrow(glob=f"{tmp_path}/*.arrow"), tmp_path) == texts * 2


def test_columns_name_what_they_cannot_use(tmp_path):
    write_columns(tmp_path, [{"text": "x"}, {"text": None}, {"text": "y" * 99}])
    for kind, name in ((Parquet, "a.parquet"), (Arrow, "b.arrow")):
        assert entries(kind(glob=f"{tmp_path}/{name}"), tmp_path, 50) == ["x", ["missing_field"], ["too_long"]]
        with pytest.raises(
            ValueError, match=rf"{name}: row 2: expected a string in field 'text', got a NoneType in it"
        ):
            raws(kind(glob=f"{tmp_path}/{name}"), tmp_path)
        with pytest.raises(ValueError, match=rf"{name}: expected a column 'body', got \['text'\]; set {kind.__name__}"):
            raws(kind(glob=f"{tmp_path}/{name}", field="body"), tmp_path)
        (tmp_path / f"cut.{name}").write_bytes((tmp_path / name).read_bytes()[:-30])
        with pytest.raises(ValueError, match=rf"cut.{name}: expected a whole file, got .*; fetch it again"):
            raws(kind(glob=f"{tmp_path}/cut.{name}"), tmp_path)
        skipped = entries(kind(glob=f"{tmp_path}/*{name}"), tmp_path)
        assert ["unreadable"] in skipped and "x" in skipped  # and the files beside it are read


def test_strings_of_columns_that_are_no_utf8_pass_as_bytes(tmp_path):
    raw, ends = [b"a\xff", b"whole", "é".encode()], b"".join(n.to_bytes(4, "little") for n in (0, 2, 7, 9))
    strings = pa.StringArray.from_buffers(3, pa.py_buffer(ends), pa.py_buffer(b"".join(raw)))
    inside = pa.StructArray.from_arrays([strings, pa.array([1, 2, 3])], ["t", "n"])
    table = pa.table({"text": strings, "large": strings.cast(pa.large_string()), "a": inside})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as w:
        w.write_table(table)
    for kind, name in ((Parquet, "a.parquet"), (Arrow, "a.arrow")):
        for field in ("text", "large", "a.t"):
            assert raws(kind(glob=f"{tmp_path}/{name}", field=field), tmp_path) == raw
        joined = raws(kind(glob=f"{tmp_path}/{name}", template="{a.n}{text}"), tmp_path)
        assert joined == [b"1" + raw[0], b"2" + raw[1], b"3" + raw[2]]


def test_strings_held_once_that_are_no_utf8_pass_as_bytes_or_stand_as_a_problem(tmp_path):
    strings = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    shared = pa.DictionaryArray.from_arrays(pa.array([0, 0]), strings)
    inside = pa.StructArray.from_arrays([shared], ["t"])
    table = pa.table({"text": shared, "a": inside})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as w:
        w.write_table(table)
    assert raws(Arrow(glob=f"{tmp_path}/a.arrow"), tmp_path) == [b"\xff", b"\xff"]
    assert entries(Arrow(glob=f"{tmp_path}/a.arrow", field="a.t"), tmp_path) == [["unreadable"]]


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as w:
        w.write_table(table)
    for kind, name in ((Parquet, "a.parquet"), (Arrow, "a.arrow")):
        with pytest.raises(ValueError, match=f"{name}: expected one column 'text', got 2; rename"):
            raws(kind(glob=f"{tmp_path}/{name}"), tmp_path)


def test_a_stream_that_is_cut_says_what_is_wrong_with_it(tmp_path):
    write_columns(tmp_path)
    whole = (tmp_path / "b.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="b.arrow: expected a whole file, got Expected to .* read"):
        raws(Arrow(glob=f"{tmp_path}/b.arrow"), tmp_path)


def test_a_saved_dataset_is_read_by_its_own_list_of_files(tmp_path):
    folder = tmp_path / "saved"
    for split, n in (("train", 200), ("test", 20)):
        (folder / split).mkdir(parents=True)
        table = pa.Table.from_pylist(RECORDS[:n])
        names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        for i, name in enumerate(names):
            with pa.ipc.new_stream(folder / split / name, table.schema) as w:
                w.write_table(table[i * n // 2 : (i + 1) * n // 2], max_chunksize=30)
        (folder / split / "cache-123.arrow").write_bytes(b"not listed")
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert entries(HFDataset(path=str(folder), template=TEMPLATE), tmp_path) == JOINED[:200]
    assert entries(HFDataset(path=str(folder), split="test"), tmp_path) == [r["text"] for r in RECORDS[:20]]
    assert entries(HFDataset(path=str(folder / "test"), split="test", field="q"), tmp_path)[19] == "q19 ß"
    for kw, message in (
        (dict(path=str(folder), split="tset"), "expected one of its splits .* got 'tset'; did you mean 'test'"),
        (dict(path=str(folder / "test")), "expected split 'train', got 'test'; set HFDataset"),
        (dict(path=str(tmp_path)), "expected what datasets' save_to_disk wrote, got no state.json"),
    ):
        with pytest.raises(ValueError, match=message):
            HFDataset(**kw).parts(tmp_path)
    before = HFDataset(path=str(folder)).identity()
    (folder / "train" / names[1]).unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00002.arrow: expected it as .*state.json says, got nothing"):
        HFDataset(path=str(folder)).parts(tmp_path)
    assert len(before) == 2


def test_a_store_far_away_is_copied_once_and_said_so(tmp_path, monkeypatch):
    far, cache, lines = tmp_path / "far", tmp_path / "cache", []
    for name in ("x/b.jsonl", "y/a.jsonl", "x/no.txt"):
        (far / name).parent.mkdir(parents=True, exist_ok=True)
        (far / name).write_text(json.dumps({"text": name}) + "\n")
    real = epath.Path
    monkeypatch.setattr(epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(far))))
    source = Jsonl(glob="gs://bucket/*/*.jsonl")
    assert source.identity() is None
    with pytest.raises(ValueError, match="gs://bucket/.*: expected files, got no match"):
        source.parts(cache)
    source.fetch(cache, lines.append)
    assert entries(source, cache) == ["x/b.jsonl", "y/a.jsonl"]
    assert re.search(r"copying 2 of 2 files, 0.0 MB, to .*cache", lines[0]) and "MB/s" in lines[1]
    source.fetch(cache, lines.append)
    assert len(lines) == 2
    (far / "x/b.jsonl").unlink()
    (far / "y/a.jsonl").write_text(json.dumps({"text": "longer than it was"}) + "\n")
    source.fetch(cache, lines.append)
    assert entries(source, cache) == ["longer than it was"] and "copying 1 of 1" in lines[2]
    with pytest.raises(ValueError, match="gs://bucket/x/none: expected files, got no match; check the glob"):
        Jsonl(glob="gs://bucket/x/none").fetch(cache, lines.append)
    with pytest.raises(ValueError, match="expected a store that can be listed, got Recursive"):
        Jsonl(glob="gs://bucket/**/*.jsonl").fetch(cache, lines.append)


@pytest.mark.usefixtures("small_stretches")
def test_tfds_fills_a_template(tiny, tmp_path):
    folder, _ = tiny
    source = Tfds(name="tiny_texts", split="test", template="{t.en}: {text}", data_dir=folder)
    texts = raws(Tfds(name="tiny_texts", split="test", data_dir=folder), tmp_path)
    labels = raws(Tfds(name="tiny_texts", split="test", field="t.en", data_dir=folder), tmp_path)
    assert raws(source, tmp_path) == [b": ".join(pair) for pair in zip(labels, texts)] and len(texts) == 20


def test_damaged_records_of_tfds_stand_in_their_place(tmp_path):
    builder = TinyTexts(data_dir=str(tmp_path), file_format="tfrecord")
    builder.download_and_prepare()
    source = Tfds(name="tiny_texts", split="test", data_dir=str(tmp_path))
    first = source.parts(tmp_path)[0]
    whole, path = Path(first.path).read_bytes(), Path(first.path)
    n = len(list(source.read(first)))
    size = int.from_bytes(whole[:8], "little")
    for damaged, texts in (
        (whole[:size], 0),
        (b"\xff" * 8 + whole[8:], 0),
        (whole[:12] + b"\xff" * size + whole[12 + size :], n - 1),
    ):
        path.write_bytes(damaged)
        found = list(source.entries(first, 1000))
        assert [e.reason for e in found if isinstance(e, Problem)] == ["unreadable"] and len(found) == texts + 1
        with pytest.raises(ValueError, match=f"{path.name}: (record 0: )?expected"):
            list(source.read(first))
    path.unlink()
    assert [e.reason for e in source.entries(first, 1000)] == ["unreadable"]
    with pytest.raises(ValueError, match=f"{path.name}: expected it as the dataset_info.json beside it says"):
        source.parts(tmp_path)
