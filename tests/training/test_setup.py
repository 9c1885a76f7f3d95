from __future__ import annotations

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.errors import UserError
from lm.mesh import Mesh
from lm.models.base import abstract
from lm.models.cost import count
from lm.sharding import Rules
from lm.training.memory import device_bytes
from lm.training.setup import Setup, compute_dtype
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal
from tests.training.runs import ADAMW, LLAMA, V, batch, config, make_setup, put, start

MESH = Mesh(fsdp=4, tensor=2)
CONFIG = config(optim=dataclasses.replace(ADAMW, ema_decay=0.9))


@functools.cache
def setup(mesh: Mesh = MESH) -> Setup:
    return make_setup(CONFIG, mesh)


def test_make_and_lower_put_nothing_on_a_device():
    gc.collect()
    before = len(jax.live_arrays())
    fresh = make_setup(CONFIG, MESH)
    lowered = fresh.lower()
    assert len(jax.live_arrays()) == before
    assert "tensor" in lowered.as_text()  # Shardy's text names the axes of the mesh: the step was lowered for it


def test_initial_state_is_the_abstract_one_with_values_and_the_same_on_any_mesh():
    sharded, single = setup().init(), setup(Mesh()).init()
    for path, (real, planned) in paired(sharded, setup().abstract_state).items():
        assert (real.shape, real.dtype) == (planned.shape, planned.dtype), path
        assert real.sharding.is_equivalent_to(planned.sharding, real.ndim), path
    assert_equal(jax.tree.map(np.array, sharded), jax.tree.map(np.array, single))
    assert_equal(sharded.ema, sharded.params)
    assert int(sharded.step) == 0 and all((np.asarray(x) == 0).all() for x in jax.tree.leaves(sharded.opt))
    # The arithmetic of `device_bytes` is what a device holds.
    held = {
        k: sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(v)) for k, v in sharded._asdict().items()
    }
    planned = device_bytes(dataclasses.replace(CONFIG, mesh=MESH), 8)
    assert (planned.params, planned.optimizer, planned.ema) == (held["params"], held["opt"], held["ema"])
    assert planned.gradients == planned.params and planned.total == sum(held.values()) - 4 + planned.gradients
    assert device_bytes(dataclasses.replace(CONFIG, mesh=Mesh()), 1).params == 4 * count(setup().infos)


def test_parameters_are_cut_where_the_rules_say():
    spec = lambda *path: functools.reduce(lambda t, k: t[k], path, setup().abstract_state.params).sharding.spec
    assert tuple(spec("layers", "attn", "q")) == (None, "fsdp", "tensor", None)
    assert tuple(spec("embed", "table")) == ("tensor", "fsdp")
    assert tuple(spec("norm", "scale")) == (None,)
    assert tuple(setup().batch_shardings["tokens"].spec) == (("data", "fsdp", "expert"), None)


def test_score_on_a_mesh_is_that_of_the_objective_on_one_device():
    s = setup()
    token_bytes = np.arange(V, dtype=np.int32)
    params = start(s).params
    score = s.score(params, put(batch(0), s.batch_shardings), token_bytes)
    alone = jax.jit(
        lambda params, b: CONFIG.objective.score(
            nnx.merge(abstract(LLAMA).graphdef, params), b, jnp.asarray(token_bytes), dtype=jnp.float32
        )
    )(random_params(LLAMA), batch(0))
    assert_close(tuple(score), tuple(alone))
    assert not jax.tree.leaves(params)[0].is_deleted()


def test_auto_precision_is_float32_on_a_cpu():
    assert compute_dtype("auto", setup().mesh) == jnp.float32
    assert compute_dtype("bfloat16", setup().mesh) == jnp.bfloat16


TENSOR = Mesh(fsdp=1, tensor=8)


@pytest.mark.parametrize(
    "sections, mesh, message",
    [
        (dict(model=dict(vocab_size=104)), TENSOR, r"^layers\.attn\.k: axis 'kv_heads' of size 2 .* axis tensor=8"),
        (dict(), TENSOR, r"^embed\.table: axis 'vocab' of size 98 .* axis tensor=8; set Rules\(vocab=None\)"),
        (
            dict(rules=Rules(mlp="fsdp")),
            Mesh(fsdp=2),
            r"^layers\.mlp\.down: axes 'mlp' and 'embed' both go to .* 'fsdp'",
        ),
        (dict(data=dict(batch_size=6)), MESH, r"^tokens: axis 'act_batch' of size 6 is not divisible by .* fsdp=4"),
    ],
)
def test_what_does_not_fit_the_mesh_is_refused_by_path(sections, mesh, message):
    with pytest.raises(UserError, match=message):
        make_setup(config(**sections), mesh)


def test_activations_that_do_not_fit_are_refused_when_the_step_is_lowered():
    with pytest.raises(UserError, match=r"'act_seq' of size 12 is not divisible by mesh axis seq=8"):
        make_setup(config(), Mesh(fsdp=1, seq=8)).lower()


def test_rules_name_the_mesh_axis_that_does_not_exist():
    with pytest.raises(UserError, match=r"rules\.embed: no mesh axis 'fdsp'; did you mean 'fsdp'\?"):
        Rules(embed="fdsp")
    with pytest.raises(UserError, match=r"layers\.q: no logical axis 'head'; did you mean 'heads'\?"):
        Rules().spec(("embed", "head"), "layers.q")


def paired(a, b) -> dict:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    flat = jax.tree_util.tree_leaves_with_path(a)
    return {jax.tree_util.keystr(path): (x, y) for (path, x), y in zip(flat, jax.tree.leaves(b))}
