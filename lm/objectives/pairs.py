"""Rows of two parts, [CLS] A [SEP] B [SEP], and the question whether they stand as they were written."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.objectives import noise

NO_PAIR = -1  # label of a row that is too short to have two parts


class Pairs(NamedTuple):
    """Makes rows of two parts, with these ids. Both methods take rows of the store [n,S+1] and a random bit of each,
    bool [n], and give tokens [n,S], with "token_types" [n,S] and "pair" [n], the bit or NO_PAIR."""

    cls_id: int
    sep_id: int
    newline_id: int
    end_id: int  # of a document
    pad_id: int

    def order(self, tokens: np.ndarray, swap: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Text cut after the newline or end of a document nearest its middle, its parts swapped where `swap` says."""
        text = tokens[:, : tokens.shape[1] - 4]  # S + 1 tokens less the first of the next row and three specials
        length = self._lengths(text)
        cut = np.arange(1, text.shape[1] + 1)
        # Cut c leaves text[:c] and text[c:]; both must have something in them.
        real = ((text == self.newline_id) | (text == self.end_id)) & (cut < length)
        c = _nearest(real, length, length // 2)
        has_pair = length >= 2
        swapped = swap[:, None] & has_pair
        first = np.where(swapped, length - c, c)
        a = np.where(swapped, c, 0) + np.arange(text.shape[1])
        b = np.where(swapped, 0, c) + np.arange(text.shape[1])
        return self._joined(_taken(text, a), first, _taken(text, b), length, swapped, has_pair)

    def next(
        self, tokens: np.ndarray, other: np.ndarray, random: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Text cut after the newline nearest its middle (within a document, so that the second part does follow), the
        second part as it is or as many tokens of `other` [n,S+1]. Those begin after the newline of the other row that
        is nearest the cut, so that neither a length nor a beginning tells the two apart. Where there is no newline,
        both begin anywhere but at the end of a document."""
        text = tokens[:, : tokens.shape[1] - 4]
        length = self._lengths(text)
        c = np.minimum(self._sentence(tokens, length, length, length - 1), length)
        n_second = length - c
        b = self._sentence(other, self._lengths(other), 2 * c, self._lengths(other) - n_second)
        has_other = self._lengths(other) - n_second >= 1
        has_pair = (length >= 2) & (has_other | ~random[:, None])
        replaced = random[:, None] & has_pair
        place = np.arange(text.shape[1])
        second = np.where(replaced, _taken(other, b + place), _taken(text, c + place))
        return self._joined(text, c, second, length, replaced, has_pair)

    def _sentence(self, tokens: np.ndarray, length: np.ndarray, twice: np.ndarray, last: np.ndarray) -> np.ndarray:
        """[n,1]: where a sentence begins within a document, from 1 to `last`, nearest to half of `twice`; a token that
        is no document's end where none does."""
        place = np.arange(1, tokens.shape[1])
        within = (tokens[:, :-1] != self.end_id) & (tokens[:, 1:] != self.end_id) & (place < length) & (place <= last)
        anywhere = _nearest(within, twice, np.clip(twice // 2, 1, np.maximum(last, 1)))
        return _nearest(within & (tokens[:, :-1] == self.newline_id), twice, anywhere)

    def _lengths(self, tokens: np.ndarray) -> np.ndarray:
        """The lengths of rows, [n,1], without the padding at the end."""
        length = np.empty((len(tokens), 1), np.int64)
        for own, which in noise.by_length(tokens, self.pad_id):
            length[which] = own
        return length

    def _joined(self, a, n_first, b, length, label, has_pair) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Joins a[:n_first] and b[: length - n_first] of each row, with what goes around and with them."""
        slot = np.arange(a.shape[1] + 3)
        second = slot > n_first + 1
        out = np.where(second, _taken(b, slot - n_first - 2), _taken(a, slot - 1 + np.zeros_like(length)))
        out[:, 0] = self.cls_id
        np.put_along_axis(out, n_first + 1, self.sep_id, axis=1)
        np.put_along_axis(out, length + 2, self.sep_id, axis=1)
        out[slot > length + 2] = self.pad_id
        types = (second & (slot <= length + 2)).astype(np.int32)
        return out, {"token_types": types, "pair": np.where(has_pair, label, NO_PAIR)[:, 0].astype(np.int32)}


def _nearest(real: np.ndarray, twice: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """[n,1]: the place c = column + 1 where `real` [n,w], the nearest to half of `twice` [n,1]; `otherwise` if none."""
    cut = np.arange(1, real.shape[1] + 1)
    # Doubled, so that a middle between two tokens is an integer.
    off = np.where(real, np.abs(2 * cut - twice), np.iinfo(np.int64).max)
    best = off.argmin(axis=1)[:, None]
    return np.where(np.take_along_axis(real, best, axis=1), best + 1, otherwise)


def _taken(tokens: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.take_along_axis(tokens, np.clip(at, 0, tokens.shape[1] - 1), axis=1)
