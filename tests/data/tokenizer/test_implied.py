"""A folder that says little of its tokenizer: nothing is made up, and documents end with what some file names."""

from __future__ import annotations

import json
import pickle

import pytest
import tokenizers

from lm.data.tokenizer.base import NO_PAD
from lm.data.tokenizer.huggingface import HFTokenizer
from lm.data.tokenizer.open import open_tokenizer
from lm.data.tokenizer.slow import from_bytes, load_folder
from lm.errors import UserError
from tests.data.tokenizer.test_huggingface import CORPUS, LAYOUTS, TEXTS, auto, cls, special_map, write  # noqa: F401

hf = pytest.mark.hf


def whole(name: str, specials: list[str]) -> bytes:
    """A tokenizer.json with these special tokens alone, as its trainer writes it."""
    kinds = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders, tokenizers.trainers
    models, pre, decoders, trainers = kinds
    if name == "bert":
        out = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        out.pre_tokenizer, out.decoder = pre.BertPreTokenizer(), decoders.WordPiece(prefix="##")
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    else:
        out = tokenizers.Tokenizer(models.BPE())
        out.pre_tokenizer, out.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
    out.train_from_iterator(CORPUS, trainer)
    return out.to_str().encode()


# model_type -> (special tokens of its tokenizer.json, that which ends texts, by config.json, the roles that its class
# gives them where they are there).
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = {
    "llama": (LLAMA3, "<|end_of_text|>", {}),
    "gpt2": (["<|endoftext|>"], "<|endoftext|>", dict.fromkeys(("bos", "eos", "unk"), 0)),
    "gpt2 with other names": (["<s>", "</s>"], "</s>", {}),
    "bert": (BERT, "[SEP]", {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}),
    "bert without a mask": (BERT[:-1], "[SEP]", {"pad": 0, "unk": 1, "cls": 2, "sep": 3}),
}


def model(kind: str, **fields) -> dict[str, bytes]:
    specials, end, _ = KINDS[kind]
    fields = {"model_type": kind.split()[0], "eos_token_id": specials.index(end)} | fields
    return {"config.json": json.dumps(fields).encode()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


SETTINGS = {
    "tokenizer.json alone": {},
    "without tokenizer_class": {"tokenizer_config.json": b'{"model_max_length": 99}'},
    "null tokenizer_class": {"tokenizer_config.json": b'{"tokenizer_class": null, "added_tokens_decoder": null}'},
    "an empty special_tokens_map.json": {"special_tokens_map.json": b"{}"},
    "generic class": cls("PreTrainedTokenizerFast"),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_token_is_added_that_no_file_names(kind, settings, tmp_path):
    specials, end, roles = KINDS[kind]
    content = whole(kind.split()[0], specials)
    folder = write(tmp_path / "folder", {"tokenizer.json": content} | SETTINGS[settings] | model(kind))
    made = tokenizers.Tokenizer.from_buffer(content)
    ours = load_folder(folder)
    assert ours.vocab_size == made.get_vocab_size()
    named = {role: i for role, i in ours.ids.items() if i is not None}
    assert named == ({} if settings == "generic class" else roles)
    for text in TEXTS[:6]:
        assert ours.encode(text, special=True) == made.encode(text).ids
    documents = open_tokenizer(folder)
    assert documents.pieces([documents.eos_id]) == [end] and documents.vocab_size == made.get_vocab_size()
    assert documents.pad_id == (0 if named.get("pad") == 0 else NO_PAD)
    assert documents.eos_id not in documents.encode(f"a{end} b {end}") and documents.decode([documents.eos_id]) == ""
    for again in (from_bytes(documents.to_bytes(), literal=True), pickle.loads(pickle.dumps(documents))):
        assert (again.eos_id, again.vocab_size, again.fingerprint) == (
            documents.eos_id,
            documents.vocab_size,
            documents.fingerprint,
        )
    assert open_tokenizer(folder / "tokenizer.json").eos_id == documents.eos_id


@pytest.mark.parametrize("map_", [{"eos": "<|eot_id|>"}, {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}])
def test_a_special_tokens_map_alone_names_the_end_of_documents(map_, tmp_path):
    folder = write(tmp_path, {"tokenizer.json": whole("llama", LLAMA3)} | special_map(**map_) | model("llama"))
    ours = open_tokenizer(folder)
    assert ours.pieces([ours.eos_id]) == ["<|eot_id|>"] and ours.vocab_size == 300
    assert {role for role, i in ours.ids.items() if i is not None} == set(map_)


def test_a_named_token_that_the_vocabulary_lacks_is_added(tmp_path):
    named = special_map(pad="<pad>") | model("llama")
    ours = load_folder(write(tmp_path, {"tokenizer.json": whole("llama", LLAMA3)} | named))
    assert ours.ids["pad"] == 300 and ours.vocab_size == 301


def test_the_first_of_several_ends_and_that_of_generation_config_end_documents(tmp_path):
    files = {"tokenizer.json": whole("llama", LLAMA3)}
    several = write(tmp_path / "several", files | model("llama", eos_token_id=[2, 1]))
    assert open_tokenizer(several).eos_id == 2
    other = files | model("llama", eos_token_id=None) | {"generation_config.json": b'{"eos_token_id": [1, 2]}'}
    assert open_tokenizer(write(tmp_path / "other", other)).eos_id == 1
    none = files | model("llama", eos_token_id=None)
    with pytest.raises(UserError, match="expected a token that ends a document, .*end_of_text"):
        open_tokenizer(write(tmp_path / "none", none))


def test_an_end_that_is_no_special_token_ends_documents_and_is_not_in_them(tmp_path):
    tree = json.loads(whole("llama", LLAMA3))
    tree["added_tokens"] = []  # its tokens are plain words of the vocabulary
    files = {"tokenizer.json": json.dumps(tree).encode()} | model("llama")
    ours = open_tokenizer(write(tmp_path, files))
    assert ours.pieces([ours.eos_id]) == ["<|end_of_text|>"]
    assert ours.eos_id not in ours.encode("a<|end_of_text|> b") and ours.token_bytes()[ours.eos_id] == 0


def test_a_tokenizer_stored_by_an_older_version_is_read_as_it_was_then(tmp_path):
    """It had added what its class names: a corpus and a model were made with those ids."""
    files = {"tokenizer.json": whole("llama", LLAMA3)} | cls("LlamaTokenizer")
    old = HFTokenizer(files)
    assert (old.vocab_size, old.ids["eos"]) == (303, 301)
    assert b"beside" not in old.to_bytes() and from_bytes(old.to_bytes()).vocab_size == 303


def test_what_says_all_keeps_its_bytes(tmp_path):
    """So that a corpus which was prepared with it still fits."""
    for name in LAYOUTS:
        folder = write(tmp_path / name, LAYOUTS[name]() | {"config.json": b'{"eos_token_id": 0, "model_type": "gpt2"}'})
        assert b"beside" not in load_folder(folder).to_bytes()


@hf
@pytest.mark.parametrize("settings", ["tokenizer.json alone", "without tokenizer_class"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_ids_and_roles_are_those_of_transformers(name, settings, tmp_path, auto):  # noqa: F811
    content = whole(name, KINDS[name][0])
    folder = write(tmp_path / "folder", {"tokenizer.json": content} | SETTINGS[settings] | model(name))
    ours, theirs = load_folder(folder), auto(folder)
    ours.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_bytes(model(name)["config.json"])
    for other in (theirs, auto(tmp_path / "out", strict=True)):
        assert ours.vocab_size == len(other)
        for role, i in ours.ids.items():
            assert i == getattr(other, f"{role}_token_id"), role


# --- JSON as other programs write it ----------------------------------------------------------------------------------

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_a_byte_order_mark_is_no_part_of_a_file(file, tmp_path):
    files = {"tokenizer.json": whole("gpt2", ["<|endoftext|>"])} | model("gpt2")
    files |= {"tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}"}
    plain, marked = write(tmp_path / "plain", files), write(tmp_path / "marked", files | {file: MARK + files[file]})
    one, other = load_folder(plain), load_folder(marked)
    assert (one.ids, one.vocab_size) == (other.ids, other.vocab_size)
    assert one.encode_batch(TEXTS) == other.encode_batch(TEXTS)
    assert open_tokenizer(marked).token_bytes().tolist() == open_tokenizer(plain).token_bytes().tolist()


NULLS = ["added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "pad_token", "chat_template"]


@pytest.mark.parametrize("field", NULLS)
def test_a_null_in_tokenizer_config_is_a_field_that_is_not_there(field, tmp_path):
    files = {"tokenizer.json": whole("gpt2", ["<|endoftext|>"])}
    plain = load_folder(write(tmp_path / "plain", files | cls("GPT2Tokenizer")))
    null = load_folder(write(tmp_path / "null", files | cls("GPT2Tokenizer", **{field: None})))
    assert null.ids == plain.ids and null.encode_batch(TEXTS) == plain.encode_batch(TEXTS)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder: expected an object, got \[1\]"),
        ({"added_tokens_decoder": {"x": "<a>"}}, "expected the id of an added token, got 'x'"),
        ({"extra_special_tokens": "<a>"}, "expected a list of additional_special_tokens, got '<a>'"),
        ({"additional_special_tokens": [3]}, "expected a special token as text"),
    ],
)
def test_settings_of_another_kind_are_refused_in_one_line(fields, message, tmp_path):
    files = {"tokenizer.json": whole("gpt2", ["<|endoftext|>"])} | cls("GPT2Tokenizer", **fields)
    with pytest.raises(UserError, match=message) as e:
        load_folder(write(tmp_path, files))
    assert "\n" not in str(e.value)


# --- built from a vocabulary ------------------------------------------------------------------------------------------


def test_a_vocabulary_without_the_tokens_of_its_class_gets_none(tmp_path):
    vocab = {token: i for token, i in json.loads(LAYOUTS["gpt2"]()["vocab.json"]).items() if token != "<|endoftext|>"}
    vocab = {token: i for i, token in enumerate(vocab)}
    files = LAYOUTS["gpt2"]() | {"vocab.json": json.dumps(vocab).encode()}
    files |= model("gpt2", eos_token_id=vocab["</s>"])
    ours = open_tokenizer(write(tmp_path / "gpt2", files))
    assert ours.vocab_size == len(vocab) and not any(ours.ids.values())
    assert ours.pieces([ours.eos_id]) == ["</s>"]
    lines = LAYOUTS["bert"]()["vocab.txt"]
    bert = LAYOUTS["bert"]() | {"vocab.txt": lines.replace(b"[MASK]\n", b"")}
    assert load_folder(write(tmp_path / "bert", bert)).ids["mask"] is None
    bert["vocab.txt"] = lines.replace(b"[SEP]\n", b"")
    with pytest.raises(UserError, match="expected the sep_token of a BertTokenizer in its vocabulary, got none"):
        load_folder(write(tmp_path / "cut", bert))


# --- files of any content ---------------------------------------------------------------------------------------------

VALUES = (None, "x", "4", [], {}, -1, 0, True, 1.5, [1], {"a": 1}, [["x"]], [None], {"0": {"content": "x"}})
FIELDS = {
    "tokenizer_config.json": "added_tokens_decoder extra_special_tokens tokenizer_class eos_token",
    "special_tokens_map.json": "eos_token additional_special_tokens extra_special_tokens",
    "added_tokens.json": "new",
    "config.json": "eos_token_id tokenizer_class model_type",
    "generation_config.json": "eos_token_id",
}


@pytest.mark.parametrize("file", FIELDS)
def test_whatever_a_field_holds_a_folder_is_read_or_refused_in_one_line(file, tmp_path):
    files = {"tokenizer.json": whole("gpt2", ["<|endoftext|>"])} | model("gpt2")
    files |= {} if file == "tokenizer_config.json" else cls("GPT2Tokenizer") if file == "config.json" else {}
    folder, read = write(tmp_path, files), 0
    for field in FIELDS[file].split():
        for value in VALUES:
            write(folder, {file: json.dumps(json.loads(files.get(file, b"{}")) | {field: value}).encode()})
            try:
                load_folder(folder)
                open_tokenizer(folder)
                read += 1
            except UserError as e:
                assert "\n" not in str(e)
    assert read or file == "added_tokens.json"
