"""Configs and layouts of Marian, BART, mBART and T5 on disk: both spellings, what is tied, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from lm.errors import UserError
from lm.hf.families.bart import BART_FAMILY, MBART_FAMILY
from lm.hf.families.family import Family
from lm.hf.families.fields import Fields
from lm.hf.families.marian import MARIAN_FAMILY
from lm.hf.families.t5 import T5_FAMILY
from lm.hf.families.table import layout
from lm.models import (
    T5,
    Bart,
    LanguageModeling,
    MBart,
    Model,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    Transformer,
)
from lm.models.base import abstract
from lm.nn.param import paths

SIZES = dict(vocab_size=53, d_model=12, n_layers=3, n_encoder_layers=2, n_heads=3, d_ff=17)
SIDES = dict(**SIZES, n_encoder_heads=2, encoder_d_ff=19, pad_id=7)
T5_SIZES = dict(**SIZES, head_dim=5, relative_buckets=8, relative_max_distance=20)
LABELS, TOKENS = SequenceClassification(n_labels=5), TokenClassification(n_labels=5)
MODELS: list[tuple[Family, Model]] = [
    (MARIAN_FAMILY, Transformer(**SIDES, activation="silu", logits_bias=True)),
    (MARIAN_FAMILY, Transformer(**SIDES, target_vocab_size=47, tied=False)),
    (MARIAN_FAMILY, Transformer(**SIDES, target_vocab_size=47)),
    *(
        (BART_FAMILY, Bart(**SIDES, max_positions=13, task=task))
        for task in (LanguageModeling(), LABELS, QuestionAnswering())
    ),
    (BART_FAMILY, Bart(**SIDES, max_positions=13, activation_dropout=0.25, attention_dropout=0.125)),
    (BART_FAMILY, Bart(**SIDES, target_vocab_size=53, tied=False)),
    *(
        (MBART_FAMILY, MBart(**SIDES, max_positions=13, task=task))
        for task in (LanguageModeling(), LABELS, QuestionAnswering())
    ),
    *((T5_FAMILY, T5(**T5_SIZES, task=task)) for task in (LanguageModeling(), LABELS, TOKENS, QuestionAnswering())),
    (T5_FAMILY, T5(**T5_SIZES, gated=True, activation="gelu_tanh", tied=False, scale_output=False)),
    (T5_FAMILY, T5(**T5_SIZES, gated=True, activation="gelu", scale_output=False)),
    (T5_FAMILY, T5(**T5_SIZES, gated=True, activation="silu", tied=False)),
    (T5_FAMILY, T5(**T5_SIZES, activation="gelu_tanh")),
]
HEAD, SHARED = "lm_head.weight", "shared.weight"
ONE, OTHER = np.ones((53, 12), np.float32), np.zeros((53, 12), np.float32)


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in paths(abstract(model).params).items()}


def stored_of(family: Family, model: Model) -> dict[str, np.ndarray]:
    """Random tensors under the names of a folder."""
    rng = np.random.default_rng(0)
    slots = layout(family.table(model), shapes_of(model))
    shapes = {name: slot.shape for name, slot in slots.items()} | dict(family.unused(model))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def read(family: Family, config: dict, stored=None, task=LanguageModeling()) -> Model:  # noqa: B008, frozen
    fields = Fields({"model_type": family.model_types[0], **config}, "config.json", stored or {})
    model = family.read(fields, task)
    fields.done()
    return model


@pytest.mark.parametrize("family, model", MODELS)
def test_a_config_that_is_written_reads_as_the_same_model(family, model):
    assert read(family, family.write(model), stored_of(family, model), model.task) == model


@pytest.mark.parametrize("family, model", MODELS)
def test_tensors_go_to_parameters_and_back(family, model):
    stored, shapes = stored_of(family, model), shapes_of(model)
    slots = layout(family.table(model), shapes)
    flat = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for name, slot in slots.items():
        for path, part in slot.to_ours(stored[name], shapes).items():
            flat[path][slot.index] = part
    assert not any(np.isnan(x).any() for x in flat.values())
    for name, slot in slots.items():
        back = slot.to_theirs({path: flat[path][slot.index] for path in slot.row.paths})
        np.testing.assert_array_equal(back, stored[name], err_msg=name)


@pytest.mark.hf
@pytest.mark.parametrize(
    "family, name",
    [
        (T5_FAMILY, "T5Config"),
        (BART_FAMILY, "BartConfig"),
        (MBART_FAMILY, "MBartConfig"),
        (MARIAN_FAMILY, "MarianConfig"),
    ],
)
def test_defaults_are_those_of_the_config_class_and_all_its_fields_are_known(family, name):
    config = getattr(pytest.importorskip("transformers"), name)().to_dict()
    assert read(family, config) == read(family, {})


def test_older_spelling_of_t5_1_1():
    old = dict(d_model=12, feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_layers=2, n_positions=512)
    model = read(T5_FAMILY, old, {SHARED: ONE, HEAD: OTHER})
    assert (model.gated, model.activation, model.tied, model.scale_output) == (True, "gelu_tanh", False, False)
    assert (model.n_layers, model.n_encoder_layers) == (2, 2)
    new = old | dict(tie_word_embeddings=True, scale_decoder_outputs=False, num_decoder_layers=2)
    assert read(T5_FAMILY, new, {SHARED: ONE, HEAD: OTHER}) == model


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("stored, tied", [({}, True), ({HEAD: ONE}, True), ({HEAD: OTHER}, False)])
def test_a_t5_is_tied_unless_a_head_is_stored_that_differs(stated, stored, tied):
    model = read(T5_FAMILY, {"tie_word_embeddings": stated}, {SHARED: ONE, **stored})
    assert (model.tied, model.scale_output) == (tied, stated)


@pytest.mark.parametrize(
    "proj, expected",
    [
        ("relu", (False, "relu")),
        ("gelu", (False, "gelu")),
        ("gated-gelu", (True, "gelu_tanh")),
        ("gated-silu", (True, "silu")),
        ("gated-relu", (True, "relu")),
    ],
)
def test_feed_forward_proj_of_t5(proj, expected):
    model = read(T5_FAMILY, {"feed_forward_proj": proj})
    assert (model.gated, model.activation) == expected


def test_the_bias_of_logits_is_there_where_it_is_stored():
    assert read(BART_FAMILY, {}, {"final_logits_bias": ONE[:1]}).logits_bias
    assert not read(BART_FAMILY, {}).logits_bias


def test_an_untied_bart_has_a_table_on_each_side_where_they_are_stored():
    names = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    untied = {"tie_word_embeddings": False, "vocab_size": 53}
    assert read(BART_FAMILY, untied, dict.fromkeys(names, ONE)).target_vocab_size == 53
    assert read(BART_FAMILY, untied, {"model.shared.weight": ONE}).target_vocab_size is None
    assert read(BART_FAMILY, {"vocab_size": 53}, dict.fromkeys(names, ONE)).target_vocab_size is None


def test_marian_with_one_vocabulary_does_not_read_the_size_of_a_second():
    assert read(MARIAN_FAMILY, {"vocab_size": 53, "decoder_vocab_size": 53}).target_vocab_size is None
    apart = {"vocab_size": 53, "share_encoder_decoder_embeddings": False}
    assert read(MARIAN_FAMILY, apart).target_vocab_size == 53
    assert read(MARIAN_FAMILY, apart | {"decoder_vocab_size": 47}).target_vocab_size == 47


@pytest.mark.parametrize(
    "family, name",
    [
        (T5_FAMILY, "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
        (T5_FAMILY, "transformer.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
        (MARIAN_FAMILY, "model.decoder.embed_positions.weight"),
        (BART_FAMILY, "encoder.version"),
        (MBART_FAMILY, "model.decoder.version"),
    ],
)
def test_leftovers_of_old_files_are_ignored(family, name):
    assert any(re.fullmatch(pattern, family.rename(name)) for pattern in family.ignore)
    for _, model in MODELS:
        if type(model) is type(next(m for f, m in MODELS if f is family)):
            names = layout(family.table(model), shapes_of(model))
            assert not any(re.fullmatch(pattern, n) for pattern in family.ignore for n in names)


@pytest.mark.parametrize("family, model", MODELS)
def test_names_of_today_are_left_and_those_of_the_bare_model_get_its_prefix(family, model):
    for name in layout(family.table(model), shapes_of(model)):
        assert family.rename(name) == name
        if family is not T5_FAMILY and name.startswith("model."):
            assert family.rename(name.removeprefix("model.")) == name


@pytest.mark.parametrize("family, model", MODELS)
def test_tied_copies_are_of_tensors_that_are_there(family, model):
    names = layout(family.table(model), shapes_of(model))
    for alias in family.aliases(model):
        assert alias.of in names and alias.theirs not in names


@pytest.mark.parametrize(
    "family, config, message",
    [
        (T5_FAMILY, {"feed_forward_proj": "gated-gelu-new"}, "feed_forward_proj: expected an activation or gated-"),
        (T5_FAMILY, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj: expected one of .*, got 'mish'"),
        (T5_FAMILY, {"d_ffn": 9}, "unknown field 'd_ffn'.*did you mean 'd_ff'"),
        (BART_FAMILY, {"encoder_layerdrop": 0.1}, "encoder_layerdrop: expected 0 .*, got 0.1; .*set it to 0"),
        (BART_FAMILY, {"static_position_embeddings": True}, "positions of this family are learned"),
        (MBART_FAMILY, {"extra_pos_embeddings": 0}, "extra_pos_embeddings: expected 2, got 0"),
        (MARIAN_FAMILY, {"static_position_embeddings": False}, "Marian's positions are computed"),
        (MARIAN_FAMILY, {"activation_function": "mish"}, "activation_function: expected one of"),
    ],
)
def test_fields_that_would_compute_something_else_are_refused(family, config, message):
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        read(family, config)


def test_a_change_of_any_field_of_ours_is_written():
    """No field is lost on the way to disk but those that say how a model runs."""
    free = {"compute", "task", "vocab_size", "logits_bias", "target_vocab_size", "tied"}
    for family, model in (
        (T5_FAMILY, T5(**T5_SIZES)),
        (BART_FAMILY, Bart(**SIDES)),
        (MARIAN_FAMILY, Transformer(**SIDES)),
    ):
        written = family.write(model)
        for field in dataclasses.fields(model):
            value = getattr(model, field.name)
            if field.name in (free | {"attention_dropout", "pad_id"} if family is T5_FAMILY else free):
                continue
            change = {bool: lambda v: not v, int: lambda v: v * 2, float: lambda v: v / 2 + 0.03, str: lambda v: "tanh"}
            value = 0.0 if value is None else value
            changed = dataclasses.replace(model, **{field.name: change[type(value)](value)})
            assert family.write(changed) != written, field.name
