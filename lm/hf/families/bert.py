"""BERT on disk, and the fields and rows that RoBERTa and ALBERT share with it."""

from __future__ import annotations

import re
from typing import Any

from lm.hf.families.family import Family
from lm.hf.families.fields import ACTIVATION_NAMES, Fields
from lm.hf.families.table import Alias, Map
from lm.models import (
    Bert,
    Body,
    LanguageModeling,
    MaskedLMAndPair,
    QuestionAnswering,
    SequenceClassification,
    Task,
    TokenClassification,
)

EMBED, DECODER, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder", "cls.predictions.bias"


def common(f: Fields, task: Task, *, dropout: float = 0.1, pad_id: int = 0) -> dict[str, Any]:
    """What all three read; dropout, pad_id: the family's defaults."""
    f.expect("is_decoder", False, None, why="this family is supported as an encoder")
    f.expect("add_cross_attention", False, None, why="this family is supported as an encoder")
    f.expect("position_embedding_type", "absolute", None, why="relative positions are not supported")
    return {
        "max_positions": f.take("max_position_embeddings", default=512),
        "n_types": f.take("type_vocab_size", default=2),
        "norm_eps": f.take("layer_norm_eps", default=1e-12),
        "dropout": f.take("hidden_dropout_prob", default=dropout),
        "attention_dropout": f.take("attention_probs_dropout_prob", default=dropout),
        "init_std": f.take("initializer_range", default=0.02),
        "pad_id": f.given("pad_token_id", default=pad_id),
        "task": task,
    }


def base_sizes(f: Fields) -> dict[str, Any]:
    """What BERT and RoBERTa alike have by default."""
    return {
        "d_model": f.take("hidden_size", default=768),
        "n_layers": f.take("num_hidden_layers", default=12),
        "n_heads": f.take("num_attention_heads", default=12),
        "d_ff": f.take("intermediate_size", default=3072),
        "activation": f.activation("hidden_act", default="gelu"),
        "classifier_dropout": f.take("classifier_dropout", default=None, kind=float),
    }


def common_fields(m: Bert) -> dict[str, Any]:
    """The inverse of both, but for classifier_dropout."""
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "intermediate_size": m.d_ff or 4 * m.d_model,
        "hidden_act": ACTIVATION_NAMES[m.activation],
        "max_position_embeddings": m.max_positions,
        "type_vocab_size": m.n_types,
        "layer_norm_eps": m.norm_eps,
        "hidden_dropout_prob": m.dropout,
        "attention_probs_dropout_prob": m.weights_dropout,
        "initializer_range": m.init_std,
        "tie_word_embeddings": m.tied,
        **({} if m.pad_id is None else {"pad_token_id": m.pad_id}),
    }


def embeddings(at: str) -> list[Map]:
    """The rows of the embeddings, whose names begin with `at`, as `bert.embeddings.`"""
    return [
        Map("embed.table", f"{at}word_embeddings.weight"),
        Map("positions.table", f"{at}position_embeddings.weight"),
        Map("types.table", f"{at}token_type_embeddings.weight"),
        *norm("norm", f"{at}LayerNorm"),
    ]


def layers(at: str) -> list[Map]:
    """The rows of a layer, whose names begin with `at`, as `bert.encoder.layer.{}.`"""
    rows = []
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += [
            Map(f"layers.attn.{ours}", f"{at}attention.self.{theirs}.weight", "(h k) d -> d h k"),
            Map(f"layers.attn.{ours}_bias", f"{at}attention.self.{theirs}.bias", "(h k) -> h k"),
        ]
    return [
        *rows,
        Map("layers.attn.o", f"{at}attention.output.dense.weight", "d (h k) -> h k d"),
        Map("layers.attn.o_bias", f"{at}attention.output.dense.bias"),
        *norm("layers.norm1", f"{at}attention.output.LayerNorm"),
        Map("layers.mlp.up", f"{at}intermediate.dense.weight", "f d -> d f"),
        Map("layers.mlp.up_bias", f"{at}intermediate.dense.bias"),
        Map("layers.mlp.down", f"{at}output.dense.weight", "d f -> f d"),
        Map("layers.mlp.down_bias", f"{at}output.dense.bias"),
        *norm("layers.norm2", f"{at}output.LayerNorm"),
    ]


def norm(ours: str, theirs: str) -> list[Map]:
    return [Map(f"{ours}.scale", f"{theirs}.weight"), Map(f"{ours}.bias", f"{theirs}.bias")]


def linear(ours: str, theirs: str) -> list[Map]:
    return [Map(f"{ours}.kernel", f"{theirs}.weight", "n d -> d n"), Map(f"{ours}.bias", f"{theirs}.bias")]


def word_head(m: Bert, dense: str, layer_norm: str, decoder: str, bias: str) -> list[Map]:
    """Tied, the head has `bias` and what the decoder has is another name; else it reads the decoder's own alone."""
    rows = linear("head.transform.dense", dense) + norm("head.transform.norm", layer_norm)
    if m.tied:
        return [*rows, Map("head.bias", bias)]
    return [*rows, Map("head.table", f"{decoder}.weight"), Map("head.bias", f"{decoder}.bias")]


def word_aliases(m: Bert, embed: str, decoder: str, bias: str) -> list[Alias]:
    tied = m.tied and isinstance(m.task, (LanguageModeling, MaskedLMAndPair))
    return [Alias(f"{decoder}.weight", embed), Alias(f"{decoder}.bias", bias)] if tied else []


def word_unused(m: Bert, bias: str) -> dict[str, tuple[int, ...]]:
    """An untied head leaves its second bias unread."""
    return {} if m.tied or not isinstance(m.task, (LanguageModeling, MaskedLMAndPair)) else {bias: (m.vocab_size,)}


def has_pooler(m: Bert) -> bool:
    return isinstance(m.task, (MaskedLMAndPair, SequenceClassification)) or m.task == Body(pooler=True)


def modern(name: str, prefix: str, parts: str = "embeddings|encoder|pooler") -> str:
    """Today's name of a tensor: TensorFlow's names of a norm's parameters and files of a base model are older."""
    name = re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(LayerNorm)\.beta$", r"\1.bias", name))
    return f"{prefix}.{name}" if re.match(rf"({parts})\.", name) else name


def read(f: Fields, task: Task) -> Bert:
    # Of the first release's own code, never read by transformers.
    f.ignore("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
    f.ignore("pooler_size_per_head", "pooler_type")
    wide = f.config.get("hidden_size", 768)
    f.expect("embedding_size", wide, None, why="an embedding of another width is ALBERT's or ELECTRA's")
    return Bert(
        **common(f, task),
        **base_sizes(f),
        vocab_size=f.take("vocab_size", default=30522),
        tied=f.tied(f"{DECODER}.weight", EMBED, default=True),
    )


def write(m: Bert) -> dict[str, Any]:
    return common_fields(m) | {"classifier_dropout": m.classifier_dropout}


def table(m: Bert) -> list[Map]:
    rows = embeddings("bert.embeddings.") + layers("bert.encoder.layer.{}.")
    if has_pooler(m):
        rows += linear("pooler.dense", "bert.pooler.dense")
    match m.task:
        case LanguageModeling() | MaskedLMAndPair():
            rows += word_head(
                m, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", DECODER, BIAS
            )
            rows += linear("pair.out", "cls.seq_relationship") if isinstance(m.task, MaskedLMAndPair) else []
        case SequenceClassification() | TokenClassification():
            rows += linear("labeler.out", "classifier")
        case QuestionAnswering():
            rows += linear("labeler.out", "qa_outputs")
    return rows


def spare(m: Bert) -> list[str]:
    """Names tensors to leave out: published files are of the class for pre-training, while their config.json names that
    for masked words; and files of earlier releases have the pooler in every class."""
    parts = [] if has_pooler(m) else ["bert.pooler.dense"]
    parts += ["cls.seq_relationship"] if isinstance(m.task, LanguageModeling) else []
    return [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


BERT_FAMILY = Family(
    model_types=("bert",),
    classes={
        "BertModel": "Model",
        "BertForPreTraining": "ForPreTraining",
        "BertForMaskedLM": "ForMaskedLM",
        "BertForSequenceClassification": "ForSequenceClassification",
        "BertForTokenClassification": "ForTokenClassification",
        "BertForQuestionAnswering": "ForQuestionAnswering",
    },
    read=read,
    write=write,
    table=table,
    aliases=lambda m: word_aliases(m, EMBED, DECODER, BIAS),
    rename=lambda name: modern(name, "bert"),
    ignore=(r"bert\.embeddings\.position_ids",),
    unused=lambda m: word_unused(m, BIAS),
    spare=spare,
    prefix="bert.",
)
