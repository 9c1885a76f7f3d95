"""FLOPs follow from where each parameter declares to be used."""

from __future__ import annotations

import collections
import dataclasses
import math

import pytest

from lm.models import (
    GPT2,
    T5,
    Bart,
    Bert,
    Electra,
    GeneratorSize,
    MaskedLMAndPair,
    Roberta,
    SequenceClassification,
    TokenClassification,
)
from lm.models.base import abstract
from lm.models.cost import Row, flops_per_token
from lm.nn.param import paths

WIDTHS = {"vocab_size": 53, "d_model": 12, "n_layers": 2, "n_heads": 2}
S = 13
ROW = Row(length=S, predicted=5, memory=11)
LABELS = SequenceClassification(n_labels=3)
CLASSIFIERS = {
    "gpt2": (GPT2(**WIDTHS, task=LABELS), ("head.",)),
    "bert": (Bert(**WIDTHS, task=LABELS), ("labeler.", "pooler.")),
    "roberta": (Roberta(**WIDTHS, pad_id=1, task=LABELS), ("labeler.",)),
    "t5": (T5(**WIDTHS, task=LABELS), ("labeler.",)),
    "bart": (Bart(**WIDTHS, task=LABELS), ("labeler.",)),
}


def used(model) -> dict[str, set[str]]:
    """Where -> the paths of the parameters that are used there."""
    found = collections.defaultdict(set)
    for path, info in paths(abstract(model).infos).items():
        found[info.used].add(path)
    return found


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_for_labels_of_a_sequence_counts_once_a_row(name):
    model, prefixes = CLASSIFIERS[name]
    infos = abstract(model).infos
    heads = {path: math.prod(i.shape) for path, i in paths(infos).items() if path.startswith(prefixes)}
    assert heads and used(model)["row"] == heads.keys()
    wider = dataclasses.replace(model, task=SequenceClassification(n_labels=4))
    a, b = (flops_per_token(m, abstract(m).infos, S, ROW).full * S for m in (model, wider))
    bias = name != "gpt2"  # whose score of a sequence is bare
    assert b - a == pytest.approx(6 * (12 + bias), rel=1e-6)


def test_a_table_that_is_only_looked_up_counts_never_and_a_tied_one_as_the_head():
    for tied in (True, False):
        found = used(GPT2(**WIDTHS, tied=tied))
        assert found["target"] == {"embed.table" if tied else "head.table"}
        assert found["lookup"] == {"positions.table"} | (set() if tied else {"embed.table"})
    labels = used(GPT2(**WIDTHS, task=TokenClassification(n_labels=3)))
    assert "embed.table" in labels["lookup"] and not labels["target"]


def test_an_encoder_and_what_a_decoder_reads_of_it_count_at_its_places():
    found = used(Bart(**WIDTHS))
    cross = {f"decoder.layers.cross.{name}" for name in ("k", "v", "k_bias", "v_bias")}
    assert cross == {path for path in found["memory"] if not path.startswith("encoder.")}
    assert {path for path in found["lookup"] if path.startswith("encoder.")} == {"encoder.positions.table"}
    keys = {path: i.keys for path, i in paths(abstract(Bart(**WIDTHS)).infos).items() if i.keys}
    assert keys == {
        "encoder.layers.attn.q": "memory", "decoder.layers.attn.q": "token", "decoder.layers.cross.q": "memory"
    }  # fmt: skip


def test_a_masked_word_head_counts_where_words_are_masked_with_what_stands_before_it():
    found = used(Bert(**WIDTHS, task=MaskedLMAndPair()))
    assert found["target"] == {"embed.table", *(p for p in paths(abstract(Bert(**WIDTHS)).infos) if p[:5] == "head.")}
    assert {path.partition(".")[0] for path in found["row"]} == {"pooler", "pair"}
    electra = used(Electra(**WIDTHS, d_embed=10, generator=GeneratorSize(d_model=6, n_heads=2)))
    assert {path.rpartition(".head.")[0] for path in electra["target"]} == {"", "generator"}
    assert "embed.table" in electra["target"] and "detector.dense.kernel" in electra["token"]
