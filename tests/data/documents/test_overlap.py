import json
import random

import pytest

from lm.data import Jsonl, Overlap, Text
from lm.data.documents.ngrams import words
from lm.data.documents.overlap import OverlapIndex, load_index, read_evaluation


def text(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice("abcd") + rng.choice("ijkl") for _ in range(n))


def grams(t: str, n: int) -> set[tuple[str, ...]]:
    ws = words(t)
    return {tuple(ws[i : i + n]) for i in range(len(ws) - n + 1)}


def write(path, texts):
    path.write_text("".join(json.dumps({"q": t}) + "\n" for t in texts))
    return Jsonl(glob=str(path), field="q")


def index(tmp_path, ngram, **texts):
    found = {name: read_evaluation(name, write(tmp_path / name, t), ngram, tmp_path) for name, t in texts.items()}
    OverlapIndex.of(found, ngram).save(tmp_path / "index.npz")
    return load_index(tmp_path / "index.npz"), found


def test_finds_just_the_documents_that_share_an_ngram(tmp_path):
    rng = random.Random(0)
    one, two = [text(rng, rng.randint(5, 40)) for _ in range(30)], [text(rng, 50) for _ in range(7)]
    idx, found = index(tmp_path, 3, one=one, two=two)
    assert found["one"].n_documents == 30 and idx.names == ("one", "two")
    hits = 0
    for _ in range(300):
        t = text(rng, rng.randint(2, 30)).title().replace(" ", ",  ")
        expected = [i for i, of in enumerate((one, two)) if grams(t, 3) & set().union(*(grams(x, 3) for x in of))]
        got, shown = idx.find(t)
        assert got == expected
        hits += bool(got)
        if got:
            assert tuple(shown.split()) in set().union(*(grams(x, 3) for x in one + two)) & grams(t, 3)
    assert 50 < hits < 290


def test_thirteen_words_in_a_row_are_needed(tmp_path):
    ws = [f"word{i}" for i in range(20)]
    idx, found = index(tmp_path, 13, a=[" ".join(ws), "too short"])
    assert found["a"].n_short == 1 and len(found["a"].grams) == 8
    for n, at, expected in ((13, 0, [0]), (12, 0, []), (13, 7, [0]), (12, 8, [])):
        assert idx.find("before it " + " ".join(ws[at : at + n]).upper() + ". And after it.")[0] == expected
    assert idx.find("") == ([], "")


def test_an_evaluation_that_cannot_be_checked_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.overlap.files\['a'\]: expected documents of at least 13 words, got 2"):
        read_evaluation("a", write(tmp_path / "a", ["one two", "three"]), 13, tmp_path)
    (tmp_path / "b").write_text('{"q": "x"}\nnot json\n')
    with pytest.raises(ValueError, match=r"data.overlap.files\['b'\]: .*b:2: expected one JSON object"):
        read_evaluation("b", Jsonl(glob=f"{tmp_path}/b", field="q"), 1, tmp_path)
    for kw, message in (
        (dict(files={}), "files: expected evaluations by name, got none"),
        (dict(files={"a": "x.txt"}), r"files\['a'\]: expected a Source, got 'x.txt'"),
        (dict(files={"a": Text(glob="x")}, ngram=0), "ngram: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"data.overlap.{message}"):
            Overlap(**kw)
