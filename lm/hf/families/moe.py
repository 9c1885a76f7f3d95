"""Mixtral and Qwen3-MoE on disk: a tensor for each expert, as their files have it and as is written, or the experts
of a layer in one, as transformers 5 holds them in memory and may store them."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.errors import UserError
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
from lm.hf.families.qwen import head_norms
from lm.hf.families.table import Map
from lm.models import Mixtral, Qwen3Moe, Task

# Of the loss of training and not of the model; whoever computes that loss reads them.
ROUTER_LOSS = ("router_aux_loss_coef", "output_router_logits")


def read_mixtral(f: Fields, task: Task) -> Mixtral:
    f.ignore(*ROUTER_LOSS, "router_jitter_noise")  # the last: noise of training
    kv_heads = f.given("num_key_value_heads", default=8)
    return Mixtral(
        **common(f, task, theta=1_000_000.0, eps=1e-5) | {"n_kv_heads": kv_heads},
        window=f.given("sliding_window", default=None),
        n_experts=f.take("num_local_experts", "num_experts", default=8),
        top_k=f.take("num_experts_per_tok", default=2),
    )


def read_qwen3_moe(f: Fields, task: Task) -> Qwen3Moe:
    f.ignore(*ROUTER_LOSS, "max_window_layers")  # the last: its class knows windows in all layers or in none
    kv_heads = f.given("num_key_value_heads", default=4)
    shared = common(f, task) | {"n_kv_heads": kv_heads}
    window = f.given("sliding_window", default=4096)
    step, dense = f.take("decoder_sparse_step", default=1), f.take("mlp_only_layers", default=())
    if step < 1:
        raise UserError(f"{f.where}: decoder_sparse_step: expected a positive number of layers, got {step}")
    return Qwen3Moe(
        **shared,
        attention_bias=f.take("attention_bias", default=False),
        window=window if f.take("use_sliding_window", default=False) else None,
        n_experts=f.take("num_experts", "num_local_experts", default=128),
        top_k=f.take("num_experts_per_tok", default=8),
        expert_d_ff=f.take("moe_intermediate_size", default=768),
        normalize=f.take("norm_topk_prob", default=False),
        dense=tuple(i for i in range(shared["n_layers"]) if i in dense or (i + 1) % step),
    )


def write_mixtral(m: Mixtral) -> dict[str, Any]:
    refuse_biases(m, attention=False)
    own = {"sliding_window": m.window, "num_local_experts": m.n_experts, "num_experts_per_tok": m.top_k}
    return common_fields(m) | own


def write_qwen3_moe(m: Qwen3Moe) -> dict[str, Any]:
    refuse_biases(m, attention=None)
    return common_fields(m) | {
        "attention_bias": m.attention_bias,
        "use_sliding_window": m.window is not None,
        "sliding_window": m.window,
        "num_local_experts": m.n_experts,
        "num_experts_per_tok": m.top_k,
        "moe_intermediate_size": m.expert_d_ff,
        "norm_topk_prob": m.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(m.dense),
    }


def table_mixtral(m: Mixtral) -> list[Map]:
    at = "model.layers.{}.block_sparse_moe."
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return _mixtral(m) + router(at) + experts(at, names)


def fused_mixtral(m: Mixtral) -> list[Map]:
    at = "model.layers.{}.mlp."
    return _mixtral(m) + router(at) + fused_experts(at)


def _mixtral(m: Mixtral) -> list[Map]:
    return ends(m) + attention() + norms()


def table_qwen3_moe(m: Qwen3Moe) -> list[Map]:
    names = {n: f"{n}_proj" for n in ("gate", "up", "down")}
    return _qwen3_moe(m, experts("model.layers.{}.mlp.", names))


def fused_qwen3_moe(m: Qwen3Moe) -> list[Map]:
    return _qwen3_moe(m, fused_experts("model.layers.{}.mlp."))


def _qwen3_moe(m: Qwen3Moe, expert_rows: list[Map]) -> list[Map]:
    shared = attention() + head_norms() + norms() + (attention_biases(out=True) if m.attention_bias else [])
    routed = shared + router("model.layers.{}.mlp.") + expert_rows
    rows = ends(m) + [numbered(row, [i for i in range(m.n_layers) if i not in m.dense], m.n_experts) for row in routed]
    if m.dense:
        for row in shared + feed_forward(False):
            dense = dataclasses.replace(row, ours=str(row.ours).replace("layers.", "dense_layers.", 1))
            rows.append(numbered(dense, sorted(m.dense), m.n_experts))
    return older_prefix(m, rows)


def numbered(row: Map, layers: list[int], n_experts: int) -> Map:
    """The row of a block that holds `layers` only."""
    if row.theirs.count("{}") == 1:
        return dataclasses.replace(row, at=tuple((i,) for i in layers))
    return dataclasses.replace(row, at=tuple((i, e) for i in layers for e in range(n_experts)))


def router(at: str) -> list[Map]:
    return [Map("layers.mlp.router", f"{at}gate.weight", "e d -> d e")]


def experts(at: str, names: dict[str, str]) -> list[Map]:
    pattern = {"gate": "f d -> d f", "up": "f d -> d f", "down": "d f -> f d"}
    return [Map(f"layers.mlp.{n}", f"{at}experts.{{}}.{name}.weight", pattern[n]) for n, name in names.items()]


def fused_experts(at: str) -> list[Map]:
    return [
        Map(("layers.mlp.gate", "layers.mlp.up"), f"{at}experts.gate_up_proj", "e (n f) d -> n e d f"),
        Map("layers.mlp.down", f"{at}experts.down_proj", "e d f -> e f d"),
    ]


MIXTRAL_FAMILY = Family(
    model_types=("mixtral",),
    classes=classes("Mixtral"),
    read=read_mixtral,
    write=write_mixtral,
    table=table_mixtral,
    other_tables=(fused_mixtral,),
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
QWEN3_MOE_FAMILY = Family(
    model_types=("qwen3_moe",),
    classes=classes("Qwen3Moe"),
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    table=table_qwen3_moe,
    other_tables=(fused_qwen3_moe,),
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
