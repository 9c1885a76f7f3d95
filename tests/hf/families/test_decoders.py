"""The decoders' configs and layouts without torch: published configs, both layouts of experts, float64 references."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import config as configs
from lm.errors import UserError
from lm.hf.families import known
from lm.hf.families.fields import Fields
from lm.hf.families.moe import QWEN3_MOE_FAMILY
from lm.hf.families.table import layout
from lm.models import (
    OPT,
    Gemma,
    Gemma2,
    Gemma3,
    GPTNeo,
    GPTNeoX,
    LanguageModeling,
    Mistral,
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
)
from lm.models.base import abstract
from lm.models.cost import count, count_active
from lm.nn.param import paths
from lm.nn.position import Rope
from lm.nn.rope import LinearScaling
from tests.models.reference import random_params
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parents[3]


def read(config: dict):
    """The model that a config.json says, every field of it accounted for."""
    family = next(f for f in known.FAMILIES.values() if config["model_type"] in f.model_types)
    fields = Fields(config, "config.json", {})
    model = family.read(fields, LanguageModeling())
    fields.done()
    return model


# As they stand on the hub, less ids and names; the counts are of the tensors there.
HUB = {
    "gpt-neo-1.3B": (
        """{"model_type": "gpt_neo", "activation_function": "gelu_new", "attention_dropout": 0, "attention_layers":
        ["global", "local"], "attention_types": [[["global", "local"], 12]], "embed_dropout": 0, "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": null, "layer_norm_epsilon": 1e-05, "max_position_embeddings":
        2048, "num_heads": 16, "num_layers": 24, "resid_dropout": 0, "summary_activation": null,
        "summary_first_dropout": 0.1, "summary_type": "cls_index", "vocab_size": 50257, "window_size": 256}""",
        1_315_575_808,
    ),
    "pythia-160m": (
        """{"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 12,
        "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false,
        "torch_dtype": "float16", "use_parallel_residual": true, "vocab_size": 50304}""",
        162_322_944,
    ),
    "opt-350m": (
        """{"model_type": "opt", "_remove_final_layer_norm": false, "activation_dropout": 0.0, "activation_function":
        "relu", "attention_dropout": 0.0, "do_layer_norm_before": false, "dropout": 0.1, "ffn_dim": 4096, "hidden_size":
        1024, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "num_attention_heads": 16,
        "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>", "vocab_size": 50272,
        "word_embed_proj_dim": 512}""",
        331_196_416,
    ),
    "Mistral-7B-v0.1": (
        """{"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 32000}""",
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        """{"model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "use_mrope": false,
        "use_sliding_window": false, "vocab_size": 151936}""",
        494_032_768,
    ),
    "Qwen3-0.6B": (
        """{"model_type": "qwen3", "attention_bias": false, "attention_dropout": 0.0, "head_dim": 128, "hidden_act":
        "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings":
        40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}""",
        596_049_920,
    ),
    "gemma-2b": (
        """{"model_type": "gemma", "attention_bias": false, "attention_dropout": 0.0, "head_dim": 256, "hidden_act":
        "gelu", "hidden_activation": null, "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 16384,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000.0, "vocab_size": 256000}""",
        2_506_172_416,
    ),
    "gemma-2-2b": (
        """{"model_type": "gemma2", "attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act":
        "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 256000}""",
        2_614_341_888,
    ),
    "gemma-3-1b-pt": (
        """{"model_type": "gemma3_text", "attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping":
        null, "cache_implementation": "hybrid", "final_logit_softcapping": null, "head_dim": 256, "hidden_activation":
        "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144}""",
        999_885_952,
    ),
    "Mixtral-8x7B-v0.1": (
        """{"model_type": "mixtral", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads":
        32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": null, "tie_word_embeddings": false, "vocab_size": 32000}""",
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        """{"model_type": "qwen3_moe", "attention_bias": false, "attention_dropout": 0.0, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936}""",
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_has_the_published_number_of_parameters(name):
    text, published = HUB[name]
    assert count(abstract(read(json.loads(text))).infos) == published


@pytest.mark.parametrize("name", HUB)
def test_an_unknown_field_in_a_published_config_is_refused(name):
    with pytest.raises(UserError, match=r"config.json: unknown field 'new_trick' = 1"):
        read(json.loads(HUB[name][0]) | {"new_trick": 1})


def test_a_published_config_tells_windows_and_rotations():
    gemma = read(json.loads(HUB["gemma-3-1b-pt"][0]))
    assert [(layer.window, layer.rotation) for layer in gemma.order[4:8]] == [(512, 1), (None, 0), (512, 1), (512, 1)]
    assert gemma.ropes == (Rope(theta=1e6), Rope(theta=1e4))
    assert {layer.window for layer in read(json.loads(HUB["Qwen2.5-0.5B"][0])).order} == {None}
    assert {layer.window for layer in read(json.loads(HUB["Mistral-7B-v0.1"][0])).order} == {4096}
    assert [layer.window for layer in read(json.loads(HUB["gpt-neo-1.3B"][0])).order[:3]] == [None, 256, None]


SMALL = {"vocab_size": 97, "d_model": 20, "n_layers": 3, "n_heads": 4}
LLAMA = SMALL | {"d_ff": 23, "n_kv_heads": 2, "head_dim": 6}
MODELS = {
    "gpt_neo": GPTNeo(**SMALL, window=5, windowed=(False, True, True), dropout=0.2, attention_dropout=0.1),
    "gpt_neox": GPTNeoX(**SMALL, d_ff=23, rope=Rope(theta=500.0, fraction=0.4), parallel=False, attention_bias=False),
    "opt": OPT(**SMALL, d_ff=23, embed_dim=14, post_norm=True, pad_id=1, attention_dropout=0.1),
    "opt without norm": OPT(
        **SMALL, d_ff=23, embed_dim=20, final_norm=False, bias=False, pad_id=1, attention_dropout=0.0
    ),
    "mistral": Mistral(**LLAMA, window=None, rope=Rope(scaling=LinearScaling(factor=2.0)), attention_dropout=0.0),
    "qwen2": Qwen2(**LLAMA, window=5, windowed=(False, True, True), attention_dropout=0.0),
    "qwen3": Qwen3(**LLAMA, attention_bias=True, tied=True, attention_dropout=0.0),
    "gemma": Gemma(**LLAMA, attention_bias=True, tied=False, pad_id=0, attention_dropout=0.0),
    "gemma2": Gemma2(**LLAMA, attention_softcap=None, query_pre_attn_scalar=7.5, pad_id=3, attention_dropout=0.0),
    "gemma3": Gemma3(**LLAMA, local_rope=Rope(theta=70.0), windowed=(True, False), pad_id=0, attention_dropout=0.0),
    "mixtral": Mixtral(**LLAMA, n_experts=5, window=5, attention_dropout=0.0),
    "qwen3_moe": Qwen3Moe(**LLAMA, n_experts=5, top_k=2, expert_d_ff=7, dense=(1,), attention_dropout=0.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_written_config_is_read_as_the_same_model(name):
    model = MODELS[name]
    family, _ = known.of_model(model)
    written = json.loads(json.dumps(family.write(model))) | {"model_type": family.model_types[0]}
    again = read(written)
    # Whether a width is said or derived, and a pattern repeated or spelt out, makes no difference.
    same = {"order", "kv_shape"} & set(dir(model))
    assert {n: getattr(again, n) for n in same} == {n: getattr(model, n) for n in same}
    loose = {"windowed": (False,)} if hasattr(model, "windowed") else {}
    loose |= {"d_ff": 1} if isinstance(model, GPTNeoX) else {}
    loose |= {"dropout": 0.0, "attention_dropout": model.weights_dropout}
    assert dataclasses.replace(again, **loose) == dataclasses.replace(model, **loose)


@pytest.mark.parametrize("name", MODELS)
def test_each_layout_holds_every_parameter_once(name):
    model = MODELS[name]
    family, _ = known.of_model(model)
    params = paths(random_params(model))
    shapes = {path: x.shape for path, x in params.items()}
    for rows in (family.table, *family.other_tables):
        slots = layout(rows(model), shapes)
        assert sum(np.prod(slot.shape) for slot in slots.values()) == sum(x.size for x in params.values())
        again = {path: np.full(shape, np.nan) for path, shape in shapes.items()}
        for slot in slots.values():
            stored = slot.to_theirs({p: params[p][slot.index] for p in slot.row.paths})
            assert stored.shape == slot.shape
            for path, part in slot.to_ours(stored, shapes).items():
                again[path][slot.index] = part
        assert all(np.array_equal(again[path], params[path]) for path in params)


def test_fused_experts_are_the_single_ones_stacked():
    model = MODELS["qwen3_moe"]
    params = paths(random_params(model))
    shapes = {path: x.shape for path, x in params.items()}
    single, fused = (
        {name: slot.to_theirs({p: params[p][slot.index] for p in slot.row.paths}) for name, slot in slots.items()}
        for slots in (layout(rows(model), shapes) for rows in (QWEN3_MOE_FAMILY.table, *QWEN3_MOE_FAMILY.other_tables))
    )
    for layer in (0, 2):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([single[f"{at}.{e}.{n}_proj.weight"] for e in range(5)]) for n in ("gate", "up", "down")
        )
        assert np.array_equal(fused[f"{at}.gate_up_proj"], np.concatenate([gate, up], axis=1))
        assert np.array_equal(fused[f"{at}.down_proj"], down)
    assert single["model.layers.1.mlp.gate_proj.weight"].shape == (23, 20)
    assert not any(name.startswith("model.layers.1.mlp.experts") for name in (*single, *fused))


def test_neox_stores_q_k_and_v_side_by_side_within_each_head():
    model = MODELS["gpt_neox"]
    params = paths(random_params(model))
    family, _ = known.of_model(model)
    slot = layout(family.table(model), {p: x.shape for p, x in params.items()})[
        "gpt_neox.layers.1.attention.query_key_value.weight"
    ]
    stored = slot.to_theirs({p: params[p][slot.index] for p in slot.row.paths})
    head, lane, inner = 2, 3, 7
    for n, name in enumerate("qkv"):
        assert stored[head * 3 * 5 + n * 5 + lane, inner] == params[f"layers.attn.{name}"][1, inner, head, lane]


# --- float64 references -----------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 11))


def forward(model, params) -> np.ndarray:
    def run(params, tokens):
        module = nnx.merge(abstract(model).graphdef, params)
        return module.logits(module(tokens, dtype=jnp.float32).hidden)

    return np.asarray(jax.jit(run)(params, TOKENS))


def double(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gemma_norm(x, p):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + p["scale"])


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def turned(x, theta: float, lanes: int):
    """x [B,S,H,K]: lane i and lane i + lanes/2 as a complex number, turned by position * theta^(-2i/lanes)."""
    half = lanes // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:lanes]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([z.real, z.imag, x[..., lanes:]], -1)


def attended(q, k, v, scale: float, window: int | None = None, cap: float | None = None):
    out = np.zeros_like(q)
    for b, s, h in np.ndindex(q.shape[:3]):
        group = h * k.shape[2] // q.shape[2]
        first = 0 if window is None else max(0, s - window + 1)
        scores = k[b, first : s + 1, group] @ q[b, s, h] * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, first : s + 1, group]
    return out


def rows_of(layers, n: int):
    return [jax.tree.map(lambda a: a[i], layers) for i in range(n)]  # noqa: B023, called at once


def test_neox_is_its_formula():
    model = dataclasses.replace(MODELS["gpt_neox"], parallel=True, attention_bias=True, activation="gelu_tanh")
    params = random_params(model)
    p = double(params)
    x = p["embed"]["table"][TOKENS]
    for layer in rows_of(p["layers"], 3):
        a, m = layer["attn"], layer["mlp"]
        h = layer_norm(x, layer["norm1"])
        q, k, v = (np.einsum("bsd,dhk->bshk", h, a[n]) + a[f"{n}_bias"] for n in "qkv")
        y = attended(turned(q, 500.0, 2), turned(k, 500.0, 2), v, 5**-0.5)
        y = np.einsum("bshk,hkd->bsd", y, a["o"]) + a["o_bias"]
        h = layer_norm(x, layer["norm2"])
        x = x + y + gelu_tanh(h @ m["up"] + m["up_bias"]) @ m["down"] + m["down_bias"]
    assert_close(forward(model, params), layer_norm(x, p["norm"]) @ p["head"]["table"].T)


def test_gpt_neo_is_its_formula():
    model = MODELS["gpt_neo"]
    params = random_params(model)
    p = double(params)
    x = p["embed"]["table"][TOKENS] + p["positions"]["table"][: TOKENS.shape[1]]
    for i, layer in enumerate(rows_of(p["layers"], 3)):
        a, m = layer["attn"], layer["mlp"]
        q, k, v = (np.einsum("bsd,dhk->bshk", layer_norm(x, layer["norm1"]), a[n]) for n in "qkv")
        x = x + np.einsum("bshk,hkd->bsd", attended(q, k, v, 1.0, (None, 5, 5)[i]), a["o"]) + a["o_bias"]
        h = layer_norm(x, layer["norm2"])
        x = x + gelu_tanh(h @ m["up"] + m["up_bias"]) @ m["down"] + m["down_bias"]
    assert_close(forward(model, params), layer_norm(x, p["norm"]) @ p["embed"]["table"].T)


@pytest.mark.parametrize("kind", (Gemma2, Gemma3))
def test_gemma_is_its_formula(kind):
    own = {"attention_softcap": 3.0, "logits_softcap": 4.0} if kind is Gemma2 else {"local_rope": Rope(theta=70.0)}
    model = kind(**LLAMA, query_pre_attn_scalar=7.5, window=4, windowed=(True, False), **own)
    params = random_params(model)
    p = double(params)
    x = p["embed"]["table"][TOKENS] * np.sqrt(20)
    for i, layer in enumerate(rows_of(p["layers"], 3)):
        a, m = layer["attn"], layer["mlp"]
        q, k, v = (np.einsum("bsd,dhk->bshk", gemma_norm(x, layer["norm1"]), a[n]) for n in "qkv")
        theta = 10_000.0
        if kind is Gemma3:
            q, k = gemma_norm(q, a["q_norm"]), gemma_norm(k, a["k_norm"])
            theta = 1e6 if i == 1 else 70.0
        q, k = turned(q, theta, 6), turned(k, theta, 6)
        y = attended(q, k, v, 7.5**-0.5, None if i == 1 else 4, model.attention_softcap)
        x = x + gemma_norm(np.einsum("bshk,hkd->bsd", y, a["o"]), layer["post_norm1"])
        h = gemma_norm(x, layer["norm2"])
        x = x + gemma_norm((gelu_tanh(h @ m["gate"]) * (h @ m["up"])) @ m["down"], layer["post_norm2"])
    logits = gemma_norm(x, p["norm"]) @ p["embed"]["table"].T
    assert_close(forward(model, params), 4 * np.tanh(logits / 4) if kind is Gemma2 else logits)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "gpt-neo-1.3B",
            {"attention_types": [[["global", "local"], 11]]},
            r"attention_types: expected global or local",
        ),
        ("gpt-neo-1.3B", {"activation_function": "mish"}, r"activation_function: expected one of .*, got 'mish'"),
        ("pythia-160m", {"rotary_pct": 0.05}, r"even number of rotated lanes, got int\(64 \* 0.05\) = 3"),
        (
            "opt-350m",
            {"layer_norm_elementwise_affine": False},
            r"layer_norm_elementwise_affine: expected True, got False",
        ),
        ("Qwen2.5-0.5B", {"use_mrope": True}, r"use_mrope: expected False, got True"),
        ("Qwen3-0.6B", {"layer_types": ["full_attention"] * 27}, r"layer_types: expected .* for each of 28 layers"),
        ("Qwen3-0.6B", {"layer_types": ["chunked_attention"] * 28}, r"layer_types: .* other kinds of layers"),
        ("gemma-2b", {"hidden_activation": "silu"}, r"hidden_activation: expected .*, got 'silu'"),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, r"only causal attention is supported"),
        ("gemma-3-1b-pt", {"sliding_window_pattern": 0}, r"sliding_window_pattern: expected a positive number"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, r"decoder_sparse_step: expected a positive number"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 49}, r"model.dense: .* all 48 dense; take Qwen3"),
        ("Mixtral-8x7B-v0.1", {"quantization_config": {}}, r"quantized weights are not supported"),
    ],
)
def test_what_would_be_another_model_is_refused(name, change, message):
    with pytest.raises(UserError, match=message):
        read(json.loads(HUB[name][0]) | change)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("gpt_neo", dict(windowed=()), r"model.windowed: expected a pattern of at least one layer, got \(\)"),
        ("gpt_neo", dict(window=0), r"model.window: expected at least 1, got 0"),
        ("gpt_neox", dict(rope=Rope(fraction=0.7)), r"even number of rotated lanes, got int\(5 \* 0.7\) = 3"),
        ("opt", dict(embed_dim=0), r"model.embed_dim: expected at least 1, got 0"),
        ("gemma2", dict(logits_softcap=0.0), r"model.logits_softcap: expected a number over 0, got 0.0"),
        ("gemma3", dict(query_pre_attn_scalar=-1.0), r"model.query_pre_attn_scalar: expected a number over 0"),
        ("mixtral", dict(top_k=0), r"model.top_k: expected at least 1, got 0"),
        ("qwen3_moe", dict(dense=(3,)), r"model.dense: expected each layer once, of 0 to 2, got \(3,\)"),
        ("qwen3_moe", dict(dense=(1, 1)), r"model.dense: expected each layer once"),
        ("qwen3_moe", dict(dense=(0, 1, 2)), r"all 3 dense; take Qwen3"),
    ],
)
def test_a_wrong_field_is_refused_by_name(name, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MODELS[name], **change)


@pytest.mark.parametrize("name", ("mistral", "qwen3", "gemma3", "mixtral", "qwen3_moe"))
def test_a_bias_that_the_class_of_transformers_lacks_is_not_exported(name):
    model = dataclasses.replace(MODELS[name], mlp_bias=True)
    with pytest.raises(UserError, match=r"model.mlp_bias: .* has False, got True; it cannot be exported"):
        known.of_model(model)[0].write(model)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, published",
    [
        ("gpt3_175b", 174_604_836_864),  # the paper's, and 47 rows of padding of the vocabulary
        ("llama2_7b", 6_738_415_616),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_8b", 8_190_735_360),
        ("gemma2_9b", 9_241_705_984),
        ("mixtral_8x7b", 46_702_792_704),
    ],
)
def test_a_recipe_of_a_published_size_has_its_parameters_and_says_so(recipe, published):
    path = ROOT / "configs" / f"{recipe}.py"
    model = configs.load(str(path)).model
    infos = abstract(model).infos
    assert count(infos) == published
    said = {int(n.replace(",", "")) for n in re.findall(r"\d{1,3}(?:,\d{3}){2,}", path.read_text())}
    assert {published, count_active(model, infos)} <= said
