"""BERT, RoBERTa and ALBERT on disk: names, older spellings, and fields that are refused. The numbers are compared with
transformers elsewhere."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.hf.face.model import load
from lm.hf.families.albert import ALBERT_FAMILY
from lm.hf.families.bert import BERT_FAMILY
from lm.hf.families.family import TASKS, Family
from lm.hf.families.fields import Fields
from lm.hf.families.roberta import ROBERTA_FAMILY
from lm.hf.families.table import check, layout
from lm.models import (
    Albert,
    Bert,
    LanguageModeling,
    MaskedLMAndPair,
    Model,
    QuestionAnswering,
    Roberta,
    SequenceClassification,
    Task,
    TokenClassification,
)
from lm.models.base import abstract
from lm.models.tasks import Labels
from lm.nn.param import paths

SIZES = {"vocab_size": 53, "d_model": 21, "n_layers": 2, "n_heads": 3, "d_ff": 31, "max_positions": 19}
RATES = {"dropout": 0.1, "attention_dropout": 0.3}
MODELS: list[tuple[Family, Model]] = [
    (
        BERT_FAMILY,
        Bert(**SIZES, pad_id=0, activation="relu", norm_eps=1e-2, classifier_dropout=0.2, tied=False, **RATES),
    ),
    (ROBERTA_FAMILY, Roberta(**SIZES, pad_id=3, n_types=2, init_std=0.3, **RATES)),
    (ALBERT_FAMILY, Albert(**SIZES, pad_id=0, d_embed=11, n_groups=2, inner_layers=3, classifier_dropout=0.4, **RATES)),
]
NAMES = [family.model_types[0] for family, _ in MODELS]
FAMILIES = pytest.mark.parametrize("family, model", MODELS, ids=NAMES)


def fields(config, stored=None) -> Fields:
    return Fields(config, "config.json", stored or {})


def tensors(family: Family, model: Model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a folder holds."""
    shapes = {path: tuple(p.shape) for path, p in paths(abstract(model).params).items()}
    return {name: slot.shape for name, slot in layout(family.table(model), shapes).items()}


def task(ending: str) -> Task:
    kind = TASKS[ending]
    return kind(n_labels=5) if issubclass(kind, Labels) else kind()


@FAMILIES
def test_what_is_written_is_read_back(family, model):
    for ending in family.classes.values():
        before = dataclasses.replace(model, task=task(ending))
        f = fields(family.write(before))
        assert family.read(f, before.task) == before
        f.done()


@FAMILIES
def test_every_task_has_a_row_for_each_parameter(family, model):
    heads = {}
    for ending in family.classes.values():
        names = tensors(family, dataclasses.replace(model, task=task(ending))).keys()
        heads[ending] = {name for name in names if not name.startswith(f"{family.model_types[0]}.")}
    assert not heads.pop("Model") and all(heads.values())  # a body is all of the others' and no more
    assert heads["ForQuestionAnswering"] == {"qa_outputs.weight", "qa_outputs.bias"}


@pytest.mark.hf
@pytest.mark.parametrize(
    "family, name", [(BERT_FAMILY, "Bert"), (ROBERTA_FAMILY, "Roberta"), (ALBERT_FAMILY, "Albert")]
)
def test_fields_that_are_not_there_have_the_defaults_of_transformers(family, name):
    transformers = pytest.importorskip("transformers")
    full = fields(getattr(transformers, f"{name}Config")().to_dict())
    assert family.read(fields({}), LanguageModeling()) == family.read(full, LanguageModeling())
    full.done()


@pytest.mark.parametrize(
    "family, config",
    [
        (
            BERT_FAMILY,
            {
                "attention_probs_dropout_prob": 0.1,
                "directionality": "bidi",
                "gradient_checkpointing": False,
                "pooler_fc_size": 768,
                "pooler_num_attention_heads": 12,
                "pooler_num_fc_layers": 3,
                "pooler_size_per_head": 128,
                "pooler_type": "first_token_transform",
                "position_embedding_type": "absolute",
                "torch_dtype": "float32",
                "use_cache": True,
            },
        ),
        (
            ALBERT_FAMILY,
            {
                "down_scale_factor": 1,
                "gap_size": 0,
                "layers_to_keep": [],
                "net_structure_type": 0,
                "num_memory_blocks": 0,
            },
        ),
    ],
    ids=["bert", "albert"],
)
def test_fields_of_the_first_releases_are_read_over(family, config):
    f = fields(config)
    assert family.read(f, LanguageModeling()) == family.read(fields({}), LanguageModeling())
    f.done()


@FAMILIES
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("is_decoder", True, r"config.json: is_decoder: expected False or None, got True; .* as an encoder"),
        ("add_cross_attention", True, r"config.json: add_cross_attention: expected False or None, got True"),
        ("position_embedding_type", "relative_key", r"position_embedding_type: expected 'absolute' .*'relative_key'"),
        ("hidden_act", "quick_gelu", r"config.json: hidden_act: expected one of .*, got 'quick_gelu'"),
        ("rotary_value", True, r"config.json: unknown field 'rotary_value' = True"),
    ],
)
def test_a_field_that_changes_the_numbers_is_refused(family, model, field, value, message):
    f = fields(family.write(model) | {field: value})
    with pytest.raises(UserError, match=message):
        family.read(f, LanguageModeling())
        f.done()


def test_albert_stores_a_layer_under_its_group_and_its_place_in_it():
    rng = np.random.default_rng(0)
    family, model = MODELS[2]
    shapes = {path: tuple(p.shape) for path, p in paths(abstract(model).params).items()}
    slots = layout(family.table(model), shapes)
    ours = {"layers.attn.q": rng.normal(size=shapes["layers.attn.q"])}
    for group, inner in ((0, 0), (0, 2), (1, 0), (1, 2)):
        name = f"albert.encoder.albert_layer_groups.{group}.albert_layers.{inner}.attention.query.weight"
        q = ours["layers.attn.q"][group * 3 + inner]
        stored = slots[name].to_theirs({"layers.attn.q": ours["layers.attn.q"][slots[name].index]})
        np.testing.assert_array_equal(stored, q.reshape(21, 21).T)


@pytest.mark.parametrize("family, model", MODELS, ids=NAMES)
@pytest.mark.parametrize("parts", ["embeddings", "encoder", "pooler"])
def test_older_spellings_are_read_as_todays(family, model, parts):
    kind = family.model_types[0]
    for ending, today in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        assert family.rename(f"{parts}.x.{ending}") == f"{kind}.{parts}.x.{today}"
        assert family.rename(f"{kind}.{parts}.x.{ending}") == f"{kind}.{parts}.x.{today}"
    for task_ in (LanguageModeling(), SequenceClassification(n_labels=5)):
        for name in tensors(family, dataclasses.replace(model, task=task_)):
            assert family.rename(name) == name


HEADS = {
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder", "cls.predictions.bias"),
    "roberta": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder", "lm_head.bias"),
    "albert": ("albert.embeddings.word_embeddings.weight", "predictions.decoder", "predictions.bias"),
}


@FAMILIES
def test_a_tied_head_has_the_bias_and_an_untied_one_the_decoder(family, model):
    embed, decoder, bias = HEADS[family.model_types[0]]
    tied, own = (dataclasses.replace(model, tied=tied) for tied in (True, False))
    assert tensors(family, own).keys() - tensors(family, tied).keys() == {f"{decoder}.weight", f"{decoder}.bias"}
    assert tensors(family, tied).keys() - tensors(family, own).keys() == {bias}
    assert {(a.theirs, a.of) for a in family.aliases(tied)} == {(f"{decoder}.weight", embed), (f"{decoder}.bias", bias)}
    assert family.unused(own) == {bias: (53,)} and not family.unused(tied)
    for other in (TokenClassification(n_labels=5), QuestionAnswering()):
        model = dataclasses.replace(own, task=other)
        assert not family.aliases(model) and not family.unused(model)


@FAMILIES
def test_a_decoder_that_differs_from_the_embedding_is_a_head_of_its_own(family, model):
    embed, decoder, _ = HEADS[family.model_types[0]]
    config = family.write(dataclasses.replace(model, tied=True))
    table = np.arange(6.0).reshape(3, 2)
    same, other = ({embed: table, f"{decoder}.weight": table + i} for i in (0, 1))
    assert family.read(fields(config, same), LanguageModeling()).tied
    assert not family.read(fields(config, other), LanguageModeling()).tied


@pytest.mark.parametrize("family, model", [MODELS[0], MODELS[2]], ids=["bert", "albert"])
def test_files_of_pretraining_serve_the_class_for_masked_words(family, model):
    """As the published ones: their config.json names the one, their tensors are of the other."""
    stored = tensors(family, dataclasses.replace(model, task=MaskedLMAndPair()))
    words = dataclasses.replace(model, task=LanguageModeling())
    assert stored.keys() - tensors(family, words).keys() == set(family.spare(words))
    assert not family.spare(dataclasses.replace(model, task=MaskedLMAndPair()))
    assert set(family.spare(dataclasses.replace(model, task=QuestionAnswering()))) < set(family.spare(words))


def test_a_folder_in_the_oldest_spelling_computes_the_same(tmp_path):
    """No prefix, TensorFlow's names of norms, the positions' buffer, tied tensors twice, the heads of pre-training."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    rng = np.random.default_rng(0)
    family, model = MODELS[0]
    model = dataclasses.replace(model, tied=True)
    full = tensors(family, dataclasses.replace(model, task=MaskedLMAndPair()))
    today = {name: rng.normal(size=shape).astype(np.float32) for name, shape in full.items()}

    def older(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return name.removeprefix("bert.")

    embed, decoder, bias = HEADS["bert"]
    old = {older(name): x for name, x in today.items()}
    old |= {f"{decoder}.weight": today[embed].copy(), f"{decoder}.bias": today[bias].copy()}
    old["embeddings.position_ids"] = np.arange(19)[None]
    words = {name: x for name, x in today.items() if name in tensors(family, model)}
    config = family.write(model) | {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    logits = []
    for name, stored in (("old", old), ("today", words)):
        (tmp_path / name).mkdir()
        save_file(stored, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        logits.append(load(tmp_path / name)(input_ids=np.arange(7)[None])["logits"])
    np.testing.assert_array_equal(*logits)

    old[f"{decoder}.bias"][0] += 1
    save_file(old, tmp_path / "old" / "model.safetensors")
    with pytest.raises(UserError, match=r"cls.predictions.decoder.bias: expected the values of cls.predictions.bias"):
        load(tmp_path / "old")


def test_a_head_that_is_missing_is_named():
    family, model = MODELS[0]
    shapes = {path: tuple(p.shape) for path, p in paths(abstract(model).params).items()}
    slots = layout(family.table(model), shapes)
    stored = {name: slot.shape for name, slot in slots.items() if not name.startswith("cls.")}
    with pytest.raises(UserError, match=r"x: cls.predictions.decoder.bias: missing, .*without the head"):
        check(stored, slots, (), "x")


def test_roberta_counts_positions_over_the_ids_that_are_no_padding():
    model = MODELS[1][1]
    ids = np.array([[3, 3, 9, 8, 7], [9, 3, 8, 7, 3]])
    mask = np.ones_like(ids)  # plays no part
    positions = ROBERTA_FAMILY.positions(jnp.asarray(ids), jnp.asarray(mask), model)
    np.testing.assert_array_equal(positions, [[-1, -1, 0, 1, 2], [0, -1, 1, 2, -1]])
    np.testing.assert_array_equal(ROBERTA_FAMILY.given_positions(np.array([3, 4, 5]), model), [-1, 0, 1])
