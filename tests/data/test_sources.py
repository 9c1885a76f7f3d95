import ast
import gzip
import json
import re
import sys

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from lm.data import Docstrings, Jsonl, Source, Stdlib, Text, Tfds, sources
from lm.data.docstrings import docstrings
from lm.data.records import bytes_feature, read_records

from .conftest import sample_texts


def raws(source: Source, cache) -> list[bytes]:
    return [d.raw for part in source.parts(cache) for d in source.read(part)]


@pytest.fixture
def small_stretches(monkeypatch):
    monkeypatch.setattr(sources, "stretch_bytes", lambda total: 1000)


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
        monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
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
        monkeypatch.setattr(sources, "stretch_bytes", lambda total, cut=cut: cut)
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
    for name, content in (("cut", whole[:-200]), ("not", b"plain text"), ("bad", whole[:300] + b"xxxx" + whole[304:])):
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
