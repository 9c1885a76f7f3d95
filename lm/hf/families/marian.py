"""Marian on disk, and the rows that BART and mBART share with it.

Positions are computed: tables that old files store are not read.
"""

from __future__ import annotations

import re
from typing import Any

from lm.hf.families.family import Family
from lm.hf.families.fields import ACTIVATION_NAMES, Fields
from lm.hf.families.table import Alias, Map
from lm.models import LanguageModeling, Task, Transformer

HEAD, SHARED, LOGITS_BIAS = "lm_head.weight", "model.shared.weight", "final_logits_bias"
EMBED = {"encoder": "model.encoder.embed_tokens.weight", "decoder": "model.decoder.embed_tokens.weight"}

# Of the conversion from fairseq, and no longer read: the tensors tell of norms, and the bias of the logits is there.
LEFTOVERS = ("add_bias_logits", "add_final_layer_norm", "classif_dropout", "force_bos_token_to_be_generated")


def common(f: Fields, task: Task, *, pad_id: int) -> dict[str, Any]:
    """What the families of this layout read; all have the same defaults but those of the vocabulary. pad_id: theirs."""
    f.ignore("classifier_dropout", *LEFTOVERS)
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        f.expect(name, 0, None, why="layers are never dropped here; set it to 0, which changes no output")
    return {
        "d_model": f.take("d_model", "hidden_size", default=1024),
        "n_encoder_layers": f.take("encoder_layers", "num_hidden_layers", default=12),
        "n_encoder_heads": f.take("encoder_attention_heads", "num_attention_heads", default=16),
        "encoder_d_ff": f.take("encoder_ffn_dim", default=4096),
        "n_layers": f.take("decoder_layers", default=12),
        "n_heads": f.take("decoder_attention_heads", default=16),
        "d_ff": f.take("decoder_ffn_dim", default=4096),
        "activation": f.activation("activation_function", default="gelu"),
        "dropout": f.take("dropout", default=0.1),
        "attention_dropout": f.take("attention_dropout", default=0.0),
        "activation_dropout": f.take("activation_dropout", default=0.0),
        "init_std": f.take("init_std", default=0.02),
        "scale_embed": f.take("scale_embedding", default=False),
        "logits_bias": LOGITS_BIAS in f.stored,
        "pad_id": f.given("pad_token_id", default=pad_id),
        "task": task,
    }


def common_fields(m: Transformer) -> dict[str, Any]:
    """The inverse of `common`."""
    return {
        "vocab_size": m.vocab_size,
        "d_model": m.d_model,
        "encoder_layers": m.n_encoder_layers or m.n_layers,
        "encoder_attention_heads": m.n_encoder_heads or m.n_heads,
        "encoder_ffn_dim": m.encoder_d_ff or m.d_ff,
        "decoder_layers": m.n_layers,
        "decoder_attention_heads": m.n_heads,
        "decoder_ffn_dim": m.d_ff,
        "activation_function": ACTIVATION_NAMES[m.activation],
        "dropout": m.dropout,
        "attention_dropout": m.weights_dropout,
        "activation_dropout": m.activation_dropout,
        "init_std": m.init_std,
        "scale_embedding": m.scale_embed,
        "tie_word_embeddings": m.tied,
        **({} if m.pad_id is None else {"pad_token_id": m.pad_id}),
    }


def norm(ours: str, theirs: str) -> list[Map]:
    return [Map(f"{ours}.scale", f"{theirs}.weight"), Map(f"{ours}.bias", f"{theirs}.bias")]


def attention(ours: str, theirs: str) -> list[Map]:
    rows = [Map(f"{ours}.o", f"{theirs}.out_proj.weight", "d (h k) -> h k d")]
    rows.append(Map(f"{ours}.o_bias", f"{theirs}.out_proj.bias"))
    for n in "qkv":
        rows.append(Map(f"{ours}.{n}", f"{theirs}.{n}_proj.weight", "(h k) d -> d h k"))
        rows.append(Map(f"{ours}.{n}_bias", f"{theirs}.{n}_proj.bias", "(h k) -> h k"))
    return rows


def layers(side: str) -> list[Map]:
    """The rows of the encoder's or decoder's layers."""
    ours, theirs = f"{side}.layers", f"model.{side}.layers.{{}}"
    rows = attention(f"{ours}.attn", f"{theirs}.self_attn") + norm(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
    if side == "decoder":
        rows += attention(f"{ours}.cross", f"{theirs}.encoder_attn")
        rows += norm(f"{ours}.cross_norm", f"{theirs}.encoder_attn_layer_norm")
    for ours_name, theirs_name in (("up", "fc1"), ("down", "fc2")):
        rows.append(Map(f"{ours}.mlp.{ours_name}", f"{theirs}.{theirs_name}.weight", "o i -> i o"))
        rows.append(Map(f"{ours}.mlp.{ours_name}_bias", f"{theirs}.{theirs_name}.bias"))
    return rows + norm(f"{ours}.norm2", f"{theirs}.final_layer_norm")


def table(m: Transformer) -> list[Map]:
    """Embeddings, layers and the head of words."""
    rows = [Map("embed.table", EMBED["encoder"] if m.target_vocab_size else SHARED)]
    if m.target_vocab_size:
        rows.append(Map("target_embed.table", EMBED["decoder"]))
    rows += layers("encoder") + layers("decoder")
    if isinstance(m.task, LanguageModeling):
        rows += [Map("head.bias", LOGITS_BIAS, "1 v -> v")] if m.logits_bias else []
        rows += [] if m.tied else [Map("head.table", HEAD)]
    return rows


def aliases(m: Transformer) -> list[Alias]:
    out = [] if m.target_vocab_size else [Alias(name, SHARED) for name in EMBED.values()]
    if m.tied and isinstance(m.task, LanguageModeling):
        out.append(Alias(HEAD, EMBED["decoder"] if m.target_vocab_size else SHARED))
    return out


def rename(name: str) -> str:
    """Files of the bare model have no prefix."""
    return f"model.{name}" if re.match(r"(shared|encoder|decoder)\.", name) else name


def read(f: Fields, task: Task) -> Transformer:
    f.ignore("max_position_embeddings", "extra_pos_embeddings")
    f.expect("static_position_embeddings", True, why="Marian's positions are computed")
    vocab_size = f.take("vocab_size", default=58_101)
    target = f.take("decoder_vocab_size", default=vocab_size)
    shared = f.take("share_encoder_decoder_embeddings", default=True)
    return Transformer(
        vocab_size=vocab_size,
        target_vocab_size=None if shared else target,
        tied=f.tied(HEAD, SHARED if shared else EMBED["decoder"], default=True),
        **common(f, task, pad_id=58_100),
    )


def write(m: Transformer) -> dict[str, Any]:
    return common_fields(m) | {
        "decoder_vocab_size": m.target_vocab_size or m.vocab_size,
        "share_encoder_decoder_embeddings": m.target_vocab_size is None,
    }


MARIAN_FAMILY = Family(
    model_types=("marian",),
    classes={"MarianModel": "Model", "MarianMTModel": "MTModel"},
    prefix="model.",
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    ignore=(r"model\.(encoder|decoder)\.(embed_positions\.weight|version)",),
)
