"""ALBERT on disk: a layer is stored once for all that share it, under the number of its group."""

from __future__ import annotations

import itertools
from typing import Any

from lm.hf.families.bert import (
    common,
    common_fields,
    embeddings,
    has_pooler,
    linear,
    modern,
    word_aliases,
    word_head,
    word_unused,
)
from lm.hf.families.family import Family
from lm.hf.families.fields import Fields
from lm.hf.families.table import Map
from lm.models import (
    Albert,
    LanguageModeling,
    MaskedLMAndPair,
    QuestionAnswering,
    SequenceClassification,
    Task,
    TokenClassification,
)

EMBED, DECODER, BIAS = "albert.embeddings.word_embeddings.weight", "predictions.decoder", "predictions.bias"


def read(f: Fields, task: Task) -> Albert:
    # Of the first release's own code, never read by transformers.
    f.ignore("down_scale_factor", "gap_size", "layers_to_keep", "net_structure_type", "num_memory_blocks")
    return Albert(
        **common(f, task, dropout=0.0),
        vocab_size=f.take("vocab_size", default=30000),
        d_embed=f.take("embedding_size", default=128),
        d_model=f.take("hidden_size", default=4096),
        n_layers=f.take("num_hidden_layers", default=12),
        n_groups=f.take("num_hidden_groups", default=1),
        inner_layers=f.take("inner_group_num", default=1),
        n_heads=f.take("num_attention_heads", default=64),
        d_ff=f.take("intermediate_size", default=16384),
        activation=f.activation("hidden_act", default="gelu_new"),
        classifier_dropout=f.take("classifier_dropout_prob", default=0.1),
        tied=f.tied(f"{DECODER}.weight", EMBED, default=True),
    )


def write(m: Albert) -> dict[str, Any]:
    return common_fields(m) | {
        "embedding_size": m.d_embed,
        "num_hidden_groups": m.n_groups,
        "inner_group_num": m.inner_layers,
        "classifier_dropout_prob": m.label_dropout,
    }


def layers(m: Albert) -> list[Map]:
    at = tuple(itertools.product(range(m.n_groups), range(m.inner_layers)))
    layer = "albert.encoder.albert_layer_groups.{}.albert_layers.{}."
    rows = []
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += [
            Map(f"layers.attn.{ours}", f"{layer}attention.{theirs}.weight", "(h k) d -> d h k", at),
            Map(f"layers.attn.{ours}_bias", f"{layer}attention.{theirs}.bias", "(h k) -> h k", at),
        ]
    rows += [
        Map("layers.attn.o", f"{layer}attention.dense.weight", "d (h k) -> h k d", at),
        Map("layers.attn.o_bias", f"{layer}attention.dense.bias", at=at),
        Map("layers.mlp.up", f"{layer}ffn.weight", "f d -> d f", at),
        Map("layers.mlp.up_bias", f"{layer}ffn.bias", at=at),
        Map("layers.mlp.down", f"{layer}ffn_output.weight", "d f -> f d", at),
        Map("layers.mlp.down_bias", f"{layer}ffn_output.bias", at=at),
    ]
    for ours, theirs in (("norm1", "attention.LayerNorm"), ("norm2", "full_layer_layer_norm")):
        rows += [
            Map(f"layers.{ours}.scale", f"{layer}{theirs}.weight", at=at),
            Map(f"layers.{ours}.bias", f"{layer}{theirs}.bias", at=at),
        ]
    return rows


def table(m: Albert) -> list[Map]:
    rows = embeddings("albert.embeddings.") + linear("project", "albert.encoder.embedding_hidden_mapping_in")
    rows += layers(m)
    if has_pooler(m):
        rows += linear("pooler.dense", "albert.pooler")
    match m.task:
        case LanguageModeling() | MaskedLMAndPair():
            rows += word_head(m, "predictions.dense", "predictions.LayerNorm", DECODER, BIAS)
            rows += linear("pair.out", "sop_classifier.classifier") if isinstance(m.task, MaskedLMAndPair) else []
        case SequenceClassification() | TokenClassification():
            rows += linear("labeler.out", "classifier")
        case QuestionAnswering():
            rows += linear("labeler.out", "qa_outputs")
    return rows


def spare(m: Albert) -> list[str]:
    """Names tensors to leave out: published files are of the class for pre-training, while their config.json names that
    for masked words; and files of earlier releases have the pooler in every class."""
    parts = [] if has_pooler(m) else ["albert.pooler"]
    parts += ["sop_classifier.classifier"] if isinstance(m.task, LanguageModeling) else []
    return [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


ALBERT_FAMILY = Family(
    model_types=("albert",),
    classes={
        "AlbertModel": "Model",
        "AlbertForPreTraining": "ForPreTraining",
        "AlbertForMaskedLM": "ForMaskedLM",
        "AlbertForSequenceClassification": "ForSequenceClassification",
        "AlbertForTokenClassification": "ForTokenClassification",
        "AlbertForQuestionAnswering": "ForQuestionAnswering",
    },
    read=read,
    write=write,
    table=table,
    aliases=lambda m: word_aliases(m, EMBED, DECODER, BIAS),
    rename=lambda name: modern(name, "albert"),
    ignore=(r"albert\.embeddings\.position_ids",),
    unused=lambda m: word_unused(m, BIAS),
    spare=spare,
    prefix="albert.",
)
