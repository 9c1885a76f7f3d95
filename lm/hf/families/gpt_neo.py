"""GPT-Neo on disk: GPT-2's names, but linear layers stored [out, in] and q, k and v each by itself."""

from __future__ import annotations

import re
from typing import Any

from lm.errors import UserError
from lm.hf.families.family import Family
from lm.hf.families.fields import ACTIVATION_NAMES, Fields
from lm.hf.families.llama import classes
from lm.hf.families.table import Alias, Map
from lm.models import (
    Body,
    GPTNeo,
    LanguageModeling,
    QuestionAnswering,
    SequenceClassification,
    Task,
    TokenClassification,
)

HEAD, EMBED = "lm_head.weight", "transformer.wte.weight"
KINDS = {"global": False, "local": True}


def read(f: Fields, task: Task) -> GPTNeo:
    # Dropouts of places that have the rate of the residual here; and attention_types, spelt out once more.
    f.ignore("embed_dropout", "classifier_dropout", "attention_layers")
    f.ignore(*(f"summary_{x}" for x in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    n_layers = f.take("num_layers", "num_hidden_layers", default=24)
    return GPTNeo(
        vocab_size=f.take("vocab_size", default=50257),
        d_model=f.take("hidden_size", default=2048),
        n_layers=n_layers,
        n_heads=f.take("num_heads", "num_attention_heads", default=16),
        d_ff=f.take("intermediate_size", default=None),
        max_positions=f.take("max_position_embeddings", default=2048),
        norm_eps=f.take("layer_norm_epsilon", default=1e-5),
        activation=f.activation("activation_function", default="gelu_new"),
        dropout=f.take("resid_dropout", default=0.0),
        attention_dropout=f.take("attention_dropout", default=0.0),
        init_std=f.take("initializer_range", default=0.02),
        window=f.take("window_size", default=256),
        windowed=_windowed(f, n_layers),
        tied=f.tied(HEAD, EMBED, default=True),
        task=task,
    )


def _windowed(f: Fields, n_layers: int) -> tuple[bool, ...]:
    types = f.take("attention_types", default=[[["global", "local"], 12]])
    kinds = [kind for pattern, times in types for kind in pattern * times]
    if len(kinds) != n_layers or not set(kinds) <= set(KINDS):
        raise UserError(
            f"{f.where}: attention_types: expected {' or '.join(KINDS)} for each of {n_layers} layers, got {types}"
        )
    if len(types) == 1:
        return tuple(KINDS[kind] for kind in types[0][0])
    return tuple(KINDS[kind] for kind in kinds)


def write(m: GPTNeo) -> dict[str, Any]:
    kinds = ["global" if layer.window is None else "local" for layer in m.order]
    times = m.n_layers // len(m.windowed) if m.n_layers % len(m.windowed) == 0 else 1
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_layers": m.n_layers,
        "num_heads": m.n_heads,
        "intermediate_size": m.d_ff,
        "max_position_embeddings": m.max_positions,
        "layer_norm_epsilon": m.norm_eps,
        "activation_function": ACTIVATION_NAMES[m.activation],
        "resid_dropout": m.dropout,
        "embed_dropout": m.dropout,
        "attention_dropout": m.weights_dropout,
        "initializer_range": m.init_std,
        "window_size": m.window,
        "attention_types": [[kinds[: m.n_layers // times], times]],
        "attention_layers": kinds,
        "tie_word_embeddings": m.tied,
    }


def table(m: GPTNeo) -> list[Map]:
    h = "transformer.h.{}."
    at = f"{h}attn.attention."
    rows = [
        Map("embed.table", EMBED),
        Map("positions.table", "transformer.wpe.weight"),
        *(Map(f"layers.attn.{n}", f"{at}{n}_proj.weight", "(h k) d -> d h k") for n in "qkv"),
        Map("layers.attn.o", f"{at}out_proj.weight", "d (h k) -> h k d"),
        Map("layers.attn.o_bias", f"{at}out_proj.bias"),
        *linear("layers.mlp.up", f"{h}mlp.c_fc", "f d -> d f"),
        *linear("layers.mlp.down", f"{h}mlp.c_proj", "d f -> f d"),
        *layer_norm("layers.norm1", f"{h}ln_1"),
        *layer_norm("layers.norm2", f"{h}ln_2"),
        *layer_norm("norm", "transformer.ln_f"),
    ]
    return rows + head(m, HEAD)


def linear(ours: str, theirs: str, pattern: str, *, bias: bool = True) -> list[Map]:
    rows = [Map(ours, f"{theirs}.weight", pattern), Map(f"{ours}_bias", f"{theirs}.bias")]
    return rows if bias else rows[:1]


def layer_norm(ours: str, theirs: str) -> list[Map]:
    return [Map(f"{ours}.scale", f"{theirs}.weight"), Map(f"{ours}.bias", f"{theirs}.bias")]


def head(m: Any, words: str) -> list[Map]:
    """The head of the model's task; words: its name where it is one of tokens."""
    match m.task:
        case Body():
            return []
        case LanguageModeling():
            return [] if m.tied else [Map("head.table", words)]
        case SequenceClassification():
            return [Map("head.out.kernel", "score.weight", "n d -> d n")]
        case TokenClassification():
            name = "classifier"
        case QuestionAnswering():
            name = "qa_outputs"
    return [Map("head.out.kernel", f"{name}.weight", "n d -> d n"), Map("head.out.bias", f"{name}.bias")]


def aliases(m: GPTNeo) -> list[Alias]:
    return [Alias(HEAD, EMBED)] if m.tied and isinstance(m.task, LanguageModeling) else []


def rename(name: str) -> str:
    return f"transformer.{name}" if re.match(r"(h\.\d+|wte|wpe|ln_f)\.", name) else name


GPT_NEO_FAMILY = Family(
    model_types=("gpt_neo",),
    classes=classes("GPTNeo"),
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    prefix="transformer.",
    ignore=(r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",),
)
