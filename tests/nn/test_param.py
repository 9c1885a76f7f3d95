from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.mlp import MLP
from lm.nn.param import ParamInfo, cast, normal, paths, split
from tests.tolerances import assert_equal


def make() -> MLP:
    return MLP(5, 7, jax.nn.relu, rngs=nnx.Rngs(0), init=normal(0.1), out_init=normal(0.1))


def test_split_gives_plain_dicts_with_what_each_parameter_declared():
    _, params, infos = split(make())
    assert type(params) is dict and params.keys() == infos.keys() == {"up", "up_bias", "down", "down_bias"}
    assert all(isinstance(p, jax.Array) and p.dtype == jnp.float32 for p in params.values())
    assert infos["up"] == ParamInfo((5, 7), ("embed", "mlp"), True)
    assert infos["down_bias"] == ParamInfo((5,), ("norm",), False)


def test_merge_of_a_split_is_the_module():
    module = make()
    graphdef, params, _ = split(module)
    x = jnp.ones((1, 2, 5))
    assert_equal(nnx.merge(graphdef, params)(x), module(x))


def test_paths_are_dotted_and_hold_infos_whole():
    info = ParamInfo((2,), ("norm",), False)
    assert paths({"layers": {"attn": {"q": info}}, "norm": {"scale": info}}) == {
        "layers.attn.q": info,
        "norm.scale": info,
    }


def test_a_parameter_is_cast_to_the_activation_and_stays_float32():
    module = make()
    assert cast(module.up, jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
    assert module.up[...].dtype == jnp.float32
    assert module(jnp.ones((1, 2, 5), jnp.bfloat16))[0].dtype == jnp.bfloat16
