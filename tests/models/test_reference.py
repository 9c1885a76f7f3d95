"""GPT-2 and LLaMA against float64 numpy, and what must not change their outputs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.models import GPT2, Llama
from lm.models.base import abstract
from lm.nn.attention import KVCache
from lm.nn.compute import Compute
from lm.nn.mask import Mask
from lm.nn.position import Rope
from tests.models import reference
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal

B, S, V = 2, 13, 97
SHAPE = dict(vocab_size=V, d_model=24, n_layers=2, n_heads=4)
# An eps that shows, and a theta at which all the frequencies matter within 13 tokens.
LLAMA = Llama(**SHAPE, n_kv_heads=2, d_ff=40, rope=Rope(theta=50.0), norm_eps=0.01)
MODELS = {
    "gpt2": GPT2(**SHAPE, max_positions=17, norm_eps=0.01),
    "llama": LLAMA,
    "llama tied, wide heads": dataclasses.replace(LLAMA, tied=True, head_dim=10, n_kv_heads=1),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    model: GPT2 | Llama
    params: dict
    forward: object  # jitted (params, tokens, positions, segments) -> (hidden, logits)

    def reference(self, tokens, positions, segments):
        if isinstance(self.model, GPT2):
            f = functools.partial(reference.gpt2, eps=self.model.norm_eps)
        else:
            f = functools.partial(reference.llama, eps=self.model.norm_eps, theta=self.model.rope.theta)
        return f(self.params, tokens, positions=positions, segments=segments)


@functools.cache
def make_case(name: str) -> Case:
    model = MODELS[name]
    graphdef = abstract(model).graphdef

    @functools.partial(jax.jit, static_argnames="dtype")
    def forward(params, tokens, positions, segments, dtype="float32"):
        module = nnx.merge(graphdef, params)
        x = module(tokens, dtype=dtype, positions=positions, segments=segments).hidden
        return x, module.logits(x)

    return Case(model, random_params(model), forward)


@pytest.fixture(params=MODELS)
def case(request) -> Case:
    return make_case(request.param)


def random_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (B, S)).astype(np.int32)


SEGMENTS = np.array([[0] * 4 + [1] * 9, [0] * 6 + [1] * 2 + [2] * 5], np.int32)
POSITIONS = np.array([[*range(4), *range(9)], [*range(6), *range(2), *range(5)]], np.int32)
ONE = np.zeros((B, S), np.int32)
ROW = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))


def test_hidden_and_logits_agree_with_numpy(case):
    tokens = random_tokens()
    hidden, logits = case.forward(case.params, tokens, ROW, ONE)
    assert hidden.shape == (B, S, 24) and logits.shape == (B, S, V)
    assert_close((hidden, logits), case.reference(tokens, None, None))


def test_packed_documents_agree_with_numpy(case):
    tokens = random_tokens()
    actual = case.forward(case.params, tokens, POSITIONS, SEGMENTS)
    assert_close(actual, case.reference(tokens, POSITIONS, SEGMENTS))


def test_positions_default_to_the_place_in_the_row_and_segments_to_one():
    case = make_case("gpt2")
    graphdef, tokens = abstract(case.model).graphdef, random_tokens()
    hidden = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, dtype=jnp.float32)[0])(case.params)
    assert_close(hidden, case.forward(case.params, tokens, ROW, ONE)[0])


def test_a_later_token_changes_nothing_before_it(case):
    tokens, at = random_tokens(), 7
    other = tokens.copy()
    other[:, at:] = (other[:, at:] + 1) % V
    hidden, changed = (case.forward(case.params, t, ROW, ONE)[0] for t in (tokens, other))
    assert_equal(hidden[:, :at], changed[:, :at])
    assert (np.abs(hidden - changed)[:, at:].max(axis=-1) > 1e-3).all()


def test_another_document_of_the_row_changes_nothing(case):
    tokens = random_tokens()
    other = tokens.copy()
    other[1, :6] = (other[1, :6] + 1) % V
    hidden, changed = (case.forward(case.params, t, POSITIONS, SEGMENTS)[0] for t in (tokens, other))
    assert_equal(hidden[1, 6:], changed[1, 6:])
    assert_equal(hidden[0], changed[0])


def test_a_packed_document_is_as_it_would_be_alone(case):
    tokens = random_tokens()
    packed = case.forward(case.params, tokens, POSITIONS, SEGMENTS)[0][1, 6:8]
    alone = np.zeros((B, S), np.int32)
    alone[0, :2] = tokens[1, 6:8]
    assert_close(case.forward(case.params, alone, ROW, ONE)[0][0, :2], packed)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_is_near_float32_and_gives_float32_logits(name):
    case, tokens = make_case(name), random_tokens()
    hidden, logits = case.forward(case.params, tokens, ROW, ONE, dtype="bfloat16")
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert_close((hidden, logits), case.reference(tokens, None, None), "bfloat16")


@pytest.mark.parametrize("name, scan", [("gpt2", True), ("llama", True), ("llama", False)])
def test_prefill_and_single_steps_through_a_cache_equal_one_pass(name, scan):
    case, tokens = make_case(name), random_tokens()
    model = dataclasses.replace(case.model, compute=Compute(scan=scan))
    graphdef, slots, prompt = abstract(model).graphdef, 16, 5

    @jax.jit
    def step(params, tokens, index, cache):
        at = index + jnp.arange(tokens.shape[1])
        mask = Mask(at, jnp.arange(slots))
        positions = jnp.broadcast_to(at, tokens.shape)
        return nnx.merge(graphdef, params)(
            tokens, dtype=jnp.float32, positions=positions, cache=cache, mask=mask, index=index
        )

    # Slots that are not written yet hold what would be seen at once if they were attended to.
    shape = (model.n_layers, B, slots, *model.kv_shape)
    cache = KVCache(np.full(shape, 1e3, np.float32), np.full(shape, 1e3, np.float32))
    hidden, cache, *_ = step(case.params, tokens[:, :prompt], 0, cache)
    parts = [hidden]
    for i in range(prompt, S):
        hidden, cache, *_ = step(case.params, tokens[:, i : i + 1], i, cache)
        parts.append(hidden)
    assert cache.k.shape == shape
    assert_close(np.concatenate(parts, axis=1), case.forward(case.params, tokens, ROW, ONE)[0])
