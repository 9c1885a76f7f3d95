"""LLaMA on disk, and the rows that the decoders after it share."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from lm.hf.families.family import Family
from lm.hf.families.fields import ACTIVATION_NAMES, Fields
from lm.hf.families.rope import max_positions, rope_parameters
from lm.hf.families.table import Alias, Map
from lm.models import LanguageModeling, Llama, QuestionAnswering, SequenceClassification, Task, TokenClassification

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def common(
    f: Fields,
    task: Task,
    *,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    tied: bool = False,
    rope_key: str | None = None,
) -> dict[str, Any]:
    """What every family of this layout reads; theta, eps, tied: its defaults; rope_key: see `Fields.rope`."""
    f.ignore("max_position_embeddings", "pretraining_tp")  # positions are computed; scalings read the first themselves
    return {
        "vocab_size": f.take("vocab_size"),
        "d_model": f.take("hidden_size"),
        "d_ff": f.take("intermediate_size"),
        "n_layers": f.take("num_hidden_layers"),
        "n_heads": f.take("num_attention_heads"),
        "n_kv_heads": f.take("num_key_value_heads", default=None),
        "head_dim": f.take("head_dim", default=None),
        "activation": f.activation("hidden_act", default="silu"),
        "norm_eps": f.take("rms_norm_eps", default=eps),
        "init_std": f.take("initializer_range", default=0.02),
        "attention_dropout": f.take("attention_dropout", default=0.0),
        "rope": f.rope(theta=theta, key=rope_key),
        "tied": f.tied(HEAD, EMBED, default=tied),
        "pad_id": f.take("pad_token_id", default=None),
        "task": task,
    }


def common_fields(m: Llama) -> dict[str, Any]:
    """The inverse of `common`."""
    n_kv_heads, head_dim = m.kv_shape
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "intermediate_size": m.d_ff,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "hidden_act": ACTIVATION_NAMES[m.activation],
        "rms_norm_eps": m.norm_eps,
        "initializer_range": m.init_std,
        "attention_dropout": m.weights_dropout,
        "rope_parameters": rope_parameters(m.rope),
        "tie_word_embeddings": m.tied,
        **max_positions(m.rope),
    }


def attention(at: str = "model.layers.{}.self_attn.") -> list[Map]:
    return [
        Map("layers.attn.q", f"{at}q_proj.weight", "(h k) d -> d h k"),
        Map("layers.attn.k", f"{at}k_proj.weight", "(g k) d -> d g k"),
        Map("layers.attn.v", f"{at}v_proj.weight", "(g k) d -> d g k"),
        Map("layers.attn.o", f"{at}o_proj.weight", "d (h k) -> h k d"),
    ]


def attention_biases(out: bool, at: str = "model.layers.{}.self_attn.") -> list[Map]:
    rows = [Map(f"layers.attn.{n}_bias", f"{at}{n}_proj.bias", "(h k) -> h k") for n in "qkv"]
    return rows + ([Map("layers.attn.o_bias", f"{at}o_proj.bias")] if out else [])


def feed_forward(bias: bool, at: str = "model.layers.{}.mlp.") -> list[Map]:
    rows = [
        Map("layers.mlp.gate", f"{at}gate_proj.weight", "f d -> d f"),
        Map("layers.mlp.up", f"{at}up_proj.weight", "f d -> d f"),
        Map("layers.mlp.down", f"{at}down_proj.weight", "d f -> f d"),
    ]
    names = ("gate", "up", "down") if bias else ()
    return rows + [Map(f"layers.mlp.{n}_bias", f"{at}{n}_proj.bias") for n in names]


def norms() -> list[Map]:
    return [
        Map("layers.norm1.scale", "model.layers.{}.input_layernorm.weight"),
        Map("layers.norm2.scale", "model.layers.{}.post_attention_layernorm.weight"),
    ]


def ends(m: Llama) -> list[Map]:
    """Embedding, final norm and head."""
    rows = [Map("embed.table", EMBED), Map("norm.scale", "model.norm.weight")]
    match m.task:
        case LanguageModeling() if not m.tied:
            rows.append(Map("head.table", HEAD))
        case SequenceClassification():
            rows.append(Map("head.out.kernel", "score.weight", "n d -> d n"))
        case TokenClassification():
            rows += [Map("head.out.kernel", "score.weight", "n d -> d n"), Map("head.out.bias", "score.bias")]
        case QuestionAnswering():
            rows += [Map("head.out.kernel", "qa_outputs.weight", "n d -> d n"), Map("head.out.bias", "qa_outputs.bias")]
    return rows


def aliases(m: Llama) -> list[Alias]:
    return [Alias(HEAD, EMBED)] if m.tied and isinstance(m.task, LanguageModeling) else []


def classes(name: str) -> dict[str, str]:
    ends = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    return {f"{name}{end}": end for end in ends}


def rename(name: str) -> str:
    """Files of the bare model have no prefix."""
    return f"model.{name}" if re.match(r"(embed_tokens|layers\.\d+|norm)\.", name) else name


ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


def read(f: Fields, task: Task) -> Llama:
    return Llama(
        **common(f, task),
        attention_bias=f.take("attention_bias", default=False),
        mlp_bias=f.take("mlp_bias", default=False),
    )


def write(m: Llama) -> dict[str, Any]:
    return common_fields(m) | {"attention_bias": m.attention_bias, "mlp_bias": m.mlp_bias}


def table(m: Llama) -> list[Map]:
    biases = attention_biases(out=True) if m.attention_bias else []
    return older_prefix(m, ends(m) + attention() + biases + feed_forward(m.mlp_bias) + norms())


def older_prefix(m: Llama, rows: list[Map]) -> list[Map]:
    """The class for spans alone keeps an older prefix, here and in Qwen."""
    if not isinstance(m.task, QuestionAnswering):
        return rows
    return [dataclasses.replace(row, theirs=re.sub(r"^model\.", "transformer.", row.theirs)) for row in rows]


LLAMA_FAMILY = Family(
    model_types=("llama",),
    classes=classes("Llama"),
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
