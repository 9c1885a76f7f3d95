"""Every optimizer against a float64 numpy account of its paper, then what must not change the result."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.optim import (
    SGD,
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Linear,
    Lion,
    Muon,
    Optimizer,
    clip_by_norm,
    global_norm,
    make_optimizer,
    state_axes,
)

TOTAL, WARMUP = 7, 2
SCHEDULE = Linear(warmup_steps=WARMUP, final_fraction=0.25)
# float32 against float64; Newton-Schulz magnifies rounding in small singular values by up to 3.4445^5.
TOLERANCE = dict(rtol=1e-5, atol=1e-6)
TOLERANCE_MUON = dict(rtol=1e-4, atol=2e-5)


def lr_at(t: int, peak: float) -> float:
    """t = 1, 2, ... is the number of the update."""
    progress = max(t - 1 - WARMUP, 0) / (TOTAL - WARMUP)
    return peak * min(1.0, t / WARMUP) * (0.25 + 0.75 * (1 - progress))


def reference(problem, rule, *, lr, weight_decay, clip_norm) -> dict[str, np.ndarray]:
    """Parameters after all the gradients, in float64. `rule(path, w, g, t, memory) -> U`; `lr(path)` is the peak."""
    params = {k: np.asarray(v, np.float64) for k, v in problem.flat(problem.params).items()}
    decay, memory = problem.flat(problem.decay), {k: {} for k in params}
    for t, tree in enumerate(problem.grads, 1):
        grads = {k: np.asarray(v, np.float64) for k, v in problem.flat(tree).items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for path, g in grads.items():
            u = rule(path, params[path], g * min(1.0, clip_norm / norm), t, memory[path])
            params[path] = params[path] - lr_at(t, lr(path)) * (u + weight_decay * decay[path] * params[path])
    return params


def adamw(betas, eps):
    def rule(path, w, g, t, memory):
        (b1, b2), m = betas, memory
        m["m"] = b1 * m.get("m", 0) + (1 - b1) * g
        m["v"] = b2 * m.get("v", 0) + (1 - b2) * g**2
        return m["m"] / (1 - b1**t) / (np.sqrt(m["v"] / (1 - b2**t)) + eps)

    return rule


def lion(b1, b2):
    def rule(path, w, g, t, memory):
        u = np.sign(b1 * memory.get("m", 0) + (1 - b1) * g)
        memory["m"] = b2 * memory.get("m", 0) + (1 - b2) * g
        return u

    return rule


def sgd(momentum, nesterov):
    def rule(path, w, g, t, memory):
        memory["m"] = momentum * memory.get("m", 0) + g
        return g + momentum * memory["m"] if nesterov else memory["m"]

    return rule


def stacked(path, x, matrices):
    """x as [N, rows, cols] matrices or [N, n] vectors, one for every layer and expert."""
    if path not in matrices:
        return x.reshape(x.shape[0] if path.startswith("layers.") else 1, -1)
    n_stacked, n_rows = matrices[path]
    n, rows = (int(np.prod(s)) for s in (x.shape[:n_stacked], x.shape[n_stacked : n_stacked + n_rows]))
    return x.reshape(n, rows, -1)


def adafactor(matrices, decay_rate, update_clip, min_dim):
    def rms(x):
        return np.sqrt(np.mean(x**2))

    def one(w, g, b, memory):
        g2 = g**2 + 1e-30
        if w.ndim == 2 and min(w.shape) >= min_dim:
            memory["r"] = b * memory.get("r", 0) + (1 - b) * g2.mean(1)
            memory["c"] = b * memory.get("c", 0) + (1 - b) * g2.mean(0)
            v = np.outer(memory["r"], memory["c"]) / memory["r"].mean()
        else:
            v = memory["v"] = b * memory.get("v", 0) + (1 - b) * g2
        u = g / np.sqrt(v)
        return u / max(1.0, rms(u) / update_clip) * max(1e-3, rms(w))

    def rule(path, w, g, t, memory):
        ws, gs = stacked(path, w, matrices), stacked(path, g, matrices)
        us = [one(ws[i], gs[i], 1 - t**-decay_rate, memory.setdefault(i, {})) for i in range(len(ws))]
        return np.stack(us).reshape(w.shape)

    return rule


def newton_schulz(x):
    """Jordan, 2024: five steps of X <- aX + b(XX')X + c(XX')^2 X from X / |X|_F, on the wide orientation."""
    x = x / np.linalg.norm(x)
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def muon(problem, momentum, update_rms, rest):
    def rule(path, w, g, t, memory):
        if path not in problem.muon:
            return rest(path, w, g, t, memory)
        b = momentum
        memory["m"] = b * memory.get("m", 0) + (1 - b) * g
        x = b * memory["m"] / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
        xs = stacked(path, x, problem.matrices)
        rows, cols = xs.shape[1:]
        scale = max(1, cols / rows) ** 0.5 if update_rms is None else update_rms * max(rows, cols) ** 0.5
        return scale * np.stack([newton_schulz(x) for x in xs]).reshape(w.shape)

    return rule


def check(problem, config, rule, lr=None, tolerance=TOLERANCE):
    want = reference(
        problem, rule, lr=lr or (lambda _: config.lr), weight_decay=config.weight_decay, clip_norm=config.clip_norm
    )
    got = problem.flat(problem.run(config, total_steps=TOTAL)[0])
    assert got.keys() == want.keys()
    for path, w in want.items():
        np.testing.assert_allclose(got[path], w, **tolerance, err_msg=path)


def test_adamw_matches_numpy(problem):
    config = AdamW(lr=0.02, schedule=SCHEDULE, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, clip_norm=2.0)
    check(problem, config, adamw((0.8, 0.9), 1e-3))


def test_lion_matches_numpy(problem):
    config = Lion(lr=0.02, schedule=SCHEDULE, betas=(0.7, 0.9), weight_decay=0.3, clip_norm=2.0)
    check(problem, config, lion(0.7, 0.9))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_matches_numpy(problem, nesterov):
    config = SGD(lr=0.02, schedule=SCHEDULE, momentum=0.8, nesterov=nesterov, weight_decay=0.3, clip_norm=2.0)
    check(problem, config, sgd(0.8, nesterov))


def test_adafactor_matches_numpy_layer_by_layer(problem):
    config = Adafactor(
        lr=0.05,
        schedule=SCHEDULE,
        weight_decay=0.3,
        clip_norm=2.0,
        decay_rate=0.7,
        update_clip=0.9,
        min_dim_size_to_factor=5,
    )
    check(problem, config, adafactor(problem.matrices, 0.7, 0.9, 5))


@pytest.mark.parametrize("update_rms", [0.2, None])
def test_muon_matches_numpy_layer_by_layer_and_adamw_elsewhere(problem, update_rms):
    config = Muon(
        lr=0.02,
        schedule=SCHEDULE,
        weight_decay=0.3,
        clip_norm=2.0,
        momentum=0.9,
        update_rms=update_rms,
        adamw_lr=0.007,
        betas=(0.8, 0.9),
        eps=1e-3,
    )
    rule = muon(problem, 0.9, update_rms, adamw((0.8, 0.9), 1e-3))

    check(problem, config, rule, lambda path: 0.02 if path in problem.muon else 0.007, TOLERANCE_MUON)


def test_adafactor_on_one_matrix_is_optaxs(problem):
    """The peer, where the two mean the same: one layer's matrix without its stack."""
    config = Adafactor(lr=0.05, schedule=Constant(), min_dim_size_to_factor=5)
    ours, _ = make_optimizer(config, 10, {"w": True}, {"w": ("embed", "mlp")})
    grads = [{"w": g["layers"]["mlp"]["up"][1]} for g in problem.grads]

    @functools.partial(jax.jit, static_argnums=0)
    def run(tx, params):
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    start = {"w": problem.params["layers"]["mlp"]["up"][1]}
    np.testing.assert_allclose(run(ours, start), run(optax.adafactor(0.05, min_dim_size_to_factor=5), start), rtol=1e-5)


def test_decay_shrinks_only_what_declares_it(small_problem, config):
    """With zero gradients: W <- (1 - lr weight_decay)^n W."""
    p = small_problem
    still = [jax.tree.map(jnp.zeros_like, g) for g in p.grads]
    params, _ = type(p)(p.params, still, p.axes, p.decay).run(config)
    before, decays = p.flat(p.params), p.flat(p.decay)
    for path, w in p.flat(params).items():
        lr = config.adamw_lr if isinstance(config, Muon) and path not in p.muon else config.lr
        factor = (1 - lr * config.weight_decay) ** len(still) if decays[path] else 1.0
        np.testing.assert_allclose(w, factor * before[path], rtol=1e-6, err_msg=path)


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), got, want)


def test_jit_is_eager(small_problem, config):
    close(small_problem.run(config), small_problem.run(config, jit=False))


def test_a_layer_in_a_stack_is_the_layer_alone(small_problem, config):
    """Nothing leaks along the layers axis: what Adafactor averages and Muon orthogonalises is one layer."""
    p, config = small_problem, dataclasses.replace(config, clip_norm=None)

    def one(tree):
        return tree | {"layers": jax.tree.map(lambda x: x[1:2], tree["layers"])}

    alone = type(p)(one(p.params), [one(g) for g in p.grads], p.axes, p.decay)
    close(one(p.run(config)[0]), alone.run(config)[0])


def test_sharded_is_single(small_problem, config):
    """On a 2x2x2 mesh, with the state placed by `state_axes`."""
    p = small_problem
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rules = dict(embed="fsdp", vocab="tensor", heads="tensor", kv_heads="tensor", mlp="tensor")

    def place(axes, tree):
        def sharding(_, names):
            return NamedSharding(mesh, PartitionSpec(*(rules.get(a) for a in names)))

        return jax.tree.map(sharding, tree, axes)

    tx, _ = make_optimizer(config, 100, p.decay, p.axes)
    placed = place(p.axes, p.params)
    state_placed = place(state_axes(tx, p.params, p.axes), jax.eval_shape(tx.init, p.params))

    @jax.jit
    def init(params):
        return jax.lax.with_sharding_constraint(tx.init(params), state_placed)

    def step(params, state, grads):
        grads = clip_by_norm(grads, global_norm(grads), config.clip_norm)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, in_shardings=(placed, state_placed, placed), out_shardings=(placed, state_placed))
    params = jax.device_put(p.params, placed)
    state = init(params)
    for grads in p.grads:
        params, state = step(params, state, jax.device_put(grads, placed))
    close((params, state), p.run(config))
    assert len(params["layers"]["attn"]["o"].sharding.device_set) == 8


def test_the_schedule_returned_is_the_rate_applied():
    config = SGD(lr=0.5, schedule=Cosine(warmup_steps=3), momentum=0.0, clip_norm=None)
    params = {"scale": jnp.ones(3)}
    tx, schedule = make_optimizer(config, 11, {"scale": False}, {"scale": ("norm",)})
    state = tx.init(params)
    for step in range(11):
        updates, state = tx.update(params, state, params)
        np.testing.assert_allclose(updates["scale"], -schedule(step), rtol=1e-6)


@pytest.mark.parametrize("max_norm, factor", [(None, 1.0), (13.0, 1.0), (20.0, 1.0), (6.5, 0.5)])
def test_clipping_scales_to_the_norm_and_is_exact_below_it(max_norm, factor):
    grads = {"a": jnp.array([3.0, 4.0]), "b": {"c": jnp.array([[12.0]])}}
    norm = global_norm(grads)
    assert norm == 13.0
    clipped = clip_by_norm(grads, norm, max_norm)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, factor * b), clipped, grads)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_poisons_all(bad):
    grads = {"a": jnp.array([1.0, bad]), "b": jnp.ones(3)}
    clipped = clip_by_norm(grads, global_norm(grads), 1.0)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(clipped))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AdamW(lr=-1.0), "optim.lr: expected > 0, got -1.0"),
        (lambda: AdamW(lr=float("nan")), "optim.lr: expected > 0, got nan"),
        (lambda: AdamW(lr=1.0, weight_decay=-0.1), "optim.weight_decay: expected >= 0, got -0.1"),
        (lambda: AdamW(lr=1.0, clip_norm=0.0), "optim.clip_norm: expected > 0 or None, got 0.0"),
        (lambda: AdamW(lr=1.0, ema_decay=1.0), "optim.ema_decay: expected in [0, 1) or None, got 1.0"),
        (lambda: AdamW(lr=1.0, betas=(0.9, 1.0)), "optim.betas: expected each in [0, 1), got (0.9, 1.0)"),
        (lambda: AdamW(lr=1.0, eps=0.0), "optim.eps: expected > 0, got 0.0"),
        (lambda: Lion(lr=1.0, betas=(-0.1, 0.9)), "optim.betas: expected each in [0, 1), got (-0.1, 0.9)"),
        (lambda: SGD(lr=1.0, momentum=1.0), "optim.momentum: expected in [0, 1), got 1.0"),
        (lambda: Adafactor(lr=1.0, decay_rate=0.0), "optim.decay_rate: expected > 0, got 0.0"),
        (lambda: Adafactor(lr=1.0, update_clip=0.0), "optim.update_clip: expected > 0, got 0.0"),
        (lambda: Muon(lr=1.0, adamw_lr=0.0), "optim.adamw_lr: expected > 0 or None, got 0.0"),
        (lambda: Muon(lr=1.0, ns_steps=0), "optim.ns_steps: expected > 0, got 0"),
    ],
)
def test_a_wrong_config_is_refused_with_its_path(make, message):
    with pytest.raises(ValueError) as e:
        make()
    assert str(e.value) == message


def test_muon_refuses_what_it_cannot_read_as_a_matrix():
    axes = {"layers": {"attn": {"qkv": ("layers", "embed", None, "heads", "head_dim")}}}
    with pytest.raises(ValueError, match=r"layers\.attn\.qkv: expected at most one input and one output dimension"):
        make_optimizer(Muon(lr=0.1), 10, {"layers": {"attn": {"qkv": True}}}, axes)
    with pytest.raises(ValueError, match="Muon found no matrix with a 'layers' axis; use AdamW"):
        make_optimizer(Muon(lr=0.1), 10, {"w": True}, {"w": ("embed", "vocab")})


def test_configs_survive_the_codec(config):
    from lm.codec import decode, encode, override

    assert decode(Optimizer, encode(config)) == config
    assert override(config, "lr=0.5").lr == 0.5
