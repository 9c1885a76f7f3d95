from __future__ import annotations

import numpy as np
import pytest

from lm.errors import UserError
from lm.objectives import MaskedLM
from tests.objectives.test_masked_lm import CLS, EOS, IDS, NEWLINE, PAD, SEP, S, restored, text


def sentence_starts(tokens: list[int], last: int) -> tuple[list[int], list[int]]:
    """Places, 1 to `last`, where a sentence begins within a document; and all that are within one."""
    n = len(tokens)
    within = [c for c in range(1, min(n - 1, last) + 1) if EOS not in (tokens[c - 1], tokens[c])]
    return [c for c in within if tokens[c - 1] == NEWLINE], within


def nearest(tokens: list[int], last: int, twice: int) -> int:
    for places in sentence_starts(tokens, last):
        if places:
            return min(places, key=lambda c: abs(2 * c - twice))
    return min(max(twice // 2, 1), max(last, 1))


def nsp_row(tokens: list[int], other: list[int], seq_len: int, random: bool) -> tuple[list[int], list[int]]:
    own = [t for t in tokens if t != PAD]
    other = [t for t in other if t != PAD]
    n = min(len(own), seq_len - 3)
    c = min(nearest(own[:n], n - 1, n), n)
    b = nearest(other, len(other) - (n - c), 2 * c)
    second = other[b : b + n - c] if random else own[c:n]
    out, types = [CLS, *own[:c], SEP, *second, SEP], [0] * (c + 2) + [1] * (n - c + 1)
    padding = [0] * (seq_len - len(out))
    return out + padding, types + padding


def nsp_text(n, newlines=0.08):
    rows = text(n, newlines=newlines)
    return rows | {"other": text(n, seed=1, newlines=newlines)["tokens"]}


def test_a_next_sentence_follows_within_a_document_or_begins_one_elsewhere():
    rows = nsp_text(400)
    rows["tokens"][1, 12:] = PAD
    rows["tokens"][2, 1:] = PAD
    rows["tokens"][3] = PAD
    rows["other"][4] = PAD
    rows["other"][5, 1:] = PAD
    rows["tokens"][6] = rows["other"][6] = 20  # no boundary
    objective = MaskedLM(**IDS, pair="nsp")
    batch = objective.examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(400, S).items()
    }
    for i, back in enumerate(restored(batch)):
        expected, kinds = nsp_row(rows["tokens"][i].tolist(), rows["other"][i].tolist(), S, batch["pair"][i] == 1)
        if i != 3:
            assert back.tolist() == expected and batch["token_types"][i].tolist() == kinds, i
    assert batch["pair"].tolist()[2:4] == [-1, -1] and set(batch["pair"].tolist()[4:6]) <= {-1, 0}
    assert abs(batch["pair"][6:].mean() - 0.5) < 4 * 0.5 / np.sqrt(394)


def test_neither_length_nor_beginning_tells_a_random_sentence_from_a_real_one():
    rows = nsp_text(3000)
    batch = MaskedLM(**IDS, pair="nsp").examples(rows)
    tokens, label = restored(batch), batch["pair"]
    second = batch["token_types"].sum(axis=1)
    first_of_second = tokens[np.arange(3000), (tokens == SEP).argmax(axis=1) + 1]
    assert (first_of_second != EOS).all() and (tokens != PAD).all()
    of = [second[label == k] for k in (0, 1)]
    assert abs(of[0].mean() - of[1].mean()) < 4 * second.std() * np.sqrt(1 / len(of[0]) + 1 / len(of[1]))


def test_the_next_sentence_needs_rows_from_elsewhere():
    objective = MaskedLM(**IDS, pair="nsp")
    assert objective.extra_rows == 1 and objective.tasks == MaskedLM(**IDS, pair="sop").tasks
    with pytest.raises(UserError, match="objective.pair: 'nsp' expected rows from elsewhere .* extra_rows"):
        objective.examples(text())
