import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import SentencePiece, SentencePieceTokenizer
from tests.data.conftest import sample_texts

SPECIAL = ["", "\0", "▁", "a▁ ▁▁b", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0x0A>", "\ue000\uf8ff\U0010ffff"]
SPECIAL += [
    "\u0301\u0301e\u0301",
    "▅⁇\ufffd",
    "\ufeff",
    "\r\n\u2028\u0085",
    "\t\t  x\t",
    "\x05\x01\x02",
    " \u3000 ",
    "ﬁ①",
]
LONG = ["x" * 200_001, " " * 50_001, "é▁" * 20_001, "word " * 40_001]
ATOMS = st.one_of(st.characters(codec="utf-8"), st.sampled_from([*"▁ \n\t<>/s0xA1", *SPECIAL]))
UNICODE = st.lists(ATOMS, max_size=60).map("".join)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def any_tokenizer(request, tokenizer):
    if request.param == "bpe":
        return tokenizer
    return SentencePiece(kind="unigram", vocab_size=420).train(sample_texts(100) + SPECIAL * 20)


def check(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert not set(ids) & {tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id}


@settings(max_examples=200, deadline=None)
@given(text=UNICODE)
def test_any_text_survives_and_its_bytes_add_up(any_tokenizer, text):
    check(any_tokenizer, text)


@pytest.mark.parametrize("text", SPECIAL + LONG, ids=lambda t: ascii(t[:12]))
def test_awkward_text_survives(any_tokenizer, text):
    check(any_tokenizer, text)


def test_batch_equals_one_by_one(tokenizer):
    texts = [*sample_texts(5), "", "▁", *SPECIAL]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


@settings(max_examples=50, deadline=None)
@given(text=UNICODE)
def test_a_stream_only_grows_and_ends_as_the_whole(tokenizer, text):
    ids, shown = tokenizer.encode(text), ""
    for n in range(len(ids) + 1):
        now = tokenizer.decode_complete(ids[:n])
        assert now.startswith(shown)
        shown = now
    assert shown == text


def test_a_cut_character_is_held_back(tokenizer):
    ids = tokenizer.encode("a😀")
    assert tokenizer.decode_complete(ids[:-1]) == "a" and tokenizer.decode(ids[:-1]) == "a\ufffd"


def test_specials_have_their_ids_and_are_silent(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.pieces([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.decode([1, *tokenizer.encode("a"), 1, 0]) == "a"
    assert tokenizer.token_bytes()[:3].tolist() == [0, 0, 0]
    assert tokenizer.token_bytes().dtype == np.int32 and len(tokenizer.token_bytes()) == tokenizer.vocab_size == 420


def test_training_is_deterministic():
    texts = sample_texts(60)
    for kind in ("unigram", "bpe"):
        config = SentencePiece(kind=kind, vocab_size=400)
        assert config.train(texts).fingerprint == config.train(iter(texts)).fingerprint


def test_saves_loads_and_pickles(tokenizer, tokenizer_path):
    for other in (SentencePieceTokenizer.load(tokenizer_path), SentencePieceTokenizer.from_bytes(tokenizer.to_bytes())):
        assert other.fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).encode("data") == tokenizer.encode("data")


def test_whitespace_of_code_is_learnt():
    config = SentencePiece(vocab_size=300)
    tokenizer = config.train([f"def f{i}(x):\n        return {i} * x\n" for i in range(500)])
    assert len(tokenizer.encode("        ")) < 4


def test_refuses_bad_models_texts_ids_and_settings(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="nothing.model: expected a SentencePiece .model file"):
        SentencePieceTokenizer.load(tmp_path / "nothing.model")
    (tmp_path / "bad.model").write_bytes(b"xx")
    with pytest.raises(ValueError, match="bad.model: expected a SentencePiece model, got 2 other bytes"):
        SentencePieceTokenizer.load(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="lone surrogate .* at 3"):
        tokenizer.encode("abc\ud800")
    with pytest.raises(ValueError, match="ids: expected 0 to 419, got 420"):
        tokenizer.decode([420])
    with pytest.raises(ValueError, match="more than 260"):
        SentencePiece(vocab_size=256)
    with pytest.raises(ValueError, match="'unigram' or 'bpe'"):
        SentencePiece(kind="word")
    with pytest.raises(ValueError, match="cannot learn 5000 unigram pieces"):
        SentencePiece(vocab_size=5000).train(["too little text"])


def test_refuses_a_model_that_loses_text(tmp_path):
    common = dict(vocab_size=400, model_type="bpe", bos_id=-1, pad_id=0, minloglevel=2)
    path = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts(50)), model_prefix=path, eos_id=1, unk_id=2, byte_fallback=True, **common
    )
    with pytest.raises(ValueError, match="expected a lossless model"):
        SentencePieceTokenizer.load(path + ".model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts(50)), model_prefix=path, eos_id=2, unk_id=1, **common
    )
    with pytest.raises(ValueError, match=r"ids \(0, 1, 2\), got \(0, 2, 1\)"):
        SentencePieceTokenizer.load(path + ".model")
