"""Our own tokenizer: a lossless SentencePiece, its training included.

`decode(encode(text)) == text` for every text that UTF-8 can hold, and `token_bytes()[encode(text)].sum()` is its length
in bytes, so losses turn into bits per byte. There is no begin-of-sequence token: one `eos` ends a document and opens
the next.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from lm.data.tokenizer.base import EOS_ID, PAD_ID, SPACE, UNK_ID
from lm.errors import UserError

# SentencePiece refuses to learn a piece that is spelt like a special one, and drops sentences with NUL.
UNLEARNABLE = re.compile(r"<0x[0-9A-F]{2}>|<pad>|</s>|<unk>|[\0" + SPACE + "]")
SENTENCE_CHARS = 1000  # SentencePiece skips sentences above 4192 bytes; 1000 characters are at most 4000
# What a lossy model loses: spaces at the ends, controls, bytes of no piece, its own mark, a special's name.
PROBE = "  a b\n\n\t\0é" + SPACE + "\U0001f600</s> "
THREADS = 2  # the sums of EM depend on the thread count, so it is part of the recipe and not of the machine


@dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """How to train a tokenizer.

    train_bytes: size of the sample of the corpus to learn from. On Python source, unigram: 1 MB gives 3.38 bytes/token
        at 8192 pieces (3.13 at 4096), 2 MB 3.43 (3.17), 4 MB 3.47 (3.22) in about 10 CPU seconds. BPE learns 10x as
        fast and encodes at a fifth of the speed.
    """

    kind: Literal["unigram", "bpe"] = "unigram"
    vocab_size: int = 8192
    train_bytes: int = 4_000_000

    def __post_init__(self):
        if self.kind not in ("unigram", "bpe"):
            raise UserError(f"tokenizer.kind: expected 'unigram' or 'bpe', got {self.kind!r}")
        if not 260 < self.vocab_size <= 2**31 - 1:
            raise UserError(
                f"tokenizer.vocab_size: expected more than 260 (256 bytes, 3 specials, newline), got {self.vocab_size}"
            )
        if self.train_bytes < 1:
            raise UserError(f"tokenizer.train_bytes: expected at least 1, got {self.train_bytes}")

    def train(self, texts: Iterable[str]) -> SentencePieceTokenizer:
        """Learns from `texts` (all of it: sampling is the caller's). The same texts give the same bytes."""
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=out,
                model_type=self.kind,
                vocab_size=self.vocab_size,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,  # none: the eos of a document opens the next
                byte_fallback=True,  # this and the next three make it lossless
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,  # indentation is one piece: code needs 1.5x fewer tokens
                user_defined_symbols=["\n"],  # sentences end there: it would never be learnt
                num_threads=THREADS,
                minloglevel=2,
            )
        except RuntimeError as e:
            reason = str(e).replace("\n", " ").strip()
            raise UserError(
                f"tokenizer.vocab_size: cannot learn {self.vocab_size} {self.kind} pieces from this corpus ({reason}); "
                "set another vocab_size or give it more text"
            ) from None
        return SentencePieceTokenizer.from_bytes(out.getvalue())


def _sentences(texts):
    for text in texts:
        for line in UNLEARNABLE.sub("", text).split("\n"):
            for at in range(0, len(line), SENTENCE_CHARS):
                yield line[at : at + SENTENCE_CHARS]


class SentencePieceTokenizer:
    """A trained SentencePiece model. Ids: pad 0, eos 1, unk 2 (never made), newline, the 256 bytes, then pieces."""

    pad_id, eos_id, unk_id = PAD_ID, EOS_ID, UNK_ID

    def __init__(self, model: bytes, *, name: str = "tokenizer"):
        self._model = model
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise UserError(f"{name}: expected a SentencePiece model, got {len(model)} other bytes ({e})") from None
        ids = (sp.pad_id(), sp.eos_id(), sp.unk_id())
        if ids != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(
                f"{name}: expected pad, eos, unk ids (0, 1, 2), got {ids}; train one with lm.data.SentencePiece, or "
                "name the folder of the model that it belongs to"
            )
        self.vocab_size: int = sp.get_piece_size()
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self._bytes = [self._original(i) for i in range(self.vocab_size)]
        self._space = [sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                f"{name}: expected a lossless model (byte_fallback, identity normalisation, no dummy prefix), got one "
                f"that turns {PROBE!r} into {self.decode(self.encode(PROBE))!r}; train one with lm.data.SentencePiece"
            )

    @classmethod
    def load(cls, path: str | Path) -> SentencePieceTokenizer:
        """Reads a `.model` file. UserError when it is missing, no SentencePiece model, or not lossless."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: expected a SentencePiece .model file, got nothing there; run `lm prepare` first")
        return cls(path.read_bytes(), name=str(path))

    @classmethod
    def from_bytes(cls, model: bytes) -> SentencePieceTokenizer:
        return cls(model)

    def to_bytes(self) -> bytes:
        return self._model

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Encodes a text; no eos is added. UserError for lone surrogates, which UTF-8 cannot hold."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on the calling thread."""
        try:
            if not any(SPACE in text for text in texts):
                return self._sp.encode(list(texts), num_threads=1)  # workers are processes already
            return [self._encode_around_space(text) for text in texts]
        except TypeError:  # SentencePiece's name for text without a UTF-8 form
            for text in texts:
                if bad := re.search("[\ud800-\udfff]", text):
                    raise UserError(
                        f"text: expected Unicode, got lone surrogate {bad[0]!r} at {bad.start()}; replace it"
                    ) from None
            raise

    def _encode_around_space(self, text: str) -> list[int]:
        first, *rest = self._sp.encode(text.split(SPACE), num_threads=1)
        return first + [i for ids in rest for i in self._space + ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Specials are silent; bytes that are no UTF-8 become U+FFFD. UserError for an id outside the vocabulary."""
        return self._join(ids).decode("utf-8", errors="replace")

    def decode_complete(self, ids: Sequence[int]) -> str:
        """Decodes as `decode` does, less a character whose last bytes are still to come: what a stream may show so far.
        The answer for a prefix of `ids` is a prefix of the answer for `ids`."""
        return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(self._join(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """SentencePiece's own spelling of each id, for display."""
        return [self._sp.id_to_piece(int(i)) for i in ids]

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of original text that each id stands for; 0 for the specials."""
        return np.array([len(b) for b in self._bytes], np.int32)

    def _original(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return b""
        if self._sp.is_byte(i):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    def _join(self, ids: Sequence[int]) -> bytes:
        flat = np.asarray(ids, np.int64).reshape(-1)
        if flat.size and not 0 <= flat.min() <= flat.max() < self.vocab_size:
            raise UserError(f"ids: expected 0 to {self.vocab_size - 1}, got {flat.min()} to {flat.max()}")
        return b"".join(map(self._bytes.__getitem__, flat.tolist()))
