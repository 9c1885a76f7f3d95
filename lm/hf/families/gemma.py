"""Gemma, Gemma 2 and the text side of Gemma 3 on disk: LLaMA's layout, from Gemma 2 on with four norms a layer."""

from __future__ import annotations

from typing import Any

from lm.errors import UserError
from lm.hf.families.family import Family
from lm.hf.families.fields import Fields
from lm.hf.families.llama import (
    ROTARY_BUFFERS,
    aliases,
    attention,
    attention_biases,
    common,
    common_fields,
    ends,
    feed_forward,
    norms,
    rename,
)
from lm.hf.families.mistral import refuse_biases
from lm.hf.families.qwen import head_norms, layer_types
from lm.hf.families.rope import rope_parameters
from lm.hf.families.table import Map
from lm.models import Gemma, Gemma2, Gemma3, Task
from lm.nn.rope import Rope

TANH = "gelu_pytorch_tanh"


def read_gemma(f: Fields, task: Task) -> Gemma:
    # The first release says gelu and means its approximation by tanh; the other field came to say so.
    f.expect("hidden_activation", None, "gelu", TANH, why="Gemma is read with the tanh approximation of gelu")
    shared = _shared(f, task, kv_heads=16)
    if f.take("hidden_act", default=TANH) in ("gelu", TANH):
        shared["activation"] = "gelu_tanh"
    return Gemma(**shared)


def read_gemma2(f: Fields, task: Task) -> Gemma2:
    return Gemma2(
        **_shared(f, task, kv_heads=4) | {"activation": f.activation("hidden_activation", default=TANH)},
        query_pre_attn_scalar=float(f.take("query_pre_attn_scalar", default=256.0)),
        attention_softcap=f.given("attn_logit_softcapping", default=50.0),
        logits_softcap=f.given("final_logit_softcapping", default=30.0),
        **_windows(f, pattern=2),
    )


def read_gemma3(f: Fields, task: Task) -> Gemma3:
    f.ignore("attn_logit_softcapping")  # left over from Gemma 2: the class has it and caps no scores
    shared = _shared(f, task, kv_heads=4, theta=1_000_000.0, rope_key="full_attention")
    pattern = f.take("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return Gemma3(
        **shared | {"activation": f.activation("hidden_activation", default=TANH)},
        local_rope=_local_rope(f),
        query_pre_attn_scalar=float(f.take("query_pre_attn_scalar", default=256.0)),
        logits_softcap=f.given("final_logit_softcapping", default=None, kind=float),
        **_windows(f, pattern=pattern),
    )


def _shared(f: Fields, task: Task, *, kv_heads: int, **more: Any) -> dict[str, Any]:
    f.expect("use_bidirectional_attention", None, False, why="only causal attention is supported")
    f.ignore("cache_implementation")
    own = {
        "head_dim": f.given("head_dim", default=256),
        "n_kv_heads": f.given("num_key_value_heads", default=kv_heads),
        "attention_bias": f.take("attention_bias", default=False),
        "pad_id": f.given("pad_token_id", default=0),
    }
    return common(f, task, tied=True, **more) | own


def _windows(f: Fields, *, pattern: int) -> dict[str, Any]:
    """Reads the windows. pattern: every how many layers there is one without."""
    n = f.take("num_hidden_layers")
    if pattern < 1:
        raise UserError(f"{f.where}: sliding_window_pattern: expected a positive number of layers, got {pattern}")
    return {
        "window": f.given("sliding_window", default=4096),
        "windowed": f.windowed(n, default=[bool((i + 1) % pattern) for i in range(n)]),
    }


def _local_rope(f: Fields) -> Rope:
    parts = f.take("rope_parameters", default={})
    theta = f.take("rope_local_base_freq", default=10_000.0)
    return f.rope_of(parts.get("sliding_attention"), "rope_parameters.sliding_attention", theta=theta, fraction=1.0)


def write_gemma(m: Gemma) -> dict[str, Any]:
    refuse_biases(m, attention=None)
    own = {"hidden_act": _activation(m), "attention_bias": m.attention_bias}
    return common_fields(m) | own | ({} if m.pad_id is None else {"pad_token_id": m.pad_id})


def write_gemma2(m: Gemma2) -> dict[str, Any]:
    fields = write_gemma(m)
    del fields["hidden_act"]
    scalar = m.query_pre_attn_scalar
    return fields | {
        "hidden_activation": _activation(m),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": m.attention_softcap,
        "final_logit_softcapping": m.logits_softcap,
        "sliding_window": m.window,
        "layer_types": layer_types(m),
    }


def write_gemma3(m: Gemma3) -> dict[str, Any]:
    ropes = {"full_attention": rope_parameters(m.rope), "sliding_attention": rope_parameters(m.local_rope)}
    return write_gemma2(m) | {"rope_parameters": ropes}


def _activation(m: Gemma) -> str:
    return TANH if m.activation == "gelu_tanh" else m.activation


def table_gemma(m: Gemma) -> list[Map]:
    return _layers(m) + norms()


def table_gemma2(m: Gemma2) -> list[Map]:
    names = {
        "norm1": "input_layernorm",
        "post_norm1": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "post_norm2": "post_feedforward_layernorm",
    }
    rows = [Map(f"layers.{ours}.scale", f"model.layers.{{}}.{theirs}.weight") for ours, theirs in names.items()]
    return _layers(m) + rows


def table_gemma3(m: Gemma3) -> list[Map]:
    return table_gemma2(m) + head_norms()


def _layers(m: Gemma) -> list[Map]:
    return ends(m) + attention() + (attention_biases(out=True) if m.attention_bias else []) + feed_forward(False)


def _classes(name: str) -> dict[str, str]:
    return {
        f"{name}{end}": end for end in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    }


GEMMA_FAMILY = Family(
    model_types=("gemma",),
    classes=_classes("Gemma"),
    read=read_gemma,
    write=write_gemma,
    table=table_gemma,
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
GEMMA2_FAMILY = Family(
    model_types=("gemma2",),
    classes=_classes("Gemma2"),
    read=read_gemma2,
    write=write_gemma2,
    table=table_gemma2,
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
GEMMA3_FAMILY = Family(
    model_types=("gemma3_text",),
    classes={
        "Gemma3TextModel": "Model",
        "Gemma3ForCausalLM": "ForCausalLM",
        "Gemma3TextForSequenceClassification": "ForSequenceClassification",
    },
    read=read_gemma3,
    write=write_gemma3,
    table=table_gemma3,
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
