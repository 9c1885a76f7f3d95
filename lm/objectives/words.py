"""Where words begin, by the spelling of a tokenizer's pieces: for the masking of whole words."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lm.errors import UserError

GOES_ON = "##"  # how WordPiece spells that a piece goes on with the one before it
SPACES = ("▁", "Ġ")  # how SentencePiece and byte-level BPE spell a space at the front of a piece


class Spelling(Protocol):
    """What is asked of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self, ids: Sequence[int]) -> list[str]: ...


class WordBoundaries(NamedTuple):
    """Says of each id, bool [V], whether its first and its last character are of a word. A token goes on with the word
    of the one before it when that ends and it begins within one: so words are runs of letters, digits and `_`, and
    every other token stands alone, as BERT's pre-tokenizer has it."""

    begins: np.ndarray
    ends: np.ndarray

    def starts(self, tokens: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """tokens int [n,S], eligible bool [n,S] (what is text) -> bool [n,S]: False where a token goes on with the
        word before it. Ids that the table does not have are of no word."""
        last = len(self.begins) - 1
        known = eligible & (tokens <= last)
        at = np.where(known, tokens, 0)
        begins, ends = self.begins[at] & known, self.ends[at] & known
        starts = np.ones(tokens.shape, bool)
        starts[:, 1:] = ~(begins[:, 1:] & ends[:, :-1])
        return starts


def words_of(tokenizer: Spelling) -> WordBoundaries:
    """The table of a tokenizer whose pieces spell their spaces, or of a WordPiece: there a word is a piece and those
    with ## that follow it, as in the whole word masking of BERT. UserError for another, whose `the cat` would be one
    word here."""
    begins = np.zeros(tokenizer.vocab_size, bool)
    ends = np.zeros_like(begins)
    spaced = False
    goes_on, pieces = np.zeros_like(begins), tokenizer.pieces(range(tokenizer.vocab_size))
    for i, piece in enumerate(pieces):
        text = tokenizer.decode([i])
        opens = piece.startswith(SPACES) or text[:1].isspace()
        spaced |= opens and len(piece) > 1  # a piece that is a space alone says nothing of words
        goes_on[i] = len(piece) > len(GOES_ON) and piece.startswith(GOES_ON)
        if text:
            begins[i], ends[i] = not opens and _of_word(text[0]), _of_word(text[-1])
    if not spaced and goes_on.any():
        return WordBoundaries(goes_on, np.array([bool(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)]))
    if not spaced:
        raise UserError(
            f"objective.whole_word: expected a tokenizer whose pieces spell the space before a word, or the ## inside "
            f"of one, got none among {tokenizer.vocab_size}; set whole_word=False, or span for n-grams"
        )
    return WordBoundaries(begins, ends)


def _of_word(character: str) -> bool:
    """Says whether a character is of a word: U+FFFD is a part of one, and marks belong to the letter before them."""
    return character.isalnum() or character in "_\ufffd" or unicodedata.category(character).startswith("M")


def whole(places: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """places int64 [n,P] as `noise.choose` gives them, S where there is none, without those of a word that is not all
    there (`starts` [n,S] are where words begin), unless nothing else is there."""
    n, length = starts.shape
    word = np.cumsum(starts, axis=1) - 1 + np.arange(n)[:, None] * length
    word = np.hstack([word, np.full((n, 1), n * length)])  # of places that are not there
    size = np.bincount(word.reshape(-1))
    of_place = np.take_along_axis(word, places, axis=1)
    whole = np.bincount(of_place.reshape(-1), minlength=len(size))[of_place] == size[of_place]
    whole |= ~(whole & (places < length)).any(axis=1, keepdims=True)
    return np.sort(np.where(whole, places, length), axis=1)
