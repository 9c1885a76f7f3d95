"""Qwen2 and Qwen3 on disk: LLaMA's layout, with biases or with norms in the attention."""

from __future__ import annotations

from typing import Any

from lm.hf.families.family import Family
from lm.hf.families.fields import Fields
from lm.hf.families.llama import (
    ROTARY_BUFFERS,
    aliases,
    attention,
    attention_biases,
    classes,
    common,
    common_fields,
    ends,
    feed_forward,
    norms,
    older_prefix,
    rename,
)
from lm.hf.families.mistral import refuse_biases
from lm.hf.families.table import Map
from lm.models import Qwen2, Qwen3, Task


def read_qwen2(f: Fields, task: Task) -> Qwen2:
    f.expect("use_mrope", False, why="multimodal rotary positions are not supported")
    return Qwen2(**_shared(f, task))


def read_qwen3(f: Fields, task: Task) -> Qwen3:
    head_dim = f.given("head_dim", default=128)
    return Qwen3(**_shared(f, task) | {"head_dim": head_dim}, attention_bias=f.take("attention_bias", default=False))


def _shared(f: Fields, task: Task) -> dict[str, Any]:
    kv_heads = f.given("num_key_value_heads", default=32)
    shared = common(f, task) | {"n_kv_heads": kv_heads}
    window = f.given("sliding_window", default=4096) if f.take("use_sliding_window", default=False) else None
    first = f.take("max_window_layers", default=28)
    n = shared["n_layers"]
    windowed = f.windowed(n, default=[i >= first for i in range(n)])
    f.ignore("sliding_window")  # says nothing without use_sliding_window
    return shared | ({} if window is None else {"window": window, "windowed": windowed})


def write_qwen2(m: Qwen2) -> dict[str, Any]:
    refuse_biases(m, attention=True)
    return common_fields(m) | windows(m)


def write_qwen3(m: Qwen3) -> dict[str, Any]:
    refuse_biases(m, attention=None)
    return common_fields(m) | windows(m) | {"attention_bias": m.attention_bias}


def windows(m: Any) -> dict[str, Any]:
    """Writes the fields of the windows; max_window_layers is what versions before layer_types read."""
    windowed = [layer.window is not None for layer in m.order]
    return {
        "use_sliding_window": m.window is not None,
        "sliding_window": m.window,
        "max_window_layers": windowed.index(True) if any(windowed) else m.n_layers,
        "layer_types": layer_types(m),
    }


def layer_types(m: Any) -> list[str]:
    """The inverse of `Fields.windowed`."""
    return ["full_attention" if layer.window is None else "sliding_attention" for layer in m.order]


def table_qwen2(m: Qwen2) -> list[Map]:
    return older_prefix(m, ends(m) + attention() + attention_biases(out=False) + feed_forward(False) + norms())


def table_qwen3(m: Qwen3) -> list[Map]:
    biases = attention_biases(out=True) if m.attention_bias else []
    return older_prefix(m, ends(m) + attention() + biases + head_norms() + feed_forward(False) + norms())


def head_norms() -> list[Map]:
    at = "model.layers.{}.self_attn."
    return [Map(f"layers.attn.{n}_norm.scale", f"{at}{n}_norm.weight") for n in "qk"]


QWEN2_FAMILY = Family(
    model_types=("qwen2",),
    classes=classes("Qwen2"),
    read=read_qwen2,
    write=write_qwen2,
    table=table_qwen2,
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
QWEN3_FAMILY = Family(
    model_types=("qwen3",),
    classes=classes("Qwen3"),
    read=read_qwen3,
    write=write_qwen3,
    table=table_qwen3,
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
