from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import codec
from lm.errors import UserError
from lm.nn.param import normal, split
from lm.nn.position import LearnedPositions, RelativeBias, Rope, sinusoids
from lm.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling, rotate
from tests.models import reference
from tests.tolerances import assert_close

B, S, H, K, THETA = 2, 7, 3, 10, 100.0
X = np.random.default_rng(0).normal(size=(B, S, H, K)).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2], [5, 11, 3, 0, 40, 2, 1]])

rope = jax.jit(lambda x, positions: rotate(x, Rope(theta=THETA)(positions, K)))


def test_rotation_agrees_with_complex_numbers():
    assert_close(rope(X, POSITIONS), reference.rope(X.astype(np.float64), POSITIONS, THETA))
    np.testing.assert_array_equal(rope(X, POSITIONS), jax.jit(rotate)(X, Rope(theta=THETA)(POSITIONS, K)))


def test_rotation_keeps_norms_and_position_zero():
    assert_close(np.linalg.norm(rope(X, POSITIONS), axis=-1), np.linalg.norm(X, axis=-1))
    np.testing.assert_array_equal(rope(X, np.zeros_like(POSITIONS)), X)


def test_a_score_depends_only_on_the_distance():
    q, k = X, X[::-1]
    at, to = POSITIONS, POSITIONS[::-1] + 4
    scores = [(rope(q, at + shift) * rope(k, to + shift)).sum(-1) for shift in (0, 1, 97)]
    assert_close(scores[1], scores[0])
    assert_close(scores[2], scores[0])
    assert np.abs((rope(q, at + 1) * rope(k, to)).sum(-1) - scores[0]).max() > 0.1


def test_bfloat16_is_rotated_in_float32():
    x, far = jnp.asarray(X, jnp.bfloat16), POSITIONS + 3001  # in bfloat16 the position alone would be off by some 5
    y = rope(x, far)
    assert y.dtype == jnp.bfloat16
    e = reference.rope(np.asarray(x, np.float64), far, THETA)
    np.testing.assert_allclose(np.asarray(y, np.float64), e, rtol=2.0**-8, atol=2e-3)


def test_a_fraction_rotates_the_first_lanes_among_themselves():
    part = Rope(theta=THETA, fraction=0.45)  # int(4.5) = 4 of 10 lanes
    y = jax.jit(lambda x, p: rotate(x, part(p, K)))(X, POSITIONS)
    assert_close(y[..., :4], reference.rope(X[..., :4].astype(np.float64), POSITIONS, THETA))
    np.testing.assert_array_equal(y[..., 4:], X[..., 4:])


# --- scaling ----------------------------------------------------------------------------------------------------------

SCALINGS = {
    "linear": (LinearScaling(factor=3.5), {"factor": 3.5}),
    "dynamic": (DynamicScaling(factor=2.5, max_positions=19), {"factor": 2.5}),
    "llama3": (
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=61),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 61},
    ),
    "yarn": (YarnScaling(factor=5.0, original_max_positions=611), {"original_max_position_embeddings": 611}),
}
YARNS = [
    {},
    {"attention_factor": 1.7},
    {"mscale": 0.707, "mscale_all_dim": 1.3},
    {"mscale": 0.707},
    {"truncate": False},
    {"beta_fast": 8.0, "beta_slow": 2.0},
    {"beta_fast": 2.0, "beta_slow": 2.0},
    {"factor": 0.5},
]


def yarn(fields):
    fields = {"factor": 5.0} | fields
    return YarnScaling(original_max_positions=611, **fields), fields | {"original_max_position_embeddings": 611}


@pytest.mark.hf
@pytest.mark.parametrize("longest", [5, 19, 20, 97])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    ("kind", "scaling", "parameters"),
    [("default", None, {})]
    + [(kind, *SCALINGS[kind]) for kind in ("linear", "dynamic", "llama3")]
    + [("yarn", *yarn(fields)) for fields in YARNS],
)
def test_frequencies_are_those_of_transformers(kind, scaling, parameters, fraction, longest):
    torch = pytest.importorskip("torch")
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    config = GPTNeoXConfig(
        hidden_size=3 * 24,
        num_attention_heads=3,
        max_position_embeddings=19,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 900.0,
            "partial_rotary_factor": fraction,
            **parameters,
        },
    )
    positions = np.stack([np.arange(7), np.linspace(0, longest - 1, 7).astype(int)])
    x = np.random.default_rng(1).normal(size=(2, 7, 3, 24)).astype(np.float32)
    q = torch.tensor(x).transpose(1, 2)
    cos, sin = GPTNeoXRotaryEmbedding(config)(q, torch.tensor(positions))
    expected = apply_rotary_pos_emb(q, q, cos, sin)[0].transpose(1, 2).numpy()
    r = jax.jit(functools.partial(Rope(theta=900.0, fraction=fraction, scaling=scaling), head_dim=24))(positions)
    assert r.sin.dtype == np.float32 and r.sin.shape == (2, 7, 12 * fraction)
    assert_close(jax.jit(rotate)(x, r), expected)


def test_dynamic_scaling_changes_nothing_up_to_the_first_trainings_length():
    plain = Rope(theta=THETA)(POSITIONS, K)  # the longest is 41
    for most, same in ((41, True), (40, False)):
        scaled = Rope(theta=THETA, scaling=DynamicScaling(factor=3.0, max_positions=most))(POSITIONS, K)
        assert np.array_equal(scaled.sin, plain.sin) == same


def test_yarn_multiplies_both_by_the_root_of_what_scores_are_multiplied_by():
    r = Rope(scaling=YarnScaling(factor=4.0, original_max_positions=64))(POSITIONS, K)
    assert_close(r.sin**2 + r.cos**2, np.full((B, S, K // 2), (0.1 * math.log(4) + 1) ** 2))


@pytest.mark.parametrize("scaling", [None, *(s for s, _ in SCALINGS.values()), yarn({"mscale": 1.5})[0]])
def test_a_rope_survives_json(scaling):
    value = Rope(theta=5e5, fraction=0.25, scaling=scaling)
    assert codec.decode(Rope, codec.encode(value)) == value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope(theta=0.0), "model.rope.theta: expected a number over 1, got 0.0; the usual one is 10000"),
        (lambda: Rope(fraction=1.5), "model.rope.fraction: expected a part of the head in (0, 1], got 1.5"),
        (lambda: Rope(fraction=0.0), "model.rope.fraction: expected a part of the head in (0, 1], got 0.0"),
        (
            lambda: Rope(fraction=0.5)(POSITIONS, K),
            "model.rope: expected an even number of rotated lanes, got int(10 * 0.5) = 5; "
            "set another model.head_dim or model.rope.fraction",
        ),
        (lambda: LinearScaling(factor=0.0), "model.rope.scaling.factor: expected a positive number, got 0.0"),
        (
            lambda: DynamicScaling(factor=2.0, max_positions=-1),
            "model.rope.scaling.max_positions: expected a positive number, got -1",
        ),
        (
            lambda: Rope(scaling=SCALINGS["dynamic"][0])(POSITIONS, 2),
            "model.rope: dynamic scaling needs at least 4 rotated lanes, got 2; raise fraction",
        ),
        (
            lambda: dataclasses.replace(SCALINGS["llama3"][0], low_freq_factor=4.0),
            "model.rope.scaling.high_freq_factor: expected more than low_freq_factor 4.0, got 4.0; swap them",
        ),
        (
            lambda: yarn({"beta_fast": 1.0, "beta_slow": 32.0}),
            "model.rope.scaling.beta_fast: expected at least beta_slow 32.0, got 1.0; swap them",
        ),
        (lambda: yarn({"mscale": -1.0}), "model.rope.scaling.mscale: expected a positive number, got -1.0"),
    ],
)
def test_nonsense_is_refused_where_it_is_said(make, message):
    with pytest.raises(UserError) as e:
        make()
    assert str(e.value) == message


# --- tables and sinusoids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_are_rows_of_the_table(offset):
    positions = LearnedPositions(43, 5, rngs=nnx.Rngs(0), init=normal(1.0), offset=offset)
    assert positions.table.shape == (43 + offset, 5)
    y = positions(POSITIONS, jnp.float32)
    np.testing.assert_array_equal(y, np.asarray(positions.table[...])[POSITIONS + offset])


@pytest.mark.parametrize("d", [6, 7])
def test_sinusoids_are_sines_then_cosines(d):
    y = jax.jit(sinusoids, static_argnums=1)(POSITIONS, d)
    assert y.dtype == np.float32 and y.shape == (B, S, d)
    for i in range(-(-d // 2)):
        angle = POSITIONS / 10_000 ** (2 * i / d)
        assert_close(y[..., i], np.sin(angle))
        if i < d // 2:
            assert_close(y[..., -(-d // 2) + i], np.cos(angle))


@pytest.mark.hf
@pytest.mark.parametrize("d", [6, 7])
def test_sinusoids_are_those_of_marian(d):
    pytest.importorskip("torch")
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    table = MarianSinusoidalPositionalEmbedding(43, d).create_weight().numpy()
    assert_close(sinusoids(POSITIONS, d), table[POSITIONS])


# --- relative bias ----------------------------------------------------------------------------------------------------

AT, TO = np.array([0, 9, 4, 30]), np.array([0, 1, 2, 3, 5, 8, 13, 21, 34, 300])


def relative_bias(n_buckets=11, max_distance=20, bidirectional=True) -> RelativeBias:
    return RelativeBias(3, n_buckets, max_distance, bidirectional, rngs=nnx.Rngs(1), init=normal(1.0))


@pytest.mark.hf
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("n_buckets", "max_distance"), [(32, 128), (4, 2), (5, 7), (11, 20), (17, 53), (33, 100), (64, 1000)]
)
def test_buckets_are_those_of_t5(n_buckets, max_distance, bidirectional):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    if not bidirectional:
        max_distance += n_buckets // 2
    relative = np.concatenate([np.arange(-3 * max_distance, 3 * max_distance), [-100_000, 100_000]])
    expected = T5Attention._relative_position_bucket(torch.tensor(relative), bidirectional, n_buckets, max_distance)
    buckets = relative_bias(n_buckets, max_distance, bidirectional).buckets(relative)
    np.testing.assert_array_equal(buckets, expected.numpy())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_bias_is_the_row_of_its_bucket(bidirectional):
    """Raffel et al., 2020: 5 or 11 buckets a side, of which 2 or 5 are exact and the rest logarithmic up to 20."""
    bias = relative_bias(bidirectional=bidirectional)
    table, y = np.asarray(bias.table[...]), jax.jit(bias)(AT, TO)
    assert y.dtype == np.float32 and y.shape == (1, 3, 4, 10)
    side, exact = (5, 2) if bidirectional else (11, 5)
    for s, t in np.ndindex(4, 10):
        distance = TO[t] - AT[s]
        far = abs(distance) if bidirectional else max(-distance, 0)
        bucket = far
        if far >= exact:
            bucket = min(exact + int(math.log(far / exact) / math.log(20 / exact) * (side - exact)), side - 1)
        if bidirectional and distance > 0:
            bucket += side
        np.testing.assert_array_equal(y[0, :, s, t], table[bucket])


def test_a_bias_depends_only_on_the_distance_and_has_gradients_where_it_was_read():
    bias = relative_bias()
    np.testing.assert_array_equal(bias(AT, TO), bias(AT + 1000, TO + 1000))
    graphdef, params, infos = split(bias)
    g = jax.grad(lambda p: nnx.merge(graphdef, p)(AT[:1], TO[:3]).sum())(params)["table"]
    # Distances 0, 1 and 2 after the query: buckets 0, 5 + 1 and 5 + 2.
    np.testing.assert_array_equal(g, np.isin(np.arange(11), [0, 6, 7])[:, None] * np.ones(3))
    assert not infos["table"].decay


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3, 20, True), "model.relative_buckets: expected at least 4, got 3; raise it"),
        ((1, 20, False), "model.relative_buckets: expected at least 2, got 1; raise it"),
        (
            (32, 8, True),
            "model.relative_max_distance: expected more than the 8 distances that have a bucket of their own, got 8; "
            "raise it or lower model.relative_buckets",
        ),
    ],
)
def test_buckets_that_cannot_be_filled_are_refused(args, message):
    with pytest.raises(UserError) as e:
        relative_bias(*args)
    assert str(e.value) == message
