"""The original Transformer, BART, mBART and T5 against float64 numpy, and what must not change their outputs."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.errors import UserError
from lm.models import (
    T5,
    Bart,
    MaskedLMAndPair,
    MBart,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    Transformer,
)
from lm.models.base import abstract
from lm.nn.attention import KVCache
from lm.nn.block import CrossCache
from lm.nn.compute import Compute
from lm.nn.mask import Mask
from lm.nn.param import paths
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal

B, S, T, V, D = 2, 11, 7, 53, 12
SIZES = dict(vocab_size=V, d_model=D, n_layers=3, n_encoder_layers=2, n_heads=3, d_ff=17)
ASYMMETRIC = dict(**SIZES, n_encoder_heads=2, encoder_d_ff=19)
T5_SIZES = dict(**SIZES, head_dim=5, relative_buckets=8, relative_max_distance=9, norm_eps=0.01)
MODELS = {
    "transformer": Transformer(**ASYMMETRIC),
    "two vocabularies": Transformer(**ASYMMETRIC, target_vocab_size=47, tied=False, logits_bias=True),
    "bart": Bart(**ASYMMETRIC, max_positions=13, scale_embed=True, activation="relu"),
    "mbart": MBart(**ASYMMETRIC, max_positions=13, activation="relu"),
    "t5": T5(**T5_SIZES),
    "t5 1.1": T5(**T5_SIZES, gated=True, activation="silu", tied=False, scale_output=False),
}


# --- the papers, in numpy -----------------------------------------------------------------------------------------


class Reference:
    """One pair of rows at a time; its loops are over heads and tokens."""

    def __init__(self, model, params):
        self.m, self.p = model, jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        self.is_t5 = isinstance(model, T5)

    def norm(self, x, p):
        if "bias" not in p:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.m.norm_eps) * p["scale"]
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def attention(self, p, x, y, allowed, bias):
        out = np.zeros_like(x)
        for h in range(p["q"].shape[1]):
            q, k, v = (
                z @ p[n][:, h] + p.get(f"{n}_bias", np.zeros(p[n].shape[1:]))[h] for n, z in zip("qkv", (x, y, y))
            )
            scores = q @ k.T / (1.0 if self.is_t5 else math.sqrt(q.shape[-1])) + (0.0 if bias is None else bias[h])
            weights = np.where(allowed, np.exp(scores - scores.max()), 0.0)
            out += weights / weights.sum(-1, keepdims=True) @ v @ p["o"][h]
        return out + p.get("o_bias", 0.0)

    def feed_forward(self, p, x):
        up = x @ p["up"] + p.get("up_bias", 0.0)
        if "gate" in p:
            gate = x @ p["gate"]
            return (gate / (1 + np.exp(-gate)) * up) @ p["down"]
        return np.maximum(up, 0.0) @ p["down"] + p.get("down_bias", 0.0)

    def bucket(self, distance, bidirectional):
        """T5's: half of the buckets (of each direction) exact, the rest logarithmic."""
        n, first = self.m.relative_buckets, 0
        if bidirectional:
            n //= 2
            first = n if distance > 0 else 0
        away = abs(distance) if bidirectional else max(-distance, 0)
        exact = n // 2
        if away < exact:
            return first + away
        grown = exact + int(math.log(away / exact) / math.log(self.m.relative_max_distance / exact) * (n - exact))
        return first + min(grown, n - 1)

    def side(self, name, table, tokens, memory=None):
        p, m, n = self.p[name], self.m, len(tokens)
        x = table[tokens] * (math.sqrt(D) if getattr(m, "scale_embed", False) else 1.0)
        bias = None
        if self.is_t5:
            at = [[self.bucket(k - q, memory is None) for k in range(n)] for q in range(n)]
            bias = np.moveaxis(p["bias"]["table"][np.array(at)], -1, 0)
        elif isinstance(m, Bart):
            x = self.norm(x + p["positions"]["table"][np.arange(n) + 2], p["embed_norm"])
        else:
            angles = np.arange(n)[:, None] / 10_000.0 ** (np.arange(0, D, 2) / D)
            x = x + np.hstack([np.sin(angles), np.cos(angles)])
        own = np.tri(n, dtype=bool) if memory is not None else np.ones((n, n), bool)
        for i in range(m.n_layers if memory is not None else m.n_encoder_layers):
            layer = jax.tree.map(lambda a: a[i], p["layers"])  # noqa: B023, called at once
            parts = [("norm1", lambda h: self.attention(layer["attn"], h, h, own, bias))]  # noqa: B023
            if memory is not None:
                seen = np.ones((n, len(memory)), bool)
                parts.append(("cross_norm", lambda h: self.attention(layer["cross"], h, memory, seen, None)))  # noqa: B023
            parts.append(("norm2", lambda h: self.feed_forward(layer["mlp"], h)))  # noqa: B023
            for norm, part in parts:
                if self.is_t5 or isinstance(m, MBart):
                    x = x + part(self.norm(x, layer[norm]))
                else:
                    x = self.norm(x + part(x), layer[norm])
        return self.norm(x, p["norm"]) if "norm" in p else x

    def __call__(self, inputs, targets):
        """[S], [T] -> logits [T,V]."""
        p = self.p
        memory = self.side("encoder", p["embed"]["table"], inputs)
        own = p["target_embed" if "target_embed" in p else "embed"]["table"]
        x = self.side("decoder", own, targets, memory)
        x = x / math.sqrt(D) if getattr(self.m, "scale_output", False) else x
        head = p.get("head", {})
        return x @ head.get("table", own).T + head.get("bias", 0.0)


# ------------------------------------------------------------------------------------------------------------------


@functools.cache
def case(name: str, **changes):
    """(model, params, logits(params, inputs, targets, more))."""
    model = dataclasses.replace(MODELS[name], **changes)
    graphdef = abstract(model).graphdef

    @jax.jit
    def forward(params, inputs, targets, more):
        module = nnx.merge(graphdef, params)
        return module.logits(module(inputs, targets, dtype=jnp.float32, **more).hidden)

    return model, random_params(model), forward


ONES, TARGET_ONES = np.ones((B, S), np.int32), np.ones((B, T), np.int32)
ROW, TARGET_ROW = ONES.cumsum(axis=1) - 1, TARGET_ONES.cumsum(axis=1) - 1
# Given in full, so that the tests below share one compiled program for each model.
PLAIN = {
    "valid": ONES > 0,
    "segments": ONES,
    "positions": ROW,
    "target_segments": TARGET_ONES,
    "target_positions": TARGET_ROW,
}


def random_tokens(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, V, (B, S)).astype(np.int32), rng.integers(1, 47, (B, T)).astype(np.int32)


def expected_logits(name: str, inputs, targets) -> np.ndarray:
    """inputs and targets of each row [S], [T], of any lengths."""
    model, params, _ = case(name)
    return np.stack([Reference(model, params)(*pair) for pair in zip(inputs, targets)])


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_numpy(name):
    _, params, forward = case(name)
    assert_close(forward(params, *random_tokens(), PLAIN), expected_logits(name, *random_tokens()))


@pytest.mark.parametrize("name", ["transformer", "mbart"])
def test_segments_and_positions_default_to_one_row(name):
    _, params, forward = case(name)
    assert_close(forward(params, *random_tokens(), {}), expected_logits(name, *random_tokens()))


@pytest.mark.parametrize("name", MODELS)
def test_padding_of_the_inputs_does_not_change_logits(name):
    _, params, forward = case(name)
    inputs, targets = random_tokens()
    more = PLAIN | {"valid": np.arange(S) < np.array([[S], [6]])}
    padded = forward(params, inputs, targets, more)
    assert_equal(padded, forward(params, np.where(more["valid"], inputs, 5), targets, more))
    assert_close(padded[1:], expected_logits(name, inputs[1:, :6], targets[1:]))


@pytest.mark.parametrize("name", MODELS)
def test_a_later_target_changes_nothing_before_it(name):
    _, params, forward = case(name)
    inputs, targets = random_tokens()
    other = targets.copy()
    other[:, 4:] = other[:, 4:] % 46 + 1
    logits, changed = (forward(params, inputs, t, PLAIN) for t in (targets, other))
    assert_equal(changed[:, :4], logits[:, :4])
    assert np.abs(logits - changed)[:, 4:].max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_packed_pairs_are_as_they_would_be_alone(name):
    _, params, forward = case(name)
    inputs, targets = random_tokens()
    s, t = 4, 3
    more = PLAIN | {
        "segments": np.where(ROW < s, 1, 2),
        "positions": np.where(ROW < s, ROW, ROW - s),
        "target_segments": np.where(TARGET_ROW < t, 1, 2),
        "target_positions": np.where(TARGET_ROW < t, TARGET_ROW, TARGET_ROW - t),
    }
    packed = forward(params, inputs, targets, more)
    assert_close(packed[:, :t], expected_logits(name, inputs[:, :s], targets[:, :t]))
    assert_close(packed[:, t:], expected_logits(name, inputs[:, s:], targets[:, t:]))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_scanned_layers_equal_unrolled_ones(name):
    _, params, forward = case(name)
    _, _, unrolled = case(name, compute=Compute(scan=False, remat="none"))
    assert_close(forward(params, *random_tokens(), PLAIN), unrolled(params, *random_tokens(), PLAIN))


@pytest.mark.parametrize("name", MODELS)
def test_single_steps_over_a_cached_memory_equal_one_pass(name):
    model, params, forward = case(name)
    inputs, targets = random_tokens()
    real, slots = np.arange(S) < np.array([[S], [6]]), T + 2
    graphdef = abstract(model).graphdef

    @jax.jit
    def caches(params):
        module = nnx.merge(graphdef, params)
        memory = module.encode(inputs, dtype=jnp.float32, valid=real).hidden
        layer, stacked = nnx.split(module.decoder.layers)
        keys_values = jax.vmap(lambda p: nnx.merge(layer, p).cross.keys_values(memory))(stacked)
        own = jnp.zeros((model.n_layers, B, slots, *model.kv_shape))
        return CrossCache(KVCache(own, own), keys_values)

    @jax.jit
    def step(params, tokens, index, cache):
        module = nnx.merge(graphdef, params)
        out = module.decode(
            tokens,
            None,
            module.cross_mask(tokens.shape, inputs, real),
            dtype=jnp.float32,
            positions=jnp.broadcast_to(index, tokens.shape),
            mask=Mask(index[None], jnp.arange(slots)),
            cache=cache,
            index=index,
        )
        return module.logits(out.hidden), out.cache

    cache, logits = caches(params), []
    for i in range(T):
        out, cache = step(params, targets[:, i : i + 1], jnp.int32(i), cache)
        logits.append(out)
    assert_close(jnp.concatenate(logits, axis=1), forward(params, inputs, targets, PLAIN | {"valid": real}))


def test_a_fixed_bias_of_the_logits_gets_no_gradient():
    _, params, forward = case("two vocabularies")
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(forward(p, *random_tokens(), PLAIN) ** 2)))(params)
    assert np.all(gradient["head"]["bias"] == 0)
    assert np.abs(gradient["head"]["table"]).max() > 0


@pytest.mark.parametrize(
    "model, n",
    [(T5(**T5_SIZES, task=SequenceClassification(n_labels=5)), 5), (Bart(**ASYMMETRIC, task=QuestionAnswering()), 2)],
)
def test_labels_are_read_from_the_decoder(model, n):
    def labels(params):
        module = nnx.merge(abstract(model).graphdef, params)
        assert not hasattr(module, "head")
        return module.labels(module(*random_tokens(), dtype=jnp.float32).hidden)

    assert jax.eval_shape(labels, abstract(model).params).shape == (B, T, n)


def test_tokens_are_labelled_by_an_encoder_alone():
    model = T5(**T5_SIZES, task=TokenClassification(n_labels=5))

    def labels(params):
        module = nnx.merge(abstract(model).graphdef, params)
        return module.labels(module.encode(random_tokens()[0], dtype=jnp.float32).hidden)

    assert jax.eval_shape(labels, abstract(model).params).shape == (B, S, 5)
    assert not any(path.startswith("decoder") for path in paths(abstract(model).params))


@pytest.mark.parametrize("v1_1", [False, True])
def test_initial_logits_of_t5_are_of_unit_size(v1_1):
    """What its initial values, scores without a scale and the scaled output are balanced for."""
    changes = dict(tied=False, scale_output=False, gated=True, activation="gelu_tanh") if v1_1 else {}
    model = T5(d_model=64, n_layers=2, n_heads=4, d_ff=96, vocab_size=V, head_dim=24, **changes)

    @jax.jit
    def logits(key):
        module = model.build(nnx.Rngs(params=key))
        return module.logits(module(*random_tokens(), dtype=jnp.float32).hidden)

    assert 0.5 < np.std(logits(jax.random.key(0))) < 2.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Transformer(**ASYMMETRIC | {"n_encoder_heads": 5}), "model.n_encoder_heads: 5 does not divide"),
        (lambda: Transformer(**SIZES, encoder_d_ff=0), "model.encoder_d_ff: expected at least 1, got 0"),
        (
            lambda: Transformer(**SIZES, activation_dropout=1.0),
            r"model.activation_dropout: expected a rate in \[0, 1\)",
        ),
        (lambda: Bart(**SIZES, max_positions=0), "model.max_positions: expected at least 1"),
        (lambda: Bart(**SIZES, task=TokenClassification(n_labels=2)), "got TokenClassification"),
        (lambda: T5(**T5_SIZES | {"head_dim": 0}), "model.head_dim: expected at least 1"),
        (lambda: abstract(T5(**T5_SIZES | {"relative_max_distance": 2})), "model.relative_max_distance: expected more"),
        (lambda: abstract(T5(**T5_SIZES, task=MaskedLMAndPair())), "got MaskedLMAndPair"),
    ],
)
def test_impossible_configs_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
