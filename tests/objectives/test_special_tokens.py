"""An objective says of every id among its fields what kind of token it is, and what is declared is checked."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from lm import config
from lm.data import SentencePiece
from lm.data.inspect.preview import names_of_ids
from lm.errors import UserError
from lm.objectives import CausalLM, MaskedLM, Objective, Seq2Seq, SpanCorruption
from lm.training.start import check_tokenizer
from tests.data.conftest import sample_texts
from tests.objectives.test_matrix import OBJECTIVES

V = 420


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tagged(CausalLM):
    """Has an id of its own and says nothing about it."""

    tag_id: int


def subclasses(cls):
    return {cls, *(deeper for one in cls.__subclasses__() for deeper in subclasses(one))}


def test_every_objective_is_among_those_that_are_checked_here():
    ours = {cls for cls in subclasses(Objective) if cls.__module__.startswith("lm.")}
    assert ours - {Objective} == {type(o) for o in OBJECTIVES.values()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_id_among_the_fields_is_declared_once(name):
    objective = OBJECTIVES[name]
    declared = {token.name: token for token in objective.special_tokens()}
    assert len(declared) == len(objective.special_tokens())
    assert set(declared) == {f.name for f in dataclasses.fields(objective) if f.name.endswith("_id")}
    assert all(getattr(objective, name) in token.ids for name, token in declared.items())
    assert set(objective.token_kinds) <= set(declared)  # none is misspelt
    named = {i for token in declared.values() for i in token.ids}
    assert set(names_of_ids(objective)) == named


def test_the_kinds_are_those_that_the_papers_give_them():
    kinds = lambda o: {token.name: token.kind for token in o.special_tokens()}
    own = {"start_id": "tokenizer", "pad_id": "tokenizer"}
    assert kinds(CausalLM()) == own
    assert kinds(OBJECTIVES["masked"]) == own | dict.fromkeys(("mask_id", "cls_id", "sep_id"), "no_text") | {
        "newline_id": "any"
    }
    assert kinds(OBJECTIVES["pairs"]) == own | {"separator_id": "any", "decoder_start_id": "any"}
    assert kinds(OBJECTIVES["ul2"]) == own | dict.fromkeys(("first_sentinel_id", "r_id", "s_id", "x_id"), "no_text")


def test_sentinels_count_down_from_the_first():
    (token,) = (t for t in SpanCorruption(first_sentinel_id=31, n_sentinels=4).special_tokens() if t.numbered)
    assert token.ids == range(28, 32)
    assert token.labels() == {31: "extra_id_0", 30: "extra_id_1", 29: "extra_id_2", 28: "extra_id_3"}


def checked(objective):
    """The tiny recipe's config with another objective and a tokenizer that is learnt."""
    recipe = config.load("gpt3_tiny")
    tokenizer = SentencePiece(vocab_size=V)
    data = dataclasses.replace(recipe.data, tokenizer=tokenizer)
    model = dataclasses.replace(recipe.model, vocab_size=V + 8)
    config.check(dataclasses.replace(recipe, data=data, model=model, objective=objective))


def test_an_id_that_its_objective_says_nothing_of_is_compared_before_the_tokenizer_is_learnt():
    checked(Tagged(tag_id=V + 7))
    with pytest.raises(UserError, match=f"objective.tag_id: expected an id below model.vocab_size {V + 8}, got"):
        checked(Tagged(tag_id=V + 8))
    with pytest.raises(UserError, match=f"objective.tag_id: expected ids .* never makes of text, {V} and more, got 9"):
        checked(Tagged(tag_id=9))


def test_an_id_that_its_objective_says_nothing_of_is_compared_with_the_tokenizer_that_is_there():
    tokenizer = SentencePiece(kind="bpe", vocab_size=V).train(sample_texts(200))
    check = lambda o: check_tokenizer(SimpleNamespace(objective=o, model=SimpleNamespace(vocab_size=V + 8)), tokenizer)
    check(Tagged(tag_id=V))
    check(Tagged(tag_id=2))  # unk, which no text makes
    check(Seq2Seq(max_source=8, max_target=8, separator_id=3))
    for objective, name, i in (
        (Tagged(tag_id=9), "tag_id", 9),
        (MaskedLM(mask_id=V, cls_id=V + 1, sep_id=300, vocab_size=V), "sep_id", 300),
        (SpanCorruption(first_sentinel_id=V + 1, n_sentinels=3), "first_sentinel_id", V - 1),
    ):
        with pytest.raises(UserError, match=f"objective.{name}: expected an id that .* never makes of text, got {i},"):
            check(objective)
    with pytest.raises(UserError, match="objective.start_id: the tokenizer says 1, got 5; set it to 1"):
        check(CausalLM(start_id=5))
