"""Rules against specs written by hand, and against what JAX makes of them on 8 virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.errors import UserError
from lm.mesh import Mesh, make_mesh
from lm.sharding import Rules

SIZES = {"data": 2, "fsdp": 3, "expert": 1, "seq": 5, "tensor": 4}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh(data=2, fsdp=2, tensor=2))


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "axes", "spec"),
    [
        (Rules(), ("embed", "heads", "head_dim"), P("fsdp", "tensor", None)),
        (Rules(), ("layers", "embed", "mlp"), P(None, "fsdp", "tensor")),
        (Rules(), ("norm",), P(None)),
        (Rules(), (None, "vocab"), P(None, "tensor")),
        (Rules(), ("act_batch", "act_seq", "act_embed"), P(("data", "fsdp", "expert"), "seq", None)),
        (Rules(), (), P()),
        (Rules(embed=None), ("embed", "mlp"), P(None, "tensor")),
        (Rules(embed=("fsdp", "data")), ("embed", "mlp"), P(("fsdp", "data"), "tensor")),
    ],
)
def test_spec_places_each_named_dimension(rules, axes, spec):
    assert rules.spec(axes) == spec
    assert len(rules.spec(axes)) == len(axes)


def test_weights_and_activations_do_not_share_a_rule():
    weights, activations = (
        {f.name for f in dataclasses.fields(Rules) if f.name.startswith("act_") == a} for a in (0, 1)
    )
    assert {f"act_{w}" for w in weights} & activations == {
        f"act_{n}" for n in ("embed", "heads", "kv_heads", "mlp", "vocab", "experts")
    }
    assert Rules(embed=None).spec(("act_embed", "act_mlp")) == Rules().spec(("act_embed", "act_mlp"))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("embd", "mlp"), "layers.mlp.up: no logical axis 'embd'; did you mean 'embed'?"),
        (
            ("heads", "mlp"),
            "layers.mlp.up: axes 'heads' and 'mlp' both go to mesh axis 'tensor'; "
            "set one of rules.heads, rules.mlp to None",
        ),
        (
            ("embed", "act_batch"),
            "layers.mlp.up: axes 'embed' and 'act_batch' both go to mesh axis 'fsdp'; "
            "set one of rules.embed, rules.act_batch to None",
        ),
    ],
)
def test_an_unknown_or_colliding_axis_is_refused_with_the_parameter(axes, message):
    with pytest.raises(UserError) as e:
        Rules().spec(axes, "layers.mlp.up")
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"embed": "fspd"}, "rules.embed: no mesh axis 'fspd'; did you mean 'fsdp'?"),
        (
            {"act_batch": ("data", "model")},
            "rules.act_batch: no mesh axis 'model'; known: data, expert, fsdp, seq, tensor",
        ),
        (
            {"act_batch": ("data", "fsdp", "data")},
            "rules.act_batch: expected each mesh axis once, got ('data', 'fsdp', 'data'); drop one",
        ),
    ],
)
def test_rules_name_mesh_axes_once(rules, message):
    with pytest.raises(UserError) as e:
        Rules(**rules)
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("rules", "axes", "shape", "message"),
    [
        (
            Rules(),
            ("layers", "embed", "kv_heads", "head_dim"),
            (7, 9, 2, 5),
            "layers.attn.k: axis 'kv_heads' of size 2 is not divisible by mesh axis tensor=4; "
            "set Rules(kv_heads=None) or another mesh",
        ),
        (
            Rules(),
            ("act_batch", None),
            (20, 3),
            "layers.attn.k: axis 'act_batch' of size 20 is not divisible by mesh axis data=2 x fsdp=3 x expert=1; "
            "set Rules(act_batch=None) or another mesh",
        ),
        (
            Rules(),
            ("embed", "mlp"),
            (9, 8, 2),
            "layers.attn.k: 2 axes ('embed', 'mlp') for an array of shape (9, 8, 2)",
        ),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_axis_mesh_and_way_out(rules, axes, shape, message):
    with pytest.raises(UserError) as e:
        sharding.spec_for(rules, SIZES, axes, shape, "layers.attn.k")
    assert str(e.value) == message
    if axes[2:]:
        fixed = dataclasses.replace(rules, kv_heads=None)
        assert sharding.spec_for(fixed, SIZES, axes, shape, "layers.attn.k") == P(None, "fsdp", None, None)


# --- on devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "axes", "shape"),
    [
        (Rules(), ("embed", "heads", "head_dim"), (6, 10, 7)),
        (Rules(), ("layers", "norm"), (3, 5)),
        (Rules(), ("vocab", "embed"), (22, 26)),
        (Rules(), ("act_batch", "act_seq", "act_vocab"), (12, 5, 14)),
        (Rules(mlp=("tensor", "data")), ("embed", "mlp"), (6, 20)),
        (Rules(), (None,), (1,)),
        (Rules(), (), ()),
    ],
)
def test_shard_shape_is_the_shape_that_jax_places_on_a_device(mesh, rules, axes, shape):
    spec = sharding.spec_for(rules, mesh.shape, axes, shape, "x")
    named = NamedSharding(mesh, spec)
    placed = jax.device_put(np.zeros(shape, np.float32), named)
    assert sharding.shard_shape(mesh.shape, spec, shape) == named.shard_shape(shape)
    assert {s.data.shape for s in placed.addressable_shards} == {named.shard_shape(shape)}


def test_shardings_follow_the_structure_and_name_the_path_of_a_misfit(mesh):
    abstract = {
        "layers": {"up": jax.ShapeDtypeStruct((6, 10), jnp.float32)},
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    axes = {"layers": {"up": ("embed", "mlp")}, "count": ()}
    assert sharding.shardings(Rules(), mesh, axes, abstract) == {
        "layers": {"up": NamedSharding(mesh, P("fsdp", "tensor"))},
        "count": NamedSharding(mesh, P()),
    }
    abstract["layers"]["up"] = jax.ShapeDtypeStruct((6, 11), jnp.float32)
    with pytest.raises(UserError, match=r"^layers.up: axis 'mlp' of size 11 is not divisible by mesh axis tensor=2"):
        sharding.shardings(Rules(), mesh, axes, abstract)


def test_constrain_does_nothing_outside_a_scope_or_on_one_device(mesh):
    x = jnp.zeros((3, 5))
    assert sharding.constrain(x, "act_batch", "act_mlp") is x
    with sharding.scope(make_mesh(Mesh(), jax.devices()[:1]), Rules()):
        assert sharding.constrain(x, "act_batch", "act_mlp") is x
    with pytest.raises(RuntimeError), sharding.scope(mesh, Rules()):
        raise RuntimeError
    assert sharding.constrain(x, "act_batch", "act_mlp") is x


def test_constrain_places_an_array_and_keeps_its_values(mesh):
    x = np.arange(12 * 3 * 10, dtype=np.float32).reshape(12, 3, 10)

    @jax.jit
    def f(x):
        with sharding.scope(mesh, Rules()):
            return sharding.constrain(x * 1.0, "act_batch", None, "act_mlp")

    y = f(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3)
    np.testing.assert_array_equal(y, x)


def test_constrain_refuses_an_activation_that_does_not_divide(mesh):
    with pytest.raises(UserError) as e, sharding.scope(mesh, Rules()):
        sharding.constrain(jnp.zeros((12, 5)), "act_batch", "act_mlp")
    assert str(e.value) == (
        "activation ('act_batch', 'act_mlp'): axis 'act_mlp' of size 5 is not divisible by mesh axis tensor=2; "
        "set Rules(act_mlp=None) or another mesh"
    )


def test_the_inner_scope_counts_and_the_outer_comes_back(mesh):
    def placed(x):
        return sharding.constrain(x, "act_mlp")

    x, outer, inner = np.zeros(4), Rules(), Rules(act_mlp=None)
    with sharding.scope(mesh, outer):
        with sharding.scope(mesh, inner):
            assert jax.jit(placed)(x).sharding.is_fully_replicated
        assert not jax.jit(lambda x: placed(x))(x).sharding.is_fully_replicated
