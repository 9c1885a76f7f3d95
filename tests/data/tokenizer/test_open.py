from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lm.checkpoint import Meta
from lm.data import NO_PAD, Data, SentencePiece, Text, open_corpus, prepare
from lm.data.inspect.stats import stores_of, verify
from lm.data.tokenizer.huggingface import HFTokenizer
from lm.data.tokenizer.literal import read_as_text
from lm.data.tokenizer.open import open_tokenizer
from lm.data.tokenizer.slow import from_bytes, load_folder
from lm.errors import UserError
from tests.data.conftest import sample_texts
from tests.data.tokenizer.test_huggingface import CORPUS, LAYOUTS, TEXTS, cls, model_of, special_map, spm, write

# What ends a document, and what pads: by the vocabulary's spelling, None: nothing.
ENDS = {
    "gpt2": ("<|endoftext|>", None),
    "gpt2_prefix": ("<|endoftext|>", "<pad>"),
    "opt": ("</s>", "<pad>"),
    "roberta": ("</s>", "<pad>"),
    "bart": ("</s>", "<pad>"),
    "bert": ("[SEP]", "[PAD]"),
    "t5": ("</s>", "<pad>"),
    "albert": ("[SEP]", "<pad>"),
    "llama": ("</s>", None),
    "xlm_roberta": ("</s>", "<pad>"),
    "mbart": ("</s>", "<pad>"),
    "marian": ("</s>", "<pad>"),
}
SPELLINGS = "</s> <s> <pad> <unk> <mask> [CLS] [SEP] [MASK] [PAD] <|endoftext|> <extra_id_3> ro_RO <0x41>".split()
LOSSLESS = ("gpt2", "opt", "gpt_neo", "roberta")


@functools.cache
def files(name: str) -> dict[str, bytes]:
    return LAYOUTS[name]()


def documents(name: str, folder) -> HFTokenizer:
    tokenizer = open_tokenizer(write(folder / name, files(name)))
    assert isinstance(tokenizer, HFTokenizer) and tokenizer.literal
    return tokenizer


@pytest.fixture(params=LAYOUTS)
def name(request):
    return request.param


# --- what is special --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDS)
def test_documents_end_in_the_token_of_the_class_and_are_padded_by_its_own(name, tmp_path):
    tokenizer = documents(name, tmp_path)
    end, pad = ENDS[name]
    assert tokenizer.pieces([tokenizer.eos_id]) == [end]
    assert tokenizer.pad_id == NO_PAD if pad is None else tokenizer.pieces([tokenizer.pad_id]) == [pad]
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize(
    "more", [special_map(pad="<|endoftext|>"), special_map(unk="<unk>", pad="<unk>")], ids=["end", "unknown"]
)
def test_a_padding_that_is_also_text_or_an_end_is_none(more, tmp_path):
    folder = write(tmp_path, files("gpt2") | cls("PreTrainedTokenizer") | special_map(eos="<|endoftext|>"))
    tokens = {"eos_token": "<|endoftext|>"} | json.loads(more["special_tokens_map.json"])
    load_folder(write(tmp_path / "built", files("gpt2"))).save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.ids["pad"] is not None and tokenizer.pad_id == NO_PAD


def test_special_tokens_that_a_text_spells_are_text(name, tmp_path):
    tokenizer, as_named = documents(name, tmp_path), load_folder(tmp_path / name)
    special = np.flatnonzero(tokenizer.token_bytes() == 0)
    unk = {tokenizer.ids["unk"]} - {tokenizer.eos_id}
    found = set()
    for token in SPELLINGS:
        for text in (token, f"a{token}", f"a {token} b", f"{token}{token}x", f"\n{token}\n"):
            ids = tokenizer.encode(text)
            assert not (set(ids) - unk) & set(special.tolist()), text
            assert tokenizer.encode_batch([text]) == [ids]
            found |= set(as_named.encode(text))
    assert found & set(special.tolist()), "nothing was put to the test"


def test_text_without_special_tokens_keeps_its_ids(name, tmp_path):
    tokenizer, as_named = documents(name, tmp_path), load_folder(tmp_path / name)
    plain = [t for t in [*TEXTS, *CORPUS[:20]] if "<" not in t and "[" not in t]
    assert tokenizer.encode_batch(plain) == [as_named.encode(t) for t in plain]


AROUND = ["a</s>b", "x <s> y", "<unk>", "say <|endoftext|>, twice <|endoftext|>"]


def test_byte_level_ids_are_those_of_a_vocabulary_without_special_tokens(tmp_path):
    tokenizer = documents("gpt2", tmp_path)
    model = models.BPE.from_file(*(str(tmp_path / "gpt2" / file) for file in ("vocab.json", "merges.txt")))
    bare = tokenizers.Tokenizer(model)
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode_batch(AROUND) == [bare.encode(text).ids for text in AROUND]


def test_llama_ids_are_those_of_sentencepiece(tmp_path):
    model = sentencepiece.SentencePieceProcessor(model_proto=model_of("llama"))
    assert documents("llama", tmp_path).encode_batch(AROUND) == model.encode(AROUND)


def test_unigram_decodes_what_spells_its_special_tokens_and_bytes_to_the_text(tmp_path):
    pieces = spm(
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, vocab_size=389,
        unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    folder = write(tmp_path / "u", {"tokenizer.model": pieces} | cls("LlamaTokenizer"))
    text, tokenizer = "a</s>b <s> <0x41> <0x4> x<unk></s>", open_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(load_folder(folder).encode(text)) != text
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text) + 1  # the space in front


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return documents("gpt2", tmp_path_factory.mktemp("byte_level"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*SPELLINGS, "<", ">", "</", "s>", "|", "0x", " ", "\n", "a", "é", "東"])).map("".join))
def test_any_text_survives_a_byte_level_tokenizer_and_its_bytes_add_up(byte_level, text):
    tokenizer = byte_level
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids and tokenizer.decode_complete(ids) == text


def test_a_piece_that_joins_into_a_special_token_is_cut():
    bpe = tokenizers.Tokenizer(models.BPE({"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}, [("<", "s"), ("<s", ">")]))
    bpe.decoder = decoders.Fuse()
    bpe.add_special_tokens(["<s>"])
    assert bpe.encode("<s>s<s").ids == [4, 1, 3]
    read_as_text(bpe, ["<s>"])
    assert bpe.encode("<s>s<s").ids == [0, 1, 2, 1, 3]


# --- where it comes from ----------------------------------------------------------------------------------------------


def test_a_folder_its_json_and_a_prepared_file_are_one_tokenizer(name, tmp_path):
    tokenizer = documents(name, tmp_path)
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    others = [tmp_path / "saved", tmp_path / "tokenizer.model"]
    if name != "marian":  # which has none
        others.append(tmp_path / "saved" / "tokenizer.json")
    for path in others:
        other = open_tokenizer(str(path))
        assert other.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert (other.eos_id, other.pad_id, other.vocab_size) == (
            tokenizer.eos_id,
            tokenizer.pad_id,
            tokenizer.vocab_size,
        )
        assert path.name == "tokenizer.json" or other.fingerprint == tokenizer.fingerprint
    assert from_bytes(tokenizer.to_bytes(), literal=True).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_our_own_model_is_read_as_before(tokenizer, tokenizer_path):
    assert open_tokenizer(tokenizer_path).fingerprint == tokenizer.fingerprint


def test_what_is_no_tokenizer_is_refused_with_what_to_do(tmp_path, tokenizer):
    def refused(path, match):
        with pytest.raises(UserError, match=match):
            open_tokenizer(path)

    refused(
        tmp_path / "none", "none: expected a .model file, a tokenizer.json, .* got nothing there; set data.tokenizer"
    )
    refused(
        write(tmp_path / "empty", {"a.txt": b""}), "empty: expected tokenizer.json, .* got a.txt; fetch the tokenizer"
    )
    (tmp_path / "run/checkpoints/3.tmp").mkdir(parents=True)
    refused(tmp_path / "run", "run: expected a run with a tokenizer, got no finished checkpoint")
    meta = tmp_path / "run/checkpoints/7/meta/metadata"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps(Meta(config="", tokenizer=b"", examples_seen=0, data={}, versions={}).encode()))
    refused(tmp_path / "run", "got the import of a folder without one; set data.tokenizer to a folder")
    (tmp_path / "m.model").write_bytes(model_of("llama"))
    refused(tmp_path / "m.model", "expected pad, eos, unk ids .* or name the folder of the model")

    load_folder(write(tmp_path / "bert", files("bert"))).save(tmp_path / "bare")
    (tmp_path / "bare/tokenizer_config.json").unlink()
    refused(
        tmp_path / "bare/tokenizer.json", r"bare: expected a token that ends a document, .*'\[SEP\]'.*\"eos_token\""
    )
    (tmp_path / "bare/tokenizer_config.json").write_text('{"eos_token": "[SEP]"}')
    assert open_tokenizer(tmp_path / "bare/tokenizer.json").eos_id == 3
    (tmp_path / "bare/tokenizer_config.json").write_text('{"eos_token": "."}')
    refused(tmp_path / "bare/tokenizer.json", "bare: expected eos_token to be a token that no text makes, got '.'")


# --- a corpus ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    for source in ("a", "b"):
        (tmp_path / "raw" / source).mkdir(parents=True)
        for i, text in enumerate(sample_texts(9, seed=ord(source), words=20)):
            (tmp_path / "raw" / source / f"{i}.txt").write_text(f"{text}<|endoftext|></s>[SEP]{i}")
    sources = {source: Text(glob=f"{tmp_path}/raw/{source}/*.txt") for source in ("a", "b")}
    return lambda tokenizer, **kw: Data(
        **dict(path=f"{tmp_path}/corpus", sources=sources, seq_len=16, batch_size=2, workers=1, validation_fraction=0.2)
        | {"tokenizer": tokenizer if isinstance(tokenizer, SentencePiece) else str(tokenizer)}
        | kw
    )


def quiet(data, **kw):
    return prepare(data, progress=False, log=lambda line: None, **kw)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama", "t5", "bert", "marian"])
def test_a_corpus_holds_each_document_between_two_ends(name, data, tmp_path):
    tokenizer = documents(name, tmp_path)
    corpus = quiet(data(tmp_path / name))
    assert corpus.tokenizer.fingerprint == tokenizer.fingerprint == corpus.fingerprint["tokenizer"]
    texts = {}
    for store in (*corpus.train.values(), *corpus.validation.values()):
        assert store.read(0, 1)[0] == tokenizer.eos_id and store.meta.dtype == "<u2"
        assert (store.read(0, store.n_tokens) == tokenizer.eos_id).sum() == store.n_documents + 1
        for i in range(store.n_documents):
            *ids, end = store.document(i).tolist()
            assert end == tokenizer.eos_id
            texts[corpus.tokenizer.decode(ids)] = ids
    raw = [p.read_text() for p in (tmp_path / "raw").rglob("*.txt")]
    assert len(texts) == len(raw) == 18
    assert sorted(texts.values()) == sorted(tokenizer.encode_batch(raw))
    if name in LOSSLESS:
        assert texts.keys() == set(raw)
    assert len(list(verify(stores_of(open_corpus(data(tmp_path / name)))))) == 4


def test_worker_processes_make_the_same_corpus(data, tmp_path, monkeypatch):
    for module in ("lm.data.sources.base", "lm.data.prepare.passes"):
        monkeypatch.setattr(sys.modules[module], "stretch_bytes", lambda total: 150)
    tokenizer = write(tmp_path / "gpt2", files("gpt2"))
    one, two = (quiet(data(tokenizer, path=f"{tmp_path}/{n}", workers=n)) for n in (1, 2))
    assert one.fingerprint == two.fingerprint and len(one.train["a"].meta.shards) > 3


def test_a_large_vocabulary_is_stored_in_four_bytes(data, tmp_path):
    vocab = json.loads(files("gpt2")["vocab.json"])
    vocab |= {f"unused {i}": i for i in range(len(vocab), 2**16 + 1)}
    folder = write(tmp_path / "large", files("gpt2") | {"vocab.json": json.dumps(vocab).encode()})
    corpus = quiet(data(folder))
    assert corpus.tokenizer.vocab_size == 2**16 + 1 and corpus.train["a"].meta.dtype == "<u4"


def test_a_tokenizer_that_changed_after_prepare_is_refused_and_one_that_is_gone_is_not(data, tmp_path):
    folder = write(tmp_path / "gpt2", files("gpt2"))
    before = quiet(data(folder)).fingerprint
    with pytest.raises(UserError, match=r"tokenizer.model: expected tokenizer .*opt \(.* set data.path .* --force"):
        open_corpus(data(write(tmp_path / "opt", files("opt"))))
    write(folder, special_map(pad="<pad>"))
    with pytest.raises(UserError, match="expected tokenizer .*gpt2 .* --force"):
        quiet(data(folder))
    changed = quiet(data(folder), force=True)
    assert changed.fingerprint.keys() == before.keys() and changed.fingerprint["a/train"] != before["a/train"]
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert open_corpus(data(folder)).fingerprint == changed.fingerprint


def test_a_folder_is_prepared_again_with_the_tokenizer_it_has_now(data, tmp_path):
    """In one process, which keeps the tokenizer of its last job."""
    first = quiet(data(write(tmp_path / "gpt2", files("gpt2"))))
    second = quiet(data(write(tmp_path / "bert", files("bert"))), force=True)
    assert second.tokenizer.vocab_size < first.tokenizer.vocab_size
    assert second.train["a"].read(0, 1)[0] == second.tokenizer.eos_id
    assert second.train["a"].read(0, second.train["a"].n_tokens).max() < second.tokenizer.vocab_size


def test_a_mistake_is_refused_before_the_text_is_read(data, tmp_path):
    lines = []
    with pytest.raises(UserError, match="nowhere: expected a .model file"):
        prepare(data(tmp_path / "nowhere"), progress=False, log=lines.append)
    assert not lines and not (tmp_path / "corpus/tokenizer.model").exists()
    ours = quiet(data(SentencePiece(kind="bpe", vocab_size=331), path=f"{tmp_path}/ours"))
    assert quiet(data(f"{tmp_path}/ours/tokenizer.model")).tokenizer.fingerprint == ours.tokenizer.fingerprint


def test_a_worker_starts_one_thread_of_the_library(tmp_path):
    write(tmp_path, files("gpt2"))
    load_folder(tmp_path).save(tmp_path)
    script = (
        "import os, sys, tokenizers; from lm.data.tokenizer.literal import use_one_thread\n"
        "cpus, before = os.sched_getaffinity(0), len(os.listdir('/proc/self/task'))\n"
        "use_one_thread()\n"
        "tokenizers.Tokenizer.from_file(sys.argv[1]).encode_batch_fast(['a b'] * 99)\n"
        "assert os.sched_getaffinity(0) == cpus\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not say which CPUs a process may use")
    ran = subprocess.run([sys.executable, "-c", script, tmp_path / "tokenizer.json"], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("1\n", 0), ran.stderr
