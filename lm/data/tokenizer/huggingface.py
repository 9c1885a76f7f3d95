"""The tokenizer of a Hugging Face model: encoding, decoding, and what every id is worth in bytes.

It reads a text as transformers does, where the spelling of a special token is that token, or `literal`, as documents of
a corpus are read: there `<|endoftext|>` in a web page is 13 characters, and no text can end its document or be padding.

It is a function of the files it came with (`tokenizer.json`, `tokenizer_config.json`, vocabularies), which travel in
`to_bytes` and are written as they were by `save`. `tokenizer.json` is taken at its word: transformers 5 rebuilds some
classes from the vocabulary in it (LlamaTokenizer, MBartTokenizer), and may then differ where a space follows a special
token or a text begins with one. What makes a `tokenizer.json` for a folder without one is in `lm.data.tokenizer.slow`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import sentencepiece
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from lm.data.tokenizer.base import NO_PAD
from lm.data.tokenizer.literal import read_as_text, spelt
from lm.data.tokenizer.specials import ROLES, SPACE, add_specials, check_ids, class_of, parse_json, read_specials
from lm.errors import UserError

T = TypeVar("T")
FORMAT = "hf-tokenizer-1"  # it stands in checkpoints, which stay readable
# transformers' clean_up_tokenization, in its order.
CLEAN_UP = [(f" {mark}", mark) for mark in (".", "?", "!", ",")] + [(" ' ", "'")]
CLEAN_UP += [(f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")]
BYTE_CHARS = frozenset(ByteLevel.alphabet())  # one character for each of the 256 bytes
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Decoders whose pieces tell their bytes.
COUNTED = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece"}


class Beside(NamedTuple):
    """What is known of a tokenizer from elsewhere than its files.

    named_only: no token is added that only the class names. Tokenizers stored by older versions were read with them.
    end: what ends a text by the model's own JSON files: it ends documents where the tokenizer names no end.
    """

    named_only: bool = False
    end: int | None = None


FILES_ALONE = Beside()


class Encoded(NamedTuple):
    """ids, and for each the number of the text it came from (BERT's token type ids), both of one length."""

    ids: list[int]
    types: list[int]


class HFTokenizer:
    """A `tokenizer.json` with what its `tokenizer_config.json` says about it; a `Tokenizer` of documents if `literal`.

    vocab_size: added tokens included. ids: role (bos, eos, unk, sep, pad, cls, mask) to id, None where absent.
    fingerprint: sha256 of `to_bytes`. literal: a special token that a text spells is text.
    """

    vocab_size: int
    ids: dict[str, int | None]

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        name: str = "tokenizer",
        literal: bool = False,
        beside: Beside = FILES_ALONE,
    ):
        self._files, self._name, self.literal, self._beside = dict(files), name, literal, beside
        self.config: dict[str, Any] = parse_json(files, "tokenizer_config.json", name)
        self._specials = read_specials(files, name)
        self._open()
        named = {key: token.content for key, token in self._specials.named.items()}
        self.ids = {role: self._id(named[f"{role}_token"]) if f"{role}_token" in named else None for role in ROLES}
        self.fingerprint: str = hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def end_id(self) -> int | None:
        """What ends a text: the class's eos, for BERT [SEP], else what the model's JSON files name; None: nothing."""
        own = (self.ids[role] for role in ("eos", "sep"))
        return next((i for i in own if i is not None), self._beside.end)

    @property
    def eos_id(self) -> int:
        """What ends a document: see `end_id`. UserError where there is none, or where text makes it."""
        role = next((role for role in ("eos", "sep") if self.ids[role] is not None), None)
        if role is None and self._beside.end is not None:
            return self._not_made_of_text("eos_token_id of config.json", self._beside.end)
        if role is None:
            there = ", ".join(repr(token) for token in self._special_tokens()[:9]) or "no special token"
            raise UserError(
                f"{self._name}: expected a token that ends a document, got a {class_of(self.config)} without eos and "
                f'sep, with {there}; name one in tokenizer_config.json beside it: {{"eos_token": "..."}}'
            )
        return self._never_text(role)

    @property
    def pad_id(self) -> int:
        """The class's padding, where it is neither what ends a document (Qwen 2) nor unknown text (some LLaMAs): a loss
        skips padding. Else NO_PAD (GPT-2, LLaMA)."""
        pad = self.ids["pad"]
        return NO_PAD if pad is None or pad in (self.ids["unk"], self.eos_id) else self._never_text("pad")

    def _never_text(self, role: str) -> int:
        i = self.ids[role]
        assert i is not None, role
        return self._not_made_of_text(f"{role}_token", i)

    def _not_made_of_text(self, what: str, i: int) -> int:
        if self.literal and i in self._made_of_text:
            raise UserError(
                f"{self._name}: expected {what} to be a token that no text makes, got {self._piece(i)!r}, which text "
                "that spells it makes; name another in tokenizer_config.json"
            )
        return i

    def _special_tokens(self) -> list[str]:
        return [t.content for _, t in sorted(self._tok.get_added_tokens_decoder().items()) if t.special]

    def _open(self) -> None:
        try:
            self._tok = tokenizers.Tokenizer.from_buffer(self._files["tokenizer.json"].removeprefix(BOM_UTF8))
        except Exception as e:
            raise UserError(
                f"{self._name}/tokenizer.json: expected a tokenizer of the tokenizers library, got something else "
                f"({e}); fetch the file again, or upgrade the library"
            ) from None
        self._tok.no_truncation()  # a tokenizer.json may bring both, and documents would be cut
        self._tok.no_padding()
        if self._beside.named_only:
            named = self._specials.within(lambda token: self._id(token) is not None)
            self._beside = self._beside._replace(named_only=named.named.keys() != self._specials.named.keys())
            self._specials = named
        add_specials(self._tok, self._specials, self._name)
        self._tok.encode_special_tokens = bool(self.config.get("split_special_tokens", False))
        self._made_of_text: set[int | None] = set()
        self._find_end()
        if self.literal:
            specials = self._special_tokens()
            read_as_text(self._tok, specials)
            self._made_of_text = {self._id(token) for token in spelt(self._tok, specials)}
        vocab = self._tok.get_vocab(with_added_tokens=True)
        check_ids(vocab, self._name)
        self.vocab_size = len(vocab)
        bpe = isinstance(self._tok.model, tokenizers.models.BPE)
        forced = self.config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        self._clean = bool(self.config.get("clean_up_tokenization_spaces", False)) and (forced or not bpe)
        self._target_end: int | None = None
        if class_of(self.config) == "MBartTokenizer":
            language = self.config.get("tgt_lang") or self.config.get("src_lang") or "en_XX"
            self._target_end = self._id(language)

    def _find_end(self) -> None:
        """Keeps the end that the model's files name where the tokenizer's own name none, and has it there. Documents
        do not have it inside, marked as special or not."""
        named, end = self._specials.named, self._beside.end
        token = None if end is None or {"eos_token", "sep_token"} & named.keys() else self._tok.id_to_token(end)
        if token is None:
            self._beside = self._beside._replace(end=None)
        elif self.literal:
            self._tok.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])

    def _id(self, token: str) -> int | None:
        return self._tok.token_to_id(token)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokenizer", literal: bool = False) -> HFTokenizer:
        """Makes any tokenizer of this module again from its `to_bytes`."""
        try:
            tree = json.loads(data)
            if tree["format"] != FORMAT:
                raise KeyError(tree["format"])
            files = {n: f["text"].encode() if "text" in f else base64.b64decode(f["base64"]) for n, f in tree["files"]}
            beside = Beside(**tree.get("beside", {}))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{name}: expected {FORMAT} as JSON, got {len(data)} other bytes ({e!r}); load the folder again"
            ) from None
        return open_files(files, name, literal, beside)

    def to_bytes(self) -> bytes:
        """JSON of every file, from which `from_bytes` makes the same tokenizer."""

        def entry(content: bytes) -> dict[str, str]:
            try:
                return {"text": content.decode()}
            except UnicodeDecodeError:
                return {"base64": base64.b64encode(content).decode()}

        files = [[name, entry(content)] for name, content in sorted(self._files.items())]
        # Only where it says something: the bytes of other tokenizers stay as they were.
        beside = {} if self._beside == FILES_ALONE else {"beside": self._beside._asdict()}
        return json.dumps({"format": FORMAT, "files": files} | beside, ensure_ascii=False).encode()

    def __reduce__(self):
        return HFTokenizer.from_bytes, (self.to_bytes(), self._name, self.literal)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that transformers' AutoTokenizer and `load_folder` read: the files this tokenizer came with,
        byte for byte, and the tokenizer.json and tokenizer_config.json that were missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str, *, pair: str | None = None, special: bool = False, target: bool = False) -> list[int]:
        """Encodes a text. special: with the class's wrapping, `[CLS] text [SEP] pair [SEP]`. target: as a decoder's
        text, which Marian and mBART write in another way. UserError for lone surrogates, which UTF-8 cannot hold."""
        return self.encode_typed(text, pair=pair, special=special, target=target).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False, target: bool = False) -> list[list[int]]:
        """Ids of each text, on the calling thread."""
        if special or target:
            return [self.encode(text, special=special, target=target) for text in texts]
        return [self._checked(text, self._ids) for text in texts]

    def encode_typed(
        self, text: str, *, pair: str | None = None, special: bool = False, target: bool = False
    ) -> Encoded:
        """Encodes as `encode` does, and says which of the two texts an id belongs to."""
        return self._checked(text + (pair or ""), lambda _: self._encode(text, pair, special, target))

    def _checked(self, text: str, encode: Callable[[str], T]) -> T:
        try:
            return encode(text)
        except (TypeError, RuntimeError):  # what the two libraries say of text without a UTF-8 form
            if bad := re.search("[\ud800-\udfff]", text):
                raise UserError(
                    f"text: expected Unicode, got lone surrogate {bad[0]!r} at {bad.start()}; replace it"
                ) from None
            raise

    def _ids(self, text: str) -> list[int]:
        # A batch of one runs on the calling thread. It keeps no offsets, which makes it a third faster than `encode`.
        return self._tok.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode(self, text: str, pair: str | None, special: bool, target: bool) -> Encoded:
        encoding = self._tok.encode(text, pair, add_special_tokens=special)
        ids = encoding.ids
        if special and target and self._target_end is not None:
            ids[-1] = self._target_end
        return Encoded(ids, encoding.type_ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD. Spaces before punctuation go where tokenizer_config.json says
        clean_up_tokenization_spaces, but never for BPE (transformers 5). UserError for an id outside the vocabulary."""
        flat = np.asarray(ids, np.int64).reshape(-1)
        if flat.size and not 0 <= flat.min() <= flat.max() < self.vocab_size:
            raise UserError(f"ids: expected 0 to {self.vocab_size - 1}, got {flat.min()} to {flat.max()}")
        text = self._decode(flat.tolist(), skip_special)
        for old, new in CLEAN_UP if self._clean else ():
            text = text.replace(old, new)
        return text

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tok.decode(ids, skip_special_tokens=skip_special)

    def decode_complete(self, ids: Sequence[int]) -> str:
        """Decodes as `decode` does, less a character whose last bytes are still to come."""
        return self.decode(ids).rstrip("\ufffd")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id, for display."""
        return [self._piece(int(i)) for i in ids]

    def _piece(self, i: int) -> str:
        piece = self._tok.id_to_token(i)
        assert piece is not None, i
        return piece

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of text that each id stands for; 0 for the special tokens.

        Exact for byte-level BPE. Exact for SentencePiece in the normalised text, to which many models add one space in
        front. Approximate for WordPiece, whose normaliser drops spaces, case and accents: bytes of the piece less `##`.
        """
        decoder = json.loads(self._files["tokenizer.json"]).get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        kinds = {step.get("type") for step in steps}
        if not kinds <= COUNTED:
            raise UserError(
                f"{self._name}: expected a byte-level, SentencePiece or WordPiece decoder, got {decoder.get('type')}; "
                "bits per byte cannot be counted with this tokenizer"
            )
        spaced = "Metaspace" in kinds or {"String": SPACE} in [step.get("pattern") for step in steps]
        prefix = getattr(self._tok.model, "continuing_subword_prefix", None) if "WordPiece" in kinds else None
        added = self._tok.get_added_tokens_decoder()

        def size(i: int) -> int:
            if i in added:
                return 0 if added[i].special else len(added[i].content.encode())
            piece = self._piece(i)
            if "ByteLevel" in kinds and BYTE_CHARS.issuperset(piece):
                return len(piece)
            if "ByteFallback" in kinds and BYTE_PIECE.fullmatch(piece):
                return 1
            piece = piece.removeprefix(prefix or "")
            return len((piece.replace(SPACE, " ") if spaced else piece).encode())

        return np.array([size(i) for i in range(self.vocab_size)], np.int32)


class MarianTokenizer(HFTokenizer):
    """Two SentencePiece models, of the source and the target language, over one vocab.json. Pieces map by name."""

    def _open(self) -> None:
        if self.config.get("separate_vocabs", False):
            raise UserError(f"{self._name}: expected one vocabulary, got separate_vocabs; use a model that shares it")
        self._beside = FILES_ALONE  # the class needs all of its tokens
        self._vocab: dict[str, int] = parse_json(self._files, "vocab.json", self._name)
        self._tokens = {i: token for token, i in self._vocab.items()}
        self._special = {t.content for t in (*self._specials.named.values(), *self._specials.extra)}
        added = self._special | {t.content for t in self._specials.placed.values()}
        check_ids(self._vocab, f"{self._name}/vocab.json")
        if absent := sorted(added - self._vocab.keys()):
            raise UserError(f"{self._name}/vocab.json: expected {absent[0]!r} in it, got no such token; fetch it again")
        # Added tokens are found in a text before SentencePiece sees it, the longest first.
        found = sorted(added - self._special if self.literal else added, key=len, reverse=True)
        self._split = re.compile("(" + ("|".join(map(re.escape, found)) or "(?!)") + ")")
        self._made_of_text = set()
        self._source, self._target = (self._model(file) for file in ("source.spm", "target.spm"))
        self.vocab_size = len(self._vocab)
        self._clean = bool(self.config.get("clean_up_tokenization_spaces", False))

    def _model(self, file: str) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self._files[file])
        except RuntimeError as e:
            raise UserError(f"{self._name}/{file}: expected a SentencePiece model, got other bytes ({e})") from None

    def _id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def _special_tokens(self) -> list[str]:
        return sorted(self._special)

    def _ids(self, text: str) -> list[int]:
        return self._encode(text, None, False, False).ids

    def _encode(self, text: str, pair: str | None, special: bool, target: bool) -> Encoded:
        unk = self._vocab[self._specials.named["unk_token"].content]
        model = self._target if target else self._source
        first, second = ([self._vocab.get(p, unk) for p in self._pieces(model, one)] for one in (text, pair or ""))
        end = [self._vocab[self._specials.named["eos_token"].content]] if special else []
        ids = first + second + end
        return Encoded(ids, [0] * len(ids))  # Marian has no types

    def _pieces(self, model: sentencepiece.SentencePieceProcessor, text: str) -> Iterator[str]:
        for i, part in enumerate(self._split.split(text)):
            if i % 2:  # what the expression found stands between the rest
                yield part
                continue
            end = part.find("<<") + 2
            if part.startswith(">>") and end > 1 and not self.literal:  # the language to translate into, one token
                yield part[:end]
                part = part[end:]
            yield from model.encode(part, out_type=str)

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        out, run = "", []
        for token in map(self._tokens.__getitem__, ids):
            if token not in self._special:
                run.append(token)
            elif not skip_special:
                out, run = f"{out}{self._target.decode_pieces(run)}{token} ", []
        return (out + self._target.decode_pieces(run)).replace(SPACE, " ").strip()

    def _piece(self, i: int) -> str:
        return self._tokens[i]

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of the normalised text that each id stands for; 0 for the special tokens."""
        tokens = map(self._piece, range(self.vocab_size))
        return np.array([0 if t in self._special else len(t.replace(SPACE, " ").encode()) for t in tokens], np.int32)


def open_files(
    files: Mapping[str, bytes], name: str = "tokenizer", literal: bool = False, beside: Beside = FILES_ALONE
) -> HFTokenizer:
    """The tokenizer of a complete set of files, by what they are called."""
    marian = "tokenizer.json" not in files and "source.spm" in files
    return (MarianTokenizer if marian else HFTokenizer)(files, name=name, literal=literal, beside=beside)
