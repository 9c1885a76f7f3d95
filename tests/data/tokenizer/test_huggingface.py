import functools
import io
import json
import logging
import pickle
import warnings

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm.data import SentencePiece, SentencePieceTokenizer
from lm.data.tokenizer.huggingface import HFTokenizer
from lm.data.tokenizer.slow import export, from_bytes, load_folder
from tests.data.conftest import sample_texts
from tests.data.tokenizer.test_sentencepiece import LONG, SPECIAL

hf = pytest.mark.hf
CORPUS = (
    sample_texts(60) + ["Hello, world. It's 3, 4, don't!", "naïve grösse 東京 😀", "def f(x):\n    return x  # ok"] * 9
)
TEXTS = [
    "",
    " ",
    "Hello, world. It's naïve; don't!",
    "  two  spaces ,  and a trailing one ",
    "tab\tand\nnewline\n\n    indented",
    "東京 grösse 😀 e\u0301 ﬁ ½ Ⅷ",
    "def f(x):\n    return x == 1",
    "a</s>b <s> c<pad><unk> <mask> [CLS] x[SEP] [MASK]<|endoftext|> d <extra_id_3> e",
    "<new> after<new>word",
    "\u00a0no\u200bbreak\u3000wide",
    "zebra quiz",
]
PLAIN = [t for t in TEXTS if "<" not in t]  # no special token in it


def spm(**options):
    out = io.BytesIO()
    common = dict(num_threads=2, minloglevel=2, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for t in CORPUS for line in t.split("\n") if line]),
        model_writer=out,
        **common | dict(model_type="unigram", vocab_size=173) | options,
    )
    return out.getvalue()


@functools.cache
def bpe_files():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=347, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tree = json.loads(tokenizer.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tree["merges"])
    return {"vocab.json": json.dumps(tree["vocab"], ensure_ascii=False).encode(), "merges.txt": merges.encode()}


@functools.cache
def word_piece(lower):
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=lower)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, vocab_size=197, special_tokens=special, show_progress=False)
    return {
        "vocab.txt": "".join(f"{t}\n" for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])).encode()
    }


@functools.cache
def model_of(kind):
    llama = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    llama |= dict(unk_id=0, bos_id=1, eos_id=2, vocab_size=389)
    fairseq = dict(unk_id=0, bos_id=1, eos_id=2)
    return spm(
        **{
            "t5": dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
            "mt5": dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True, vocab_size=389),
            "albert": dict(
                pad_id=0,
                unk_id=1,
                bos_id=2,
                bos_piece="[CLS]",
                eos_id=3,
                eos_piece="[SEP]",
                control_symbols=["[MASK]"],
            ),
            "llama": llama | dict(model_type="bpe", user_defined_symbols=["<new>"]),
            "llama_unigram": llama,
            "fairseq": fairseq,
            "fairseq_identity": fairseq | dict(normalization_rule_name="identity"),
            "marian": dict(bos_id=-1, eos_id=0, unk_id=1),
            "marian_target": dict(bos_id=-1, eos_id=0, unk_id=1, vocab_size=97),
        }[kind]
    )


def marian_files():
    pieces = ["</s>", "<unk>"]
    for kind in ("marian", "marian_target"):
        model = sentencepiece.SentencePieceProcessor(model_proto=model_of(kind))
        pieces += [model.id_to_piece(i) for i in range(model.get_piece_size())]
    pieces = [*dict.fromkeys(p for i, p in enumerate(pieces) if i % 7 != 5), ">>de<<", ">>pt_br<<", "<pad>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return {
        "source.spm": model_of("marian"),
        "target.spm": model_of("marian_target"),
        "vocab.json": json.dumps(vocab).encode(),
    }


def cls(name, **config):
    return {"tokenizer_config.json": json.dumps({"tokenizer_class": name} | config).encode()}


def special_map(**tokens):
    return {"special_tokens_map.json": json.dumps({f"{k}_token": v for k, v in tokens.items()}).encode()}


MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
LLAMA = dict(add_bos_token=True, bos_token={"__type": "AddedToken", "normalized": True} | {"content": "<s>"})
LAYOUTS = {
    "gpt2": lambda: bpe_files() | cls("GPT2TokenizerFast"),
    "gpt2_prefix": lambda: bpe_files() | cls("GPT2Tokenizer", add_prefix_space=True, pad_token="<pad>"),
    "opt": lambda: (
        bpe_files()
        | cls("GPT2Tokenizer", add_bos_token=True, clean_up_tokenization_spaces=True)
        | special_map(bos="</s>", eos="</s>", unk="</s>", pad="<pad>")
    ),
    "gpt_neo": lambda: bpe_files() | {"config.json": b'{"model_type": "gpt_neo", "vocab_size": 347}'},
    "roberta": lambda: (
        bpe_files() | cls("RobertaTokenizer") | special_map(mask=MASK) | {"added_tokens.json": b'{"<new>": 347}'}
    ),
    "bart": lambda: bpe_files() | cls("BartTokenizer", add_prefix_space=True, additional_special_tokens=["<new>"]),
    "bert": lambda: word_piece(True) | cls("BertTokenizer", clean_up_tokenization_spaces=True),
    "bert_cased": lambda: (
        word_piece(False) | cls("BertTokenizer", do_lower_case=False, strip_accents=False, tokenize_chinese_chars=False)
    ),
    "t5": lambda: {"spiece.model": model_of("t5")} | cls("T5Tokenizer"),
    "t5_few": lambda: (
        {"spiece.model": model_of("t5")}
        | cls("T5Tokenizer", extra_ids=7, additional_special_tokens=[f"<extra_id_{i}>" for i in range(7)] + ["<new>"])
    ),
    "albert": lambda: {"spiece.model": model_of("albert")} | cls("AlbertTokenizer"),
    "albert_cased": lambda: (
        {"spiece.model": model_of("albert")} | cls("AlbertTokenizer", do_lower_case=False, keep_accents=True)
    ),
    "llama": lambda: {"tokenizer.model": model_of("llama")} | cls("LlamaTokenizer", **LLAMA),
    "llama_ends": lambda: (
        {"tokenizer.model": model_of("llama")}
        | cls("LlamaTokenizer", add_eos_token=True, add_prefix_space=False, pad_token="<pad>")
    ),
    "xlm_roberta": lambda: {"sentencepiece.bpe.model": model_of("fairseq")} | cls("XLMRobertaTokenizer"),
    "mbart": lambda: (
        {"sentencepiece.bpe.model": model_of("fairseq_identity")} | cls("MBartTokenizer", src_lang="ro_RO")
    ),
    "marian": lambda: marian_files() | cls("MarianTokenizer", source_lang="en", target_lang="de"),
}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    return write(tmp_path / request.param, LAYOUTS[request.param]())


@pytest.fixture
def auto(monkeypatch, caplog):
    """AutoTokenizer.from_pretrained, which fails on a warning when told to."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logger = logging.getLogger("transformers")

    def load(folder, strict=False):
        monkeypatch.setattr(logger, "propagate", True)
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "transformers"):
            warnings.simplefilter("error" if strict else "ignore")
            warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
            caplog.clear()
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert not strict or not caplog.records, caplog.text
        return tokenizer

    return load


def same(ours, theirs, texts=TEXTS, decode=True):
    assert ours.vocab_size == len(theirs)
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, special=True) == ids, text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"], text
        pair = theirs(text, "a second, text", return_token_type_ids=True)
        got = ours.encode_typed(text, pair="a second, text", special=True)
        assert got.ids == pair["input_ids"], text
        if theirs.is_fast:  # Marian, which is not, has no types
            assert got.types == pair["token_type_ids"], text
        for skip in (True, False) if decode else ():
            expected = theirs.decode(ids, skip_special_tokens=skip, use_source_tokenizer=False)
            assert ours.decode(ids, skip_special=skip) == expected, text
    for role, i in ours.ids.items():
        assert i == getattr(theirs, f"{role}_token_id"), role


@hf
def test_a_folder_reads_as_in_transformers(layout, auto):
    same(load_folder(layout), auto(layout))


@hf
def test_a_folder_that_transformers_saved_reads_as_there(layout, auto, tmp_path):
    theirs = auto(layout)
    theirs.save_pretrained(tmp_path / "saved")
    same(load_folder(tmp_path / "saved"), theirs)


@hf
def test_what_is_saved_loads_in_transformers_without_a_warning(layout, auto, tmp_path):
    ours = load_folder(layout)
    ours.save(tmp_path / "out")
    same(ours, auto(tmp_path / "out", strict=True))


@hf
def test_the_fast_class_reads_the_pipeline_as_it_is(tmp_path, auto):
    """Where a class of transformers 5 rebuilds another pipeline, ours is the one in tokenizer.json."""
    for name in ("llama_unigram", "mt5", "fairseq"):
        family = {"llama_unigram": "LlamaTokenizer", "mt5": "T5Tokenizer", "fairseq": "MBartTokenizer"}[name]
        folder = write(tmp_path / name, {"tokenizer.model": model_of(name)} | cls(family))
        ours = load_folder(folder)
        ours.save(tmp_path / "out" / name)
        (tmp_path / "out" / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        theirs = auto(tmp_path / "out" / name)
        assert [ours.encode(t, special=True) for t in TEXTS] == [theirs(t)["input_ids"] for t in TEXTS]


@hf
def test_marian_and_mbart_targets_are_written_as_in_transformers(tmp_path, auto):
    for name in ("marian", "mbart"):
        files = LAYOUTS[name]()
        if name == "mbart":
            files |= cls("MBartTokenizer", src_lang="ro_RO", tgt_lang="de_DE")
        folder = write(tmp_path / name, files)
        ours, theirs = load_folder(folder), auto(folder)
        for text in [*TEXTS, ">>de<< Hello", ">>pt_br<<x >>de<<", ">>xx<< Hello", ">> not closed"]:
            assert ours.encode(text, special=True) == theirs(text)["input_ids"]
            assert ours.encode(text, target=True, special=True) == theirs(text_target=text)["input_ids"]
        assert ours.encode(CORPUS[0], target=True, special=True) != ours.encode(CORPUS[0], special=True)


@pytest.mark.parametrize("kind", ["t5", "mt5", "llama", "llama_unigram", "fairseq"])
def test_ids_are_those_of_sentencepiece(kind, tmp_path):
    family = {"t5": "T5", "mt5": "T5", "fairseq": "MBart"}.get(kind, "Llama")
    model = sentencepiece.SentencePieceProcessor(model_proto=model_of(kind))
    files = {"tokenizer.model": model_of(kind)} | cls(f"{family}Tokenizer", legacy=True)
    ours = load_folder(write(tmp_path / kind, files))
    for text in [*PLAIN, *CORPUS, "  leading", "a\u200b \u00a0b"]:
        expected = model.encode(text)
        if kind == "fairseq":  # specials moved, and the rest by one
            expected = [3 if i == 0 else i + 1 for i in expected]
        assert ours.encode(text, special=False) == expected, text


EXPORTED = [*TEXTS, *CORPUS[:9], *SPECIAL, *LONG, "<0x41> x<0xZZ> <pad", "▁▁ a▁"]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def own(request):
    return SentencePiece(kind=request.param, vocab_size=431).train(CORPUS)


def test_an_export_has_our_ids_text_and_bytes(own, tmp_path):
    export(own, tmp_path)
    theirs = load_folder(tmp_path)
    assert theirs.vocab_size == own.vocab_size
    assert [theirs.ids[r] for r in ("pad", "eos", "unk")] == [0, 1, 2]
    assert np.array_equal(theirs.token_bytes(), own.token_bytes())
    for text in EXPORTED:
        ids = own.encode(text)
        assert theirs.encode(text) == ids, ascii(text[:40])
        assert theirs.decode(ids) == text
    assert theirs.decode([1, *own.encode("a"), 0]) == "a"


@hf
def test_an_export_has_our_ids_in_transformers(own, tmp_path, auto):
    export(own, tmp_path)
    theirs = auto(tmp_path, strict=True)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id, len(theirs)) == (0, 1, 2, own.vocab_size)
    for text in EXPORTED:
        ids = own.encode(text)
        assert theirs(text)["input_ids"] == ids, ascii(text[:40])
        assert theirs.decode(ids) == text


def test_bytes_and_folders_give_the_same_tokenizer(layout, tmp_path):
    ours = load_folder(layout)
    ours.save(tmp_path / "out")
    for other in (from_bytes(ours.to_bytes()), load_folder(tmp_path / "out"), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours) and other.fingerprint == ours.fingerprint and other.ids == ours.ids
        assert [other.encode(t) for t in TEXTS] == [ours.encode(t) for t in TEXTS]
    for file in layout.iterdir():
        if file.name != "config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_run_restores_either_kind_of_tokenizer(tokenizer, tmp_path):
    assert isinstance(from_bytes(tokenizer.to_bytes()), SentencePieceTokenizer)
    ours = load_folder(write(tmp_path, LAYOUTS["gpt2"]()))
    assert isinstance(from_bytes(ours.to_bytes()), HFTokenizer)
    assert from_bytes(tokenizer.to_bytes()).fingerprint == tokenizer.fingerprint != ours.fingerprint


def test_batch_equals_one_by_one(layout):
    ours = load_folder(layout)
    assert ours.encode_batch(TEXTS) == [ours.encode(t) for t in TEXTS]


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "roberta"])
def test_bytes_add_up_to_the_text(name, tmp_path):
    ours = load_folder(write(tmp_path, LAYOUTS[name]()))
    prefix = name == "llama"
    sizes = ours.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (ours.vocab_size,)
    for text in (t for t in [*PLAIN, *CORPUS] if t and not (prefix and t[0] == " ")):
        assert sizes[ours.encode(text)].sum() == len(text.encode()) + prefix, text
    assert all(sizes[i] == 0 for i in ours.ids.values() if i is not None)


def test_word_pieces_count_their_letters(tmp_path):
    ours = load_folder(write(tmp_path, LAYOUTS["bert"]()))
    sizes = ours.token_bytes()
    for i, piece in enumerate(ours.pieces(range(5, ours.vocab_size)), 5):
        assert sizes[i] == len((piece[2:] if piece.startswith("##") else piece).encode())
    assert sizes[:5].tolist() == [0] * 5


def test_a_stream_only_grows_and_ends_as_the_whole(tmp_path):
    ours = load_folder(write(tmp_path, LAYOUTS["gpt2"]()))
    text = "naïve 東京 😀 end"
    ids, shown = ours.encode(text), ""
    for n in range(len(ids) + 1):
        now = ours.decode_complete(ids[:n])
        assert now.startswith(shown)
        shown = now
    assert shown == text


def test_baked_in_truncation_and_padding_are_not_applied(tmp_path):
    ours = load_folder(write(tmp_path, LAYOUTS["gpt2"]()))
    ours.save(tmp_path)
    baked = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    baked.enable_truncation(2)
    baked.enable_padding(length=50)
    baked.save(str(tmp_path / "tokenizer.json"))
    assert load_folder(tmp_path).encode(CORPUS[0]) == ours.encode(CORPUS[0])


def refuse(folder, match):
    with pytest.raises(ValueError, match=match):
        load_folder(folder)


def test_refuses_folders_that_lack_something(tmp_path):
    refuse(tmp_path / "none", "none: expected a folder with a tokenizer, got nothing there")
    refuse(
        write(tmp_path / "a", {"model.safetensors": b"x"}), "vocab.txt or a SentencePiece .model, got model.safetensors"
    )
    files = LAYOUTS["gpt2"]()
    del files["merges.txt"]
    refuse(
        write(tmp_path / "b", files), "expected merges.txt of a GPT2Tokenizer, got tokenizer_config.json, vocab.json"
    )
    refuse(write(tmp_path / "c", bpe_files()), "expected a tokenizer.json, or one of .* got PreTrainedTokenizer")
    refuse(
        write(tmp_path / "d", bpe_files() | cls("BloomTokenizer")), "got BloomTokenizer and merges.txt.*save_pretrained"
    )
    refuse(
        write(tmp_path / "e", bpe_files() | cls("T5Tokenizer")), "expected spiece.model or tokenizer.model or .*T5Tok"
    )
    files = marian_files() | cls("MarianTokenizer")
    del files["target.spm"]
    refuse(
        write(tmp_path / "f", files), "expected source.spm and target.spm and vocab.json of a MarianTokenizer, got sou"
    )


def test_refuses_broken_files(tmp_path):
    gpt2 = LAYOUTS["gpt2"]()
    refuse(write(tmp_path / "a", gpt2 | {"vocab.json": b'{"a": '}), "a/vocab.json: expected JSON, got something else")
    refuse(write(tmp_path / "b", gpt2 | {"tokenizer_config.json": b"["}), "b/tokenizer_config.json: expected JSON")
    refuse(write(tmp_path / "m", gpt2 | {"tokenizer_config.json": b"[]"}), "expected a JSON object, got list")
    refuse(write(tmp_path / "c", gpt2 | {"tokenizer.json": b"{}"}), "c/tokenizer.json: expected a tokenizer of the")
    refuse(write(tmp_path / "d", gpt2 | {"merges.txt": b"a b\nabc\n"}), "merges.txt:2: expected two tokens, got 'abc'")
    refuse(write(tmp_path / "e", gpt2 | {"merges.txt": b"a zzz\n"}), "expected the vocabulary of a GPT2Tokenizer.*zzz")
    refuse(write(tmp_path / "f", gpt2 | {"vocab.json": b"\xff"}), "vocab.json: expected UTF-8")
    refuse(
        write(tmp_path / "g", {"spiece.model": b"xx"} | cls("T5Tokenizer")), "spiece.model: expected a SentencePiece"
    )
    wrong = {"spiece.model": model_of("llama")} | cls("T5Tokenizer")
    refuse(write(tmp_path / "h", wrong), "expected a unigram SentencePiece model.*T5Tokenizer, got another")
    wrong = {"tokenizer.model": model_of("t5")} | cls("LlamaTokenizer")
    refuse(write(tmp_path / "i", wrong), "identity normalisation that keeps spaces for a LlamaTokenizer, got another")
    wrong = LAYOUTS["mbart"]() | cls("MBartTokenizer", src_lang="xx_XX")
    refuse(write(tmp_path / "j", wrong), "expected 'xx_XX' in the vocabulary, got no such token; check src_lang")
    wrong = LAYOUTS["marian"]() | cls("MarianTokenizer", separate_vocabs=True)
    refuse(write(tmp_path / "k", wrong), "expected one vocabulary, got separate_vocabs")
    refuse(
        write(tmp_path / "l", gpt2 | cls("GPT2Tokenizer", added_tokens_decoder={"9": 3})), "expected a special token"
    )


def test_refuses_ids_with_holes(tmp_path):
    gpt2 = LAYOUTS["gpt2"]()
    vocab = json.loads(gpt2["vocab.json"])
    vocab["zz"] = len(vocab) + 3
    refuse(
        write(tmp_path / "a", gpt2 | {"vocab.json": json.dumps(vocab).encode()}), "ids 0 to 347, got none with id 347"
    )
    lines = word_piece(True)["vocab.txt"].replace(b"[MASK]\n", b"[CLS]\n")
    refuse(write(tmp_path / "b", {"vocab.txt": lines} | cls("BertTokenizer")), "vocab.txt: expected .* none with id 2;")
    wrong = gpt2 | {"added_tokens.json": b'{"<new>": 350}'}
    refuse(write(tmp_path / "c", wrong), "expected added token '<new>' at id 350, got 347 from the vocabulary")
    files = marian_files() | cls("MarianTokenizer")
    vocab = json.loads(files["vocab.json"])
    vocab["zz"] = len(vocab) + 3
    refuse(
        write(tmp_path / "d", files | {"vocab.json": json.dumps(vocab).encode()}),
        "vocab.json: expected .* none with id",
    )


def test_refuses_texts_ids_and_bytes(layout, tmp_path):
    ours = load_folder(layout)
    with pytest.raises(ValueError, match="lone surrogate .* at 3"):
        ours.encode("abc\ud800")
    with pytest.raises(ValueError, match=f"ids: expected 0 to {ours.vocab_size - 1}, got {ours.vocab_size}"):
        ours.decode([ours.vocab_size])
    with pytest.raises(ValueError, match="expected hf-tokenizer-1 as JSON, got 12 other bytes"):
        HFTokenizer.from_bytes(b'{"format":1}')
