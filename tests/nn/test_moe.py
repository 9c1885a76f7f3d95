"""Mixture of experts against loops over tokens and experts in float64, against transformers, and on a mesh."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from lm import sharding
from lm.errors import UserError
from lm.mesh import Mesh, make_mesh
from lm.nn.moe import BLOCK, MoE, Router, balance_loss, blocked_dot, grouped_dot, z_loss
from lm.nn.param import normal, split
from lm.sharding import Rules
from tests.halves import slow_but
from tests.tolerances import TOLERANCE, assert_close, assert_equal

B, S, D, F = 3, 7, 5, 11
X = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
VALID = np.random.default_rng(1).random((B, S)) < 0.7


def make(n_experts, top_k, *, d=D, f=F, **kwargs) -> MoE:
    init = normal(0.7)
    return MoE(d, f, n_experts, top_k, jax.nn.silu, rngs=nnx.Rngs(3), init=init, out_init=init, **kwargs)


def apply(moe: MoE):
    """(params, x, valid) -> (y, Router), jitted."""
    graphdef, params, _ = split(moe)
    run = jax.jit(lambda params, x, valid=None: nnx.merge(graphdef, params)(x, valid=valid))
    return run, params


def loop(params, x, valid, top_k, *, normalize=True, capacity=None):
    """Token by token in float64. Returns what `MoE` returns and the tokens (b, s, choice) that were dropped."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, e = np.asarray(x, np.float64), p["router"].shape[1]
    y, counts, probs, z, n, dropped = np.zeros_like(x), np.zeros(e), np.zeros(e), 0.0, 0, []
    for b in range(x.shape[0]):
        used = np.zeros(e, int)
        for choice in range(top_k):
            for s in range(x.shape[1]):
                if not valid[b, s]:
                    continue
                logits = x[b, s] @ p["router"]
                q = np.exp(logits) / np.exp(logits).sum()
                best = np.argsort(-q)[:top_k]
                i = best[choice]
                counts[i] += 1
                if choice == 0:
                    probs, z, n = probs + q, z + np.log(np.exp(logits).sum()) ** 2, n + 1
                if capacity is not None and used[i] == capacity:
                    dropped.append((b, s, choice))
                    continue
                used[i] += 1
                g = x[b, s] @ p["gate"][i]
                out = (g / (1 + np.exp(-g)) * (x[b, s] @ p["up"][i])) @ p["down"][i]
                y[b, s] += out * q[i] / (q[best].sum() if normalize else 1)
    return (y, Router(counts, probs, np.float64(z), np.float64(n), np.float64(len(dropped)))), dropped


# --- the sum over experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_experts", "top_k", "normalize", "masked"),
    [(3, 1, True, False), (3, 2, True, True), (5, 2, False, True)],
)
@pytest.mark.parametrize("capacity_factor", [None, 99.0, 0.6])
def test_agrees_with_a_loop_over_tokens_and_experts(n_experts, top_k, normalize, masked, capacity_factor):
    run, params = apply(make(n_experts, top_k, normalize=normalize, capacity_factor=capacity_factor))
    valid = VALID if masked else np.ones_like(VALID)
    capacity = None if capacity_factor is None else math.ceil(capacity_factor * top_k * S / n_experts)
    expected, dropped = loop(params, X, valid, top_k, normalize=normalize, capacity=capacity)
    assert bool(dropped) == (capacity_factor == 0.6)
    assert_close(run(params, X, valid if masked else None), expected)


def test_second_choices_are_dropped_before_first_ones_and_later_tokens_before_earlier_ones():
    moe = make(3, 2, capacity_factor=0.5)  # ceil(0.5 * 2 * 7 / 3) = 3 of 7 tokens
    run, params = apply(moe)
    params["router"] = np.zeros((D, 3), np.float32)
    params["router"][0] = [3.0, 2.0, -1.0]  # tokens with a positive lane 0 go to expert 0, then 1
    params["router"][1] = [1.0, 2.0, -1.0]  # and these to expert 1, then 0
    x = np.zeros((1, S, D), np.float32)
    x[0, [0, 2, 3, 5, 6], 0] = 1.0
    x[0, [1, 4], 1] = 1.0
    x[..., 2] = np.arange(S)
    (expected, stats), dropped = loop(params, x, np.ones((1, S), bool), 2, capacity=3)
    # Expert 0 takes 0, 2, 3 and none of those that want it second; expert 1 takes 1, 4 and then 0.
    assert {(s, choice) for _, s, choice in dropped} == {(5, 0), (6, 0), (1, 1), (4, 1), (2, 1), (3, 1), (5, 1), (6, 1)}
    y, router = run(params, x)
    assert_close((y, router), (expected, stats))
    np.testing.assert_array_equal(y[0, 5:], 0)


def test_a_token_that_is_not_valid_takes_no_capacity_and_gets_nothing():
    run, params = apply(make(3, 2, capacity_factor=0.5))
    other = np.where(VALID[..., None], X, 100 * X[::-1])
    a, b = run(params, X, VALID), run(params, other, VALID)
    assert_equal(a, b)
    np.testing.assert_array_equal(a[0][~VALID], 0)
    assert a[1].n == VALID.sum() and a[1].counts.sum() == 2 * VALID.sum()


def test_rows_do_not_compete_for_capacity():
    run, params = apply(make(3, 2, capacity_factor=0.5))
    y, router = run(params, X)
    alone = [run(params, X[b : b + 1]) for b in range(B)]
    assert_close(y, np.concatenate([a[0] for a in alone]))
    assert_close(router, jax.tree.map(lambda *a: sum(np.asarray(v) for v in a), *(a[1] for a in alone)))


@pytest.mark.parametrize("capacity_factor", [None, 99.0])
def test_one_expert_is_a_gated_mlp(capacity_factor):
    run, params = apply(make(1, 1, capacity_factor=capacity_factor))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    g = X @ p["gate"][0]
    assert_close(run(params, X)[0], (g / (1 + np.exp(-g)) * (X @ p["up"][0])) @ p["down"][0])


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_bfloat16_is_routed_in_float32(capacity_factor):
    run, params = apply(make(5, 2, capacity_factor=capacity_factor))
    x = jnp.asarray(X, jnp.bfloat16)
    y, router = run(params, x)
    e, stats = run(params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert_equal(router, stats)
    assert_close(y, e, "bfloat16")


# --- gradients --------------------------------------------------------------------------------------------------------


def dense(params, x, top_k):
    """Every token through every expert, weighed by p or 0."""
    probs = jax.nn.softmax(x @ params["router"], axis=-1)
    best, chosen = jax.lax.top_k(probs, top_k)
    weights = (jax.nn.one_hot(chosen, probs.shape[-1]) * (best / best.sum(-1, keepdims=True))[..., None]).sum(-2)
    h = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, params["gate"])) * jnp.einsum("bsd,edf->bsef", x, params["up"])
    return jnp.einsum("bsef,efd,bse->bsd", h, params["down"], weights)


@pytest.mark.parametrize("capacity_factor", [None, 99.0])
def test_gradients_are_those_of_the_dense_sum(capacity_factor):
    run, params = apply(make(5, 2, capacity_factor=capacity_factor))
    g = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
    actual = jax.jit(jax.grad(lambda p, x: (run(p, x)[0] * g).sum(), (0, 1)))(params, X)
    assert_close(actual, jax.jit(jax.grad(lambda p, x: (dense(p, x, 2) * g).sum(), (0, 1)))(params, X))


def test_the_statistics_teach_the_router():
    run, params = apply(make(5, 2))

    def loss(router):
        r = run(params | {"router": router}, X, VALID)[1]
        return balance_loss(r.counts, r.probs, r.n, 5) + z_loss(r.z, r.n)

    check_grads(loss, (params["router"],), order=1, modes=["rev"], eps=1e-2)


@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "bfloat16"]))
def test_layers_in_a_scan_with_recomputation_are_layers_in_a_row(dtype):
    graphdef, _, _ = split(make(3, 2))
    layers = [split(make(3, 2))[1] | {"gate": 0.3 * i + split(make(3, 2))[1]["gate"]} for i in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x = jnp.asarray(X, dtype)
    names = jax.checkpoint_policies.save_only_these_names("gate", "up")

    def layer(x, p):
        y, router = nnx.merge(graphdef, p)(x)
        return x + y, router

    @jax.jit
    @jax.value_and_grad
    def scanned(params):
        y, router = jax.lax.scan(jax.checkpoint(layer, policy=names), x, params)
        return jnp.square(y.astype(jnp.float32)).mean() + router.z.sum()

    @jax.jit
    @jax.value_and_grad
    def in_a_row(params):
        first, second = (jax.tree.map(lambda a, i=i: a[i], params) for i in range(2))
        y, before = layer(x, first)
        y, after = layer(y, second)
        return jnp.square(y.astype(jnp.float32)).mean() + before.z + after.z

    assert_close(scanned(stacked), in_a_row(stacked), dtype)


# --- products of groups -----------------------------------------------------------------------------------------------

SIZES = [
    (4, 0, 3, 2),  # rows left over, an empty group
    (0, 0, 0, 13),
    (0, 0, 0, 0),
    (2 * BLOCK + 5, 1, 0, BLOCK),  # blocks that reach into the next groups
    (BLOCK, 3, 2 * BLOCK - 1, 1),
]


@pytest.mark.parametrize("product", [blocked_dot, grouped_dot, jax.lax.ragged_dot])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_grouped_product_is_a_product_for_each_group(sizes, product):
    rng = np.random.default_rng(4)
    m = max(sum(sizes), 13)
    x, w = rng.normal(size=(m, D)).astype(np.float32), rng.normal(size=(4, D, F)).astype(np.float32)
    g = rng.normal(size=(m, F)).astype(np.float32)
    y, back = jax.vjp(jax.jit(lambda x, w: product(x, w, jnp.asarray(sizes, jnp.int32))), x, w)
    e, dx, dw = np.zeros((m, F)), np.zeros((m, D)), np.zeros((4, D, F))
    for i, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[i], end)
        e[rows], dx[rows] = x[rows].astype(np.float64) @ w[i], g[rows].astype(np.float64) @ w[i].T
        dw[i] = x[rows].astype(np.float64).T @ g[rows]
    assert_close((y, *back(g)), (e, dx, dw))


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_balance_loss_of_an_even_load_is_top_k_and_of_no_token_0():
    counts, n = jnp.full(4, 6.0), jnp.asarray(12.0)
    assert float(balance_loss(counts, jnp.full(4, 3.0), n, 4)) == 2.0
    assert float(balance_loss(jnp.zeros(4), jnp.zeros(4), jnp.zeros(()), 4)) == 0.0
    assert float(z_loss(jnp.asarray(6.0), n)) == 0.5
    assert float(z_loss(jnp.zeros(()), jnp.zeros(()))) == 0.0


# --- on a mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
@pytest.mark.parametrize(
    "mesh", [Mesh(expert=2, seq=2, tensor=2), pytest.param(Mesh(expert=4, fsdp=2), marks=pytest.mark.slow)]
)
def test_experts_over_devices_are_experts_on_one(mesh, capacity_factor):
    moe = make(4, 2, d=6, f=10, capacity_factor=capacity_factor)
    graphdef, params, infos = split(moe)
    rng = np.random.default_rng(5)
    x, g = (rng.normal(size=(8, 14, 6)).astype(np.float32) for _ in range(2))
    valid = rng.random((8, 14)) < 0.8

    def loss(params, x):
        y, router = nnx.merge(graphdef, params)(x, valid=valid)
        return (y * g).sum() + balance_loss(router.counts, router.probs, router.n, 4), (y, router)

    mesh, rules = make_mesh(mesh), Rules()
    axes = jax.tree.map(lambda i: i.axes, infos, is_leaf=lambda i: hasattr(i, "axes"))
    placed = sharding.shardings(rules, mesh, axes, params)
    rows = NamedSharding(mesh, rules.spec(("act_batch", "act_seq", "act_embed")))

    def scoped(params, x):
        with sharding.scope(mesh, rules):
            return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    got = jax.jit(scoped, in_shardings=(placed, rows))(params, x)
    assert_close(got, jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x))
    assert (got[0][1][1].dropped > 0) == (capacity_factor is not None)


def test_with_a_capacity_tokens_travel_and_without_one_the_experts_do():
    mesh, rules = make_mesh(Mesh(expert=4, fsdp=2)), Rules()
    rows = NamedSharding(mesh, rules.spec(("act_batch", "act_seq", "act_embed")))

    def moves(capacity_factor):
        """(whether tokens are exchanged, shapes of what is gathered)."""
        graphdef, params, infos = split(make(8, 2, d=6, f=10, capacity_factor=capacity_factor))
        axes = jax.tree.map(lambda i: i.axes, infos, is_leaf=lambda i: hasattr(i, "axes"))
        placed = sharding.shardings(rules, mesh, axes, params)

        def f(params, x):
            with sharding.scope(mesh, rules):
                return nnx.merge(graphdef, params)(x)

        jitted = jax.jit(f, in_shardings=(placed, rows))
        text = jitted.lower(params, jax.ShapeDtypeStruct((16, 14, 6), jnp.float32)).compile().as_text()
        gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
        return "all-to-all" in text, {tuple(map(int, g.split(","))) for g in gathered} - {(6, 8), (6, 2), (3, 8)}

    assert moves(1.0) == (True, {(2, 6, 10), (2, 10, 6)})  # over fsdp alone: 2 of 8 experts; the router aside
    tokens, gathered = moves(None)
    assert not tokens and {(8, 6, 10), (8, 10, 6)} <= gathered and all(g[0] in (2, 8) for g in gathered)


def test_experts_are_spread_and_their_tokens_keep_the_other_axes_of_the_batch():
    assert Rules().spec(("experts", "embed", "mlp")) == P("expert", "fsdp", "tensor")
    assert Rules().spec(("act_experts", "act_groups", None, "act_mlp")) == P("expert", ("data", "fsdp"), None, "tensor")
    batch = set(Rules().act_batch)
    assert set(Rules().act_groups) == batch - {Rules().act_experts}
    with pytest.raises(UserError, match="'act_experts' and 'act_batch' both go to mesh axis 'expert'"):
        Rules().spec(("act_experts", "act_batch"), "x")


def test_per_device_sums_over_the_axis_that_the_result_has_not():
    mesh, rules = make_mesh(Mesh(data=2, fsdp=2, tensor=2)), Rules()
    x, w = np.arange(8 * 3 * 4, dtype=np.float32).reshape(8, 3, 4), np.arange(4.0, dtype=np.float32)

    def product(x, w):
        return jnp.sort(x * w, axis=-1).sum(-1)

    ins, out = (("act_batch", None, "act_mlp"), ("act_mlp",)), ("act_batch", None)
    assert sharding.per_device(product, ins, out, "act_mlp") is product
    for r in (rules, dataclasses.replace(rules, act_mlp=None)):
        with sharding.scope(mesh, r):
            np.testing.assert_array_equal(sharding.per_device(product, ins, out, "act_mlp")(x, w), x @ w)
    with pytest.raises(UserError, match="axis 'act_mlp' of size 3 is not divisible by mesh axis tensor=2"):
        with sharding.scope(mesh, rules):
            sharding.per_device(product, ins, out, "act_mlp")(x[..., :3], w[:3])


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.hf
@pytest.mark.parametrize("normalize", [None, True, False], ids=["mixtral", "qwen3_moe", "qwen3_moe_not_normalized"])
def test_agrees_with_transformers(normalize):
    torch = pytest.importorskip("torch")
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    if normalize is None:
        config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=5, num_experts_per_tok=2)
        block = MixtralSparseMoeBlock(config)
    else:
        config = Qwen3MoeConfig(
            hidden_size=D, moe_intermediate_size=F, num_experts=5, num_experts_per_tok=2, norm_topk_prob=normalize
        )
        block = Qwen3MoeSparseMoeBlock(config)
    run, params = apply(make(5, 2, normalize=normalize is not False))
    t = {name: torch.tensor(np.asarray(p)) for name, p in params.items()}
    with torch.no_grad():
        block.gate.weight.copy_(t["router"].T)
        block.experts.gate_up_proj.copy_(torch.cat([t["gate"], t["up"]], dim=2).transpose(1, 2))
        block.experts.down_proj.copy_(t["down"].transpose(1, 2))
        expected = block.eval()(torch.tensor(X)).numpy()
        logits = torch.tensor(X.reshape(-1, D)) @ t["router"]
        loss = load_balancing_loss_func((logits, 2 * logits), 5, 2, torch.tensor(VALID.astype(np.int64)))
    assert_close(run(params, X)[0], expected)

    layers = [run(params | {"router": c * params["router"]}, X, VALID)[1] for c in (1, 2)]
    total = jax.tree.map(lambda *a: sum(a), *layers)
    np.testing.assert_allclose(balance_loss(total.counts, total.probs, total.n, 5), loss, rtol=TOLERANCE["float32"])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0, 1), {}, "model.n_experts: expected a positive number, got 0"),
        ((3, 4), {}, "model.top_k: expected 1 to model.n_experts=3, got 4; set one of the two"),
        ((3, 0), {}, "model.top_k: expected 1 to model.n_experts=3, got 0; set one of the two"),
        (
            (3, 1),
            {"capacity_factor": 0.0},
            "model.capacity_factor: expected a positive number, got 0.0; None drops no token",
        ),
    ],
)
def test_impossible_numbers_are_refused(args, kwargs, message):
    with pytest.raises(UserError) as e:
        make(*args, **kwargs)
    assert str(e.value) == message
