"""GPT-2 on disk. Its linear layers are stored [in, out], with q, k and v side by side."""

from __future__ import annotations

import re
from typing import Any

from lm.hf.families.family import Family
from lm.hf.families.fields import ACTIVATION_NAMES, Fields
from lm.hf.families.table import Alias, Map
from lm.models import GPT2, LanguageModeling, QuestionAnswering, SequenceClassification, Task, TokenClassification


def read(f: Fields, task: Task) -> GPT2:
    f.ignore("n_ctx", "embd_pdrop", "classifier_dropout", "reorder_and_upcast_attn")  # the last: only of precision
    f.ignore(*(f"summary_{x}" for x in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    return GPT2(
        vocab_size=f.take("vocab_size", default=50257),
        d_model=f.take("n_embd", "hidden_size", default=768),
        n_layers=f.take("n_layer", "num_hidden_layers", default=12),
        n_heads=f.take("n_head", "num_attention_heads", default=12),
        d_ff=f.take("n_inner", default=None),
        max_positions=f.take("n_positions", "max_position_embeddings", default=1024),
        norm_eps=f.take("layer_norm_epsilon", default=1e-5),
        activation=f.activation("activation_function", default="gelu_new"),
        dropout=f.take("resid_pdrop", default=0.1),
        attention_dropout=f.take("attn_pdrop", default=0.1),
        init_std=f.take("initializer_range", default=0.02),
        scale_scores=f.take("scale_attn_weights", default=True),
        scale_by_layer=f.take("scale_attn_by_inverse_layer_idx", default=False),
        tied=f.tied("lm_head.weight", "transformer.wte.weight", default=True),
        task=task,
    )


def write(m: GPT2) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size,
        "n_embd": m.d_model,
        "n_layer": m.n_layers,
        "n_head": m.n_heads,
        "n_inner": m.d_ff,
        "n_positions": m.max_positions,
        "layer_norm_epsilon": m.norm_eps,
        "activation_function": ACTIVATION_NAMES[m.activation],
        "resid_pdrop": m.dropout,
        "embd_pdrop": m.dropout,  # ours have one rate
        "attn_pdrop": m.weights_dropout,
        "initializer_range": m.init_std,
        "scale_attn_weights": m.scale_scores,
        "scale_attn_by_inverse_layer_idx": m.scale_by_layer,
        "tie_word_embeddings": m.tied,
    }


def table(m: GPT2) -> list[Map]:
    h = "transformer.h.{}."
    qkv = tuple(f"layers.attn.{n}" for n in "qkv")
    rows = [
        Map("embed.table", "transformer.wte.weight"),
        Map("positions.table", "transformer.wpe.weight"),
        Map("norm.scale", "transformer.ln_f.weight"),
        Map("norm.bias", "transformer.ln_f.bias"),
        Map(qkv, f"{h}attn.c_attn.weight", "d (n h k) -> n d h k"),
        Map(tuple(f"{n}_bias" for n in qkv), f"{h}attn.c_attn.bias", "(n h k) -> n h k"),
        Map("layers.attn.o", f"{h}attn.c_proj.weight", "(h k) d -> h k d"),
        Map("layers.attn.o_bias", f"{h}attn.c_proj.bias"),
        Map("layers.mlp.up", f"{h}mlp.c_fc.weight"),
        Map("layers.mlp.up_bias", f"{h}mlp.c_fc.bias"),
        Map("layers.mlp.down", f"{h}mlp.c_proj.weight"),
        Map("layers.mlp.down_bias", f"{h}mlp.c_proj.bias"),
    ]
    for ours, theirs in (("norm1", "ln_1"), ("norm2", "ln_2")):
        rows += [Map(f"layers.{ours}.scale", f"{h}{theirs}.weight"), Map(f"layers.{ours}.bias", f"{h}{theirs}.bias")]
    match m.task:
        case LanguageModeling() if not m.tied:
            rows.append(Map("head.table", "lm_head.weight"))
        case SequenceClassification():
            rows.append(Map("head.out.kernel", "score.weight", "n d -> d n"))
        case TokenClassification():
            rows += [Map("head.out.kernel", "classifier.weight", "n d -> d n"), Map("head.out.bias", "classifier.bias")]
        case QuestionAnswering():
            rows += [Map("head.out.kernel", "qa_outputs.weight", "n d -> d n"), Map("head.out.bias", "qa_outputs.bias")]
    return rows


def aliases(m: GPT2) -> list[Alias]:
    return (
        [Alias("lm_head.weight", "transformer.wte.weight")] if m.tied and isinstance(m.task, LanguageModeling) else []
    )


def rename(name: str) -> str:
    """Files of the first release have no prefix."""
    return f"transformer.{name}" if re.match(r"(h\.\d+|wte|wpe|ln_f)\.", name) else name


GPT2_FAMILY = Family(
    model_types=("gpt2",),
    classes={
        "GPT2Model": "Model",
        "GPT2LMHeadModel": "LMHeadModel",
        "GPT2ForSequenceClassification": "ForSequenceClassification",
        "GPT2ForTokenClassification": "ForTokenClassification",
        "GPT2ForQuestionAnswering": "ForQuestionAnswering",
    },
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    prefix="transformer.",
    ignore=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
