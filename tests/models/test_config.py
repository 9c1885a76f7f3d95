"""Model configs: what they refuse, and the arithmetic of their cost."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lm.errors import UserError
from lm.models import GPT2, Llama
from lm.models.base import abstract, init
from lm.models.cost import count, flops_per_token
from lm.nn.param import paths
from tests.tolerances import assert_equal

LLAMA = Llama(vocab_size=97, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(d_model=0), r"model.d_model: expected at least 1, got 0"),
        (dict(n_layers=-1), r"model.n_layers"),
        (dict(dropout=1.0), r"model.dropout: expected a rate in \[0, 1\), got 1.0"),
        (dict(n_heads=5, n_kv_heads=5), r"model.n_heads: 5 does not divide model.d_model 24"),
        (dict(n_kv_heads=3), r"model.n_kv_heads: 3 does not divide model.n_heads 4"),
        (dict(d_ff=0), r"model.d_ff: expected at least 1, got 0"),
        (dict(n_kv_heads=-2), r"model.n_kv_heads: expected at least 1, got -2"),
        (dict(head_dim=0), r"model.head_dim: expected at least 1, got 0"),
        (dict(head_dim=5), r"model.head_dim: rotary positions need an even number, got 5"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_gpt2_needs_positions():
    with pytest.raises(UserError, match="model.max_positions: expected at least 1, got 0"):
        GPT2(max_positions=0)


def test_gpt2_needs_a_layer_in_its_pattern():
    with pytest.raises(UserError, match="model.windowed: expected a pattern of at least one layer"):
        GPT2(windowed=())


def test_head_dim_frees_the_width_from_the_number_of_heads():
    model = dataclasses.replace(LLAMA, n_heads=5, n_kv_heads=5, head_dim=6)
    assert abstract(model).params["layers"]["attn"]["o"].shape == (3, 5, 6, 24)


def test_gpt2_by_default_has_the_124m_parameters_of_the_paper():
    assert count(abstract(GPT2()).infos) == 124_439_808  # openai-community/gpt2


def test_llama_7b_has_the_6_7_billion_parameters_of_the_paper():
    model = Llama(vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008)
    assert count(abstract(model).infos) == 6_738_415_616  # huggyllama/llama-7b


def test_flops_count_the_matmuls():
    s, d, f, v = 13, 24, 40, 97
    layer = d * 4 * 6 + 2 * d * 2 * 6 + 4 * 6 * d + 3 * d * f
    norms = (2 * 3 + 1) * d
    attention = 3 * (4 * 6) * s  # layers x width x length, for q k^T and again for the weighted sum
    for model in (LLAMA, dataclasses.replace(LLAMA, tied=True)):
        flops = flops_per_token(model, abstract(model).infos, s)
        assert flops.full == 6 * (3 * layer + v * d + norms) + 3 * 2 * 2 * attention
        assert flops.causal == 6 * (3 * layer + v * d + norms) + 3 * 2 * attention
    gpt2 = GPT2(vocab_size=v, d_model=d, n_layers=3, n_heads=4, max_positions=50)
    longer = dataclasses.replace(gpt2, max_positions=100)
    assert flops_per_token(gpt2, abstract(gpt2).infos, s) == flops_per_token(longer, abstract(longer).infos, s)


def test_initial_parameters():
    """As declared in shape, as asked in standard deviation, different in every layer, and the same for the same key."""
    model = Llama(vocab_size=499, d_model=48, n_layers=8, n_heads=4, d_ff=80, init_std=0.05)
    make = jax.jit(lambda key: init(model, key))
    params = make(jax.random.key(3))
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert shapes == jax.tree.map(lambda p: (p.shape, p.dtype), abstract(model).params)
    assert paths(params).keys() == paths(abstract(model).infos).keys()

    flat = paths(params)
    for path in ("embed.table", "head.table", "layers.attn.q", "layers.mlp.up"):
        np.testing.assert_allclose(np.std(flat[path]), 0.05, rtol=0.05, err_msg=path)
    for path in ("layers.attn.o", "layers.mlp.down"):  # scaled by the number of additions to the residual, 2 x 8
        np.testing.assert_allclose(np.std(flat[path]), 0.05 / 4, rtol=0.05, err_msg=path)
    assert (flat["layers.norm1.scale"] == 1).all()

    q = np.asarray(flat["layers.attn.q"])
    assert all((q[i] != q[j]).all() for i in range(8) for j in range(i))
    assert (np.asarray(flat["embed.table"]) != np.asarray(flat["head.table"])).mean() > 0.99
    assert_equal(make(jax.random.key(3)), params)
    assert (np.asarray(make(jax.random.key(4))["layers"]["attn"]["q"]) != q).mean() > 0.99


def test_biases_norms_and_positions_are_not_decayed_and_every_dimension_is_named():
    infos = paths(abstract(GPT2(vocab_size=97, d_model=24, n_layers=3, n_heads=4)).infos)
    assert {p for p, i in infos.items() if i.decay} == {
        "embed.table",
        *(f"layers.attn.{n}" for n in "qkvo"),
        "layers.mlp.up",
        "layers.mlp.down",
    }
    assert all(len(i.axes) == len(i.shape) for i in infos.values())
    assert all((i.axes[0] == "layers") == p.startswith("layers.") for p, i in infos.items())
    assert infos["layers.attn.q"].axes == ("layers", "embed", "heads", "head_dim")
