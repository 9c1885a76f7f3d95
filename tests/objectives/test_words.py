from __future__ import annotations

import re

import numpy as np
import pytest

from lm.data import SentencePiece
from lm.errors import UserError
from lm.objectives import MaskedLM
from lm.objectives.words import words_of
from tests.objectives.test_masked_lm import CLS, EOS, IDS, PAD, SEP, V, restored, text


class Pieces:
    """A tokenizer by its pieces, `▁` for a space."""

    def __init__(self, pieces):
        self.spelt, self.vocab_size = pieces, len(pieces)

    def pieces(self, ids):
        return [self.spelt[i] for i in ids]

    def decode(self, ids):
        return "".join(self.spelt[i] for i in ids).replace("▁", " ").replace("<pad>", "").replace("</s>", "")


# pad, eos, then what opens words (4 to 10), goes on with them (11 to 30), and stands alone (31 to 46).
SPELT = ["<pad>", "</s>", "?", "\n", *(f"▁w{i}" for i in range(7)), *(f"x{i}" for i in range(20)), *".,;:!()[]{}+-*/="]
TOKENIZER = Pieces(SPELT)


def word_numbers(tokens: list[int]) -> list[int]:
    """Which word each token is of, -1 for specials."""
    out, n = [], -1
    for p, t in enumerate(tokens):
        if t in (PAD, EOS, CLS, SEP):
            out.append(-1)
            continue
        goes_on = SPELT[t][0] == "x" and p > 0 and out[-1] >= 0 and SPELT[tokens[p - 1]][-1].isalnum()
        n += not goes_on
        out.append(n)
    return out


@pytest.mark.parametrize("changes", [{}, {"span": 3}, {"pair": "sop"}, {"rate": 0.5}, {"rate": 0.02}])
def test_words_are_masked_whole_and_as_many_as_fit(changes):
    assert len(SPELT) == V
    objective, rows = MaskedLM(**IDS | {"whole_word": True} | changes), text(200, newlines=0.05)
    rows["tokens"][0, 9:] = PAD
    rows["tokens"][1] = 12  # one word
    batch = objective.examples_for(TOKENIZER)(rows)
    n_words = 0
    for tokens, at, weights in zip(restored(batch).tolist(), batch["positions"], batch["weights"]):
        assert (np.diff(weights) <= 0).all()
        words = word_numbers(tokens)
        chosen = at[weights > 0].tolist()
        assert (np.diff(chosen) > 0).all()
        n_text = sum(w >= 0 for w in words)
        most = max(int(np.floor(objective.rate * n_text + 0.5)), 1)
        picked = {words[p] for p in chosen}
        sizes = {w: words.count(w) for w in picked}
        if len(picked) == 1 and sizes[min(picked)] > most:
            assert len(chosen) == most
            continue
        assert sorted(p for p, w in enumerate(words) if w in picked) == chosen
        assert len(chosen) <= most < len(chosen) + max(words.count(w) for w in range(max(words) + 1))
        n_words += len(picked)
    assert n_words > 100


def test_every_word_is_chosen_about_equally_often_whatever_its_place():
    rows = text(3000, 44)
    rows["tokens"][:, ::2], rows["tokens"][:, 1::2] = 5, 12  # words of two tokens
    batch = MaskedLM(**IDS, whole_word=True).examples_for(TOKENIZER)(rows)
    assert (batch["weights"].sum(axis=1) == 6).all()
    hits = np.bincount(batch["positions"][batch["weights"] > 0], minlength=44)[1:43] / 3000
    p = 6 / 42
    assert np.abs(hits - p).max() < 5 * np.sqrt(p * (1 - p) / 3000)


def test_without_whole_words_examples_are_what_they_were():
    objective = MaskedLM(**IDS)
    assert objective.examples_for(TOKENIZER) == objective.examples and objective.extra_rows == 0


def test_words_begin_where_those_of_a_trained_tokenizer_do():
    samples = [f"def f{i}(x_{i}):\n    return x_{i} + größe, don't naïve 東京 {i * 37}\n" for i in range(60)]
    tokenizer = SentencePiece(kind="bpe", vocab_size=330).train(samples)
    table = words_of(tokenizer)
    for sample in samples[:20]:
        ids = np.array([tokenizer.encode(sample)])
        starts = table.starts(ids, np.ones(ids.shape, bool))[0]
        for n, start in enumerate(starts):
            now = tokenizer.decode(ids[0, :n])
            if "\ufffd" not in now + tokenizer.decode(ids[0, : n + 1]) and n:
                after = sample[len(now)]
                assert start == (not re.fullmatch(r"\w\w", now[-1] + after)), (now[-5:], after)


def test_words_of_a_word_piece_are_a_piece_and_those_that_go_on_with_it():
    pieces = ["<pad>", "</s>", "un", "##aff", "##able", "cat", "-", "##s"]
    table = words_of(Pieces(pieces))
    row = ["un", "##aff", "##able", "cat", "##s", "-", "cat", "</s>", "##s", "un", "<pad>"]
    tokens = np.array([[pieces.index(p) for p in row] + [len(pieces)]])  # the last is a mask
    starts = table.starts(tokens, tokens < len(pieces))[0]
    assert starts.tolist() == [True, False, False, True, False, True, True, True, True, True, True, True]


def test_a_tokenizer_without_spaces_in_its_pieces_and_a_missing_table_are_refused():
    with pytest.raises(UserError, match="objective.whole_word: expected a tokenizer whose pieces spell the space"):
        MaskedLM(**IDS, whole_word=True).examples_for(Pieces(["<pad>", "</s>", "the", "##", "cat"]))
    with pytest.raises(UserError, match=r"objective.whole_word: .* take objective.examples_for\(tokenizer\)"):
        MaskedLM(**IDS, whole_word=True).examples(text())
