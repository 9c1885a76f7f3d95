"""GPT-NeoX and Pythia on disk. q, k and v are in one tensor, side by side within each head."""

from __future__ import annotations

import re
from typing import Any

from lm.hf.families.family import Family
from lm.hf.families.fields import ACTIVATION_NAMES, Fields
from lm.hf.families.gpt_neo import head, layer_norm, linear
from lm.hf.families.llama import classes
from lm.hf.families.rope import max_positions, rope_parameters
from lm.hf.families.table import Alias, Map
from lm.models import GPTNeoX, LanguageModeling, Task

HEAD, EMBED = "embed_out.weight", "gpt_neox.embed_in.weight"


def read(f: Fields, task: Task) -> GPTNeoX:
    f.ignore("max_position_embeddings", "classifier_dropout")
    return GPTNeoX(
        vocab_size=f.take("vocab_size", default=50432),
        d_model=f.take("hidden_size", default=6144),
        n_layers=f.take("num_hidden_layers", default=44),
        n_heads=f.take("num_attention_heads", default=64),
        d_ff=f.take("intermediate_size", default=24576),
        norm_eps=f.take("layer_norm_eps", default=1e-5),
        activation=f.activation("hidden_act", default="gelu"),
        dropout=f.take("hidden_dropout", default=0.0),
        attention_dropout=f.take("attention_dropout", default=0.0),
        init_std=f.take("initializer_range", default=0.02),
        rope=f.rope(fraction=0.25),
        parallel=f.take("use_parallel_residual", default=True),
        attention_bias=f.take("attention_bias", default=True),
        tied=f.tied(HEAD, EMBED, default=False),
        task=task,
    )


def write(m: GPTNeoX) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "intermediate_size": m.d_ff or 4 * m.d_model,
        "layer_norm_eps": m.norm_eps,
        "hidden_act": ACTIVATION_NAMES[m.activation],
        "hidden_dropout": m.dropout,
        "attention_dropout": m.weights_dropout,
        "initializer_range": m.init_std,
        "rope_parameters": rope_parameters(m.rope) | {"partial_rotary_factor": m.rope.fraction},
        "use_parallel_residual": m.parallel,
        "attention_bias": m.attention_bias,
        "tie_word_embeddings": m.tied,
        **max_positions(m.rope),
    }


def table(m: GPTNeoX) -> list[Map]:
    at = "gpt_neox.layers.{}."
    qkv = tuple(f"layers.attn.{n}" for n in "qkv")
    rows = [
        Map("embed.table", EMBED),
        Map(qkv, f"{at}attention.query_key_value.weight", "(h n k) d -> n d h k"),
        *linear("layers.attn.o", f"{at}attention.dense", "d (h k) -> h k d", bias=m.attention_bias),
        *linear("layers.mlp.up", f"{at}mlp.dense_h_to_4h", "f d -> d f"),
        *linear("layers.mlp.down", f"{at}mlp.dense_4h_to_h", "d f -> f d"),
        *layer_norm("layers.norm1", f"{at}input_layernorm"),
        *layer_norm("layers.norm2", f"{at}post_attention_layernorm"),
        *layer_norm("norm", "gpt_neox.final_layer_norm"),
    ]
    if m.attention_bias:
        biases = tuple(f"{n}_bias" for n in qkv)
        rows.append(Map(biases, f"{at}attention.query_key_value.bias", "(h n k) -> n h k"))
    return rows + head(m, HEAD)


def aliases(m: GPTNeoX) -> list[Alias]:
    return [Alias(HEAD, EMBED)] if m.tied and isinstance(m.task, LanguageModeling) else []


def rename(name: str) -> str:
    """transformers 5 has another name for the head, and files of the bare model no prefix."""
    name = name.replace("lm_head.", "embed_out.", 1) if name.startswith("lm_head.") else name
    return f"gpt_neox.{name}" if re.match(r"(layers\.\d+|embed_in|final_layer_norm)\.", name) else name


GPT_NEOX_FAMILY = Family(
    model_types=("gpt_neox",),
    classes=classes("GPTNeoX"),
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    prefix="gpt_neox.",
    ignore=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
