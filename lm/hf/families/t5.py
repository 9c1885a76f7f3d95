"""T5 on disk, 1.0 and 1.1. The relative positions of a side are stored in its first layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.hf.families.family import Family
from lm.hf.families.fields import ACTIVATION_NAMES, ACTIVATIONS, Fields
from lm.hf.families.table import Alias, Map
from lm.models import T5, Body, LanguageModeling, QuestionAnswering, SequenceClassification, Task, TokenClassification

HEAD, EMBED = "lm_head.weight", "shared.weight"


def read(f: Fields, task: Task) -> T5:
    f.ignore("n_positions", "classifier_dropout")
    gated, activation = _feed_forward(f)
    stated = f.take("tie_word_embeddings", default=True)
    n_layers = f.take("num_layers", "num_hidden_layers", default=6)
    return T5(
        vocab_size=f.take("vocab_size", default=32_128),
        d_model=f.take("d_model", "hidden_size", default=512),
        n_layers=f.take("num_decoder_layers", default=n_layers),
        n_encoder_layers=n_layers,
        n_heads=f.take("num_heads", "num_attention_heads", default=8),
        head_dim=f.take("d_kv", "head_dim", default=64),
        d_ff=f.take("d_ff", default=2048),
        relative_buckets=f.take("relative_attention_num_buckets", default=32),
        relative_max_distance=f.take("relative_attention_max_distance", default=128),
        norm_eps=f.take("layer_norm_epsilon", default=1e-6),
        gated=gated,
        activation=activation,
        tied=_tied(f, stated, task),
        scale_output=f.take("scale_decoder_outputs", default=stated),  # the older of the two spellings said both
        dropout=f.take("dropout_rate", default=0.1),
        init_std=f.take("initializer_factor", default=1.0),
        task=task,
    )


def _tied(f: Fields, stated: bool, task: Task) -> bool:
    """transformers 5 ties every T5, whatever tie_word_embeddings says, but one whose stored head differs. Of a folder
    without a head the older spelling tells whether its model has one of its own, or that its output is not scaled."""
    if isinstance(task, Body):
        return stated and f.take("scale_decoder_outputs", default=stated)
    if EMBED not in f.stored:
        return stated
    return HEAD not in f.stored or bool(np.array_equal(f.stored[HEAD], f.stored[EMBED]))


def _feed_forward(f: Fields) -> tuple[bool, Any]:
    """(gated, our name of the activation) of `relu`, `gated-gelu`, ...; "gated-gelu" means the approximation."""
    stated = f.take("feed_forward_proj", default="relu")
    parts = stated.split("-")
    if len(parts) > 2 or (len(parts) == 2 and parts[0] != "gated"):
        raise UserError(f"{f.where}: feed_forward_proj: expected an activation or gated-<activation>, got {stated!r}")
    gated = f.take("is_gated_act", default=len(parts) == 2)
    theirs = f.take("dense_act_fn", default="gelu_new" if stated == "gated-gelu" else parts[-1])
    if theirs not in ACTIVATIONS:
        raise UserError(
            f"{f.where}: feed_forward_proj: expected one of {', '.join(sorted(ACTIVATIONS))}, alone or after 'gated-', "
            f"got {theirs!r}; this activation is not supported"
        )
    return gated, ACTIVATIONS[theirs]


def write(m: T5) -> dict[str, Any]:
    theirs = ACTIVATION_NAMES[m.activation]
    return {
        "vocab_size": m.vocab_size,
        "d_model": m.d_model,
        "d_kv": m.head_dim,
        "d_ff": m.d_ff,
        "num_layers": m.n_encoder_layers or m.n_layers,
        "num_decoder_layers": m.n_layers,
        "num_heads": m.n_heads,
        "relative_attention_num_buckets": m.relative_buckets,
        "relative_attention_max_distance": m.relative_max_distance,
        "dropout_rate": m.dropout,
        "layer_norm_epsilon": m.norm_eps,
        "initializer_factor": m.init_std,
        "feed_forward_proj": "gated-gelu" if m.gated and theirs == "gelu_new" else "gated-" * m.gated + theirs,
        "dense_act_fn": theirs,
        "is_gated_act": m.gated,
        "scale_decoder_outputs": m.scale_output,
        "tie_word_embeddings": True,  # of every T5 in transformers 5, with a head of its own or not
    }


def table(m: T5) -> list[Map]:
    sides = ("encoder", "decoder") if m.has_decoder else ("encoder",)
    rows = [Map("embed.table", EMBED)]
    for side in sides:
        rows += _side(side, m.gated)
    match m.task:
        case Body():
            return rows
        case LanguageModeling():
            return rows + ([] if m.tied else [Map("head.table", HEAD)])
        case QuestionAnswering():
            return rows + _linear("out", "qa_outputs")
    # These two classes alone hold the model under a name of its own.
    rows = [dataclasses.replace(row, theirs=f"transformer.{row.theirs}") for row in rows]
    match m.task:
        case SequenceClassification():
            rows += _linear("dense", "classification_head.dense") + _linear("out", "classification_head.out_proj")
        case TokenClassification():
            rows += _linear("out", "classifier")
    return rows


def _side(side: str, gated: bool) -> list[Map]:
    ours, theirs = f"{side}.layers", f"{side}.block.{{}}.layer"
    rows = [
        Map(f"{side}.bias.table", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Map(f"{side}.norm.scale", f"{side}.final_layer_norm.weight"),
    ]
    attentions = [("attn", "norm1", "SelfAttention")]
    attentions += [("cross", "cross_norm", "EncDecAttention")] if side == "decoder" else []
    for i, (part, norm, name) in enumerate(attentions):
        rows.append(Map(f"{ours}.{norm}.scale", f"{theirs}.{i}.layer_norm.weight"))
        rows.append(Map(f"{ours}.{part}.o", f"{theirs}.{i}.{name}.o.weight", "d (h k) -> h k d"))
        rows += [Map(f"{ours}.{part}.{n}", f"{theirs}.{i}.{name}.{n}.weight", "(h k) d -> d h k") for n in "qkv"]
    last = f"{theirs}.{len(attentions)}"
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    rows.append(Map(f"{ours}.norm2.scale", f"{last}.layer_norm.weight"))
    return rows + [
        Map(f"{ours}.mlp.{n}", f"{last}.DenseReluDense.{wi}.weight", "o i -> i o") for n, wi in names.items()
    ]


def _linear(ours: str, theirs: str) -> list[Map]:
    return [
        Map(f"labeler.{ours}.kernel", f"{theirs}.weight", "o i -> i o"),
        Map(f"labeler.{ours}.bias", f"{theirs}.bias"),
    ]


def aliases(m: T5) -> list[Alias]:
    at = "transformer." if isinstance(m.task, SequenceClassification | TokenClassification) else ""
    sides = ("encoder", "decoder") if m.has_decoder else ("encoder",)
    out = [Alias(f"{at}{side}.embed_tokens.weight", f"{at}{EMBED}") for side in sides]
    return out + ([Alias(HEAD, EMBED)] if m.tied and isinstance(m.task, LanguageModeling) else [])


T5_FAMILY = Family(
    model_types=("t5",),
    classes={
        "T5Model": "Model",
        "T5EncoderModel": "EncoderModel",
        "T5ForConditionalGeneration": "ForConditionalGeneration",
        "T5ForSequenceClassification": "ForSequenceClassification",
        "T5ForTokenClassification": "ForTokenClassification",
        "T5ForQuestionAnswering": "ForQuestionAnswering",
    },
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    # Of the first release, which had a table there and never read it.
    ignore=(r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)
