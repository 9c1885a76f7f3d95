"""What a tokenizer is to the rest. Our own is `lm.data.tokenizer.sentencepiece`; those of other projects are
`lm.data.tokenizer.huggingface`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # of our own
NO_PAD = -1  # pads the rows of a tokenizer that has no padding token: no store holds it and no model can draw it
SPACE = "▁"  # U+2581, how SentencePiece writes a space; a real U+2581 in a text travels as its three bytes


class Tokenizer(Protocol):
    """Text to ids and back. `fingerprint` is the sha256 of `to_bytes`, from which `lm.data.tokenizer.slow` makes it
    again.

    eos_id: what ends a document in a store. No document has it inside.
    pad_id: what fills rows. It is never made of text; NO_PAD where the tokenizer has no such token.
    """

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text and nothing around them, on the calling thread. UserError for lone surrogates."""

    def decode(self, ids: Sequence[int]) -> str:
        """Specials are silent; bytes that are no UTF-8 become U+FFFD. UserError for an id outside the vocabulary."""

    def decode_complete(self, ids: Sequence[int]) -> str:
        """Decodes as `decode` does, less a character whose last bytes are still to come."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id, for display."""

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of text that each id stands for; 0 for the specials. Of a lossless tokenizer they add up to
        the text's length in UTF-8. Of another they count the text as it is after what the tokenizer changes (case,
        spaces, Unicode forms), and so do the bits per byte of a model."""

    def to_bytes(self) -> bytes: ...
