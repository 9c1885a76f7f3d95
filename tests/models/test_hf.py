"""GPT-2 and LLaMA against transformers, with the same random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.models import GPT2, Llama
from lm.models.base import abstract
from lm.nn.position import Rope
from tests.models.reference import random_params

B, S, V, D, N, H = 2, 13, 97, 24, 2, 4
TOKENS = np.random.default_rng(0).integers(0, V, (B, S))
pytestmark = pytest.mark.hf


def our_logits(model, params) -> np.ndarray:
    def forward(params, tokens):
        module = nnx.merge(abstract(model).graphdef, params)
        return module.logits(module(tokens, dtype=jnp.float32)[0])

    return np.asarray(jax.jit(forward)(params, TOKENS))


def their_logits(torch, model, weights: dict[str, np.ndarray]) -> np.ndarray:
    """`weights` must be all that the model has, and fit it."""
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, strict=True)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def gpt2_weights(p: dict) -> dict[str, np.ndarray]:
    table = p["embed"]["table"]
    out = {"transformer.wte.weight": table, "lm_head.weight": table, "transformer.wpe.weight": p["positions"]["table"]}
    out |= {"transformer.ln_f.weight": p["norm"]["scale"], "transformer.ln_f.bias": p["norm"]["bias"]}
    for i in range(N):
        at = f"transformer.h.{i}"
        layer = jax.tree.map(lambda a: a[i], p["layers"])  # noqa: B023, called at once
        attn, mlp = layer["attn"], layer["mlp"]
        for theirs, ours in {"ln_1": "norm1", "ln_2": "norm2"}.items():
            out |= {f"{at}.{theirs}.weight": layer[ours]["scale"], f"{at}.{theirs}.bias": layer[ours]["bias"]}
        out[f"{at}.attn.c_attn.weight"] = np.concatenate([attn[n].reshape(D, D) for n in "qkv"], axis=1)
        out[f"{at}.attn.c_attn.bias"] = np.concatenate([attn[f"{n}_bias"].reshape(D) for n in "qkv"])
        out |= {f"{at}.attn.c_proj.weight": attn["o"].reshape(D, D), f"{at}.attn.c_proj.bias": attn["o_bias"]}
        for theirs, ours in {"c_fc": "up", "c_proj": "down"}.items():
            out |= {f"{at}.mlp.{theirs}.weight": mlp[ours], f"{at}.mlp.{theirs}.bias": mlp[f"{ours}_bias"]}
    return out


def llama_weights(p: dict) -> dict[str, np.ndarray]:
    """torch's linear layers are [out, in]."""
    out = {"model.embed_tokens.weight": p["embed"]["table"], "model.norm.weight": p["norm"]["scale"]}
    out["lm_head.weight"] = p["head" if "head" in p else "embed"]["table"]
    for i in range(N):
        at = f"model.layers.{i}"
        layer = jax.tree.map(lambda a: a[i], p["layers"])  # noqa: B023, called at once
        out[f"{at}.input_layernorm.weight"] = layer["norm1"]["scale"]
        out[f"{at}.post_attention_layernorm.weight"] = layer["norm2"]["scale"]
        for n in "qkv":
            out[f"{at}.self_attn.{n}_proj.weight"] = layer["attn"][n].reshape(D, -1).T
        out[f"{at}.self_attn.o_proj.weight"] = layer["attn"]["o"].reshape(-1, D).T
        for n in ("gate", "up", "down"):
            out[f"{at}.mlp.{n}_proj.weight"] = layer["mlp"][n].T
    return out


def test_gpt2_logits_agree_with_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = GPT2(vocab_size=V, d_model=D, n_layers=N, n_heads=H, max_positions=17)
    config = transformers.GPT2Config(vocab_size=V, n_positions=17, n_embd=D, n_layer=N, n_head=H)
    params = random_params(ours)
    theirs = their_logits(torch, transformers.GPT2LMHeadModel(config), gpt2_weights(params))
    np.testing.assert_allclose(our_logits(ours, params), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_logits_agree_with_transformers(tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = Llama(
        vocab_size=V,
        d_model=D,
        n_layers=N,
        n_heads=H,
        n_kv_heads=2,
        head_dim=10,
        d_ff=40,
        rope=Rope(theta=50.0),
        tied=tied,
    )
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=N,
        num_attention_heads=H,
        num_key_value_heads=2,
        head_dim=10,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        tie_word_embeddings=tied,
    )
    params = random_params(ours)
    theirs = their_logits(torch, transformers.LlamaForCausalLM(config), llama_weights(params))
    np.testing.assert_allclose(our_logits(ours, params), theirs, rtol=0, atol=1e-4)
