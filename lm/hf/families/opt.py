"""OPT on disk."""

from __future__ import annotations

import re
from typing import Any

from lm.hf.families.family import Family, by_mask
from lm.hf.families.fields import ACTIVATION_NAMES, Fields
from lm.hf.families.gpt_neo import head, layer_norm, linear
from lm.hf.families.table import Alias, Map
from lm.models import OPT, LanguageModeling, Task

HEAD, EMBED = "lm_head.weight", "model.decoder.embed_tokens.weight"


def read(f: Fields, task: Task) -> OPT:
    f.ignore("layerdrop", "activation_dropout")  # of training; the latter was never applied
    f.expect("layer_norm_elementwise_affine", True, why="norms without parameters (Galactica) are not supported")
    return OPT(
        vocab_size=f.take("vocab_size", default=50272),
        d_model=f.take("hidden_size", default=768),
        n_layers=f.take("num_hidden_layers", default=12),
        n_heads=f.take("num_attention_heads", default=12),
        d_ff=f.take("ffn_dim", default=3072),
        embed_dim=f.take("word_embed_proj_dim", default=None),
        max_positions=f.take("max_position_embeddings", default=2048),
        activation=f.activation("activation_function", default="relu"),
        dropout=f.take("dropout", default=0.1),
        attention_dropout=f.take("attention_dropout", default=0.0),
        init_std=f.take("init_std", default=0.02),
        post_norm=not f.take("do_layer_norm_before", default=True),
        final_norm=not f.take("_remove_final_layer_norm", default=False),
        bias=f.take("enable_bias", default=True),
        tied=f.tied(HEAD, EMBED, default=True),
        pad_id=f.given("pad_token_id", default=1),
        task=task,
    )


def write(m: OPT) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "ffn_dim": m.d_ff,
        "word_embed_proj_dim": m.embed_width,
        "max_position_embeddings": m.max_positions,
        "activation_function": ACTIVATION_NAMES[m.activation],
        "dropout": m.dropout,
        "attention_dropout": m.weights_dropout,
        "init_std": m.init_std,
        "do_layer_norm_before": not m.post_norm,
        "_remove_final_layer_norm": not m.final_norm,
        "enable_bias": m.bias,
        "tie_word_embeddings": m.tied,
        **({} if m.pad_id is None else {"pad_token_id": m.pad_id}),
    }


def table(m: OPT) -> list[Map]:
    base = "model.decoder."
    at = f"{base}layers.{{}}."
    rows = [
        Map("embed.table", EMBED),
        Map("positions.table", f"{base}embed_positions.weight"),
        *(Map(f"layers.attn.{n}", f"{at}self_attn.{n}_proj.weight", "(h k) d -> d h k") for n in "qkv"),
        *linear("layers.attn.o", f"{at}self_attn.out_proj", "d (h k) -> h k d", bias=m.bias),
        *linear("layers.mlp.up", f"{at}fc1", "f d -> d f", bias=m.bias),
        *linear("layers.mlp.down", f"{at}fc2", "d f -> f d", bias=m.bias),
        *layer_norm("layers.norm1", f"{at}self_attn_layer_norm"),
        *layer_norm("layers.norm2", f"{at}final_layer_norm"),
    ]
    if m.bias:
        rows += [Map(f"layers.attn.{n}_bias", f"{at}self_attn.{n}_proj.bias", "(h k) -> h k") for n in "qkv"]
    if m.has_final_norm:
        rows += layer_norm("norm", f"{base}final_layer_norm")
    if m.embed_width != m.d_model:
        rows += [Map(f"{n}.kernel", f"{base}{n}.weight", "o i -> i o") for n in ("project_in", "project_out")]
    return rows + head(m, HEAD)


def aliases(m: OPT) -> list[Alias]:
    return [Alias(HEAD, EMBED)] if m.tied and isinstance(m.task, LanguageModeling) else []


def rename(name: str) -> str:
    """Files of the bare model have one prefix less."""
    return f"model.{name}" if re.match(r"decoder\.", name) else name


OPT_FAMILY = Family(
    model_types=("opt",),
    classes={
        "OPTModel": "Model",
        "OPTForCausalLM": "ForCausalLM",
        "OPTForSequenceClassification": "ForSequenceClassification",
        "OPTForQuestionAnswering": "ForQuestionAnswering",
    },
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    ignore=(r"model\.decoder\.version",),
    positions=by_mask,
    prefix="model.",
)
