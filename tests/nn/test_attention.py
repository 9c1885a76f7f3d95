from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.errors import UserError
from lm.models import Bart
from lm.models.base import abstract
from lm.nn import kernels
from lm.nn.attention import Attention, Heads, Inits, KVCache
from lm.nn.compute import Compute
from lm.nn.kernels.reference import attend
from lm.nn.mask import Mask, causal_mask, full_mask
from lm.nn.param import normal
from tests.models import reference
from tests.tolerances import assert_close, assert_equal

B, S, H, G, K = 2, 13, 6, 2, 5
rng = np.random.default_rng(0)
Q = rng.normal(size=(B, S, H, K)).astype(np.float32)
KEYS, V = (rng.normal(size=(B, S, G, K)).astype(np.float32) for _ in range(2))
SEGMENTS = np.array([[0] * 13, [0] * 3 + [1] * 6 + [2] * 4], np.int32)


@functools.partial(jax.jit, static_argnames="block")
def causal(q, k, v, segments=None, block=0):
    return attend(q, k, v, causal_mask(q.shape[1], segments), block=block)


def test_agrees_with_numpy():
    assert_close(causal(Q, KEYS, V), reference.attention(Q, KEYS, V))
    assert_close(causal(Q, KEYS, V, SEGMENTS), reference.attention(Q, KEYS, V, SEGMENTS))


@pytest.mark.parametrize("block", [1, 4, 5, 12, 13, 50])  # of 13: a block of one, of a remainder, all, and more
def test_blocks_of_any_size_are_as_the_whole(block):
    assert_close(causal(Q, KEYS, V, SEGMENTS, block=block), causal(Q, KEYS, V, SEGMENTS))


def test_gradients_through_blocks_are_those_of_the_whole():
    weight = rng.normal(size=Q.shape)

    def grads(block):
        f = lambda q, k, v: jnp.sum(attend(q, k, v, causal_mask(S, SEGMENTS), block=block) * weight)
        return jax.jit(jax.grad(f, argnums=(0, 1, 2)))(Q, KEYS, V)

    assert_close(grads(5), grads(0))


@pytest.mark.parametrize("block", [0, 4])
def test_the_future_changes_nothing(block):
    at = 8
    k, v = KEYS.copy(), V.copy()
    k[:, at:] += 1
    v[:, at:] += 1
    before, after = causal(Q, KEYS, V, block=block), causal(Q, k, v, block=block)
    assert_equal(before[:, :at], after[:, :at])
    assert (np.abs(before - after)[:, at:].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("block", [0, 4])
def test_another_segment_changes_nothing(block):
    k, v = KEYS.copy(), V.copy()
    k[1, 3:9] += 1
    v[1, 3:9] += 1
    before, after = (causal(Q, *kv, SEGMENTS, block=block) for kv in ((KEYS, V), (k, v)))
    assert_equal(before[0], after[0])
    assert_equal(before[1, :3], after[1, :3])
    assert_equal(before[1, 9:], after[1, 9:])
    assert (np.abs(before - after)[1, 3:9].max(axis=-1) > 1e-4).all()


def test_grouped_heads_are_as_keys_and_values_repeated():
    assert_close(causal(Q, KEYS, V), causal(Q, *(np.repeat(a, H // G, axis=2) for a in (KEYS, V))))


@pytest.mark.parametrize("block", [0, 2])
def test_queries_with_an_offset_see_the_cache_up_to_themselves(block):
    """Four queries that are tokens 6 to 9 of the row, keys in 13 slots of which the last three hold nothing."""
    rows = slice(6, 10)
    k, v = KEYS.copy(), V.copy()
    k[:, 10:], v[:, 10:] = np.inf, 1e9
    f = jax.jit(functools.partial(attend, block=block))
    mask = Mask(jnp.arange(6, 10), jnp.arange(S), SEGMENTS[:, rows], SEGMENTS)
    # inf would make any use of those keys visible as NaN; masked scores are replaced, so it does not.
    assert_close(f(Q[:, rows], k, v, mask), reference.attention(Q, KEYS, V, SEGMENTS)[:, rows])


@pytest.mark.parametrize("block", [0, 4])
def test_without_causality_every_token_of_the_segment_is_seen(block):
    """Queries of zero weigh all they see alike, so the output is the mean of those values."""
    f = jax.jit(functools.partial(attend, block=block))
    index = jnp.arange(S)
    y = f(np.zeros_like(Q), KEYS, V, Mask(index, index, SEGMENTS, SEGMENTS, causal=False, aligned=True))
    for row in range(B):
        for segment in np.unique(SEGMENTS[row]):
            at = SEGMENTS[row] == segment
            mean = np.repeat(V[row, at].mean(axis=0), H // G, axis=0)
            assert_close(y[row, at], np.broadcast_to(mean, y[row, at].shape))
    y = f(np.zeros_like(Q), KEYS, V, Mask(index, index, causal=False, aligned=True))
    assert_close(y[0, 4], np.repeat(V[0].mean(axis=0), H // G, axis=0))


def test_bfloat16_takes_its_softmax_in_float32():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (8 * Q, KEYS + 4, V))
    y = attend(q, k, v, causal_mask(S))  # not jitted: XLA may keep more precision than was asked for
    assert y.dtype == jnp.bfloat16
    e = reference.attention(*(np.asarray(a, np.float64) for a in (q, k, v)))
    # Only the weights and the output are rounded, half a unit each; a score of 60 in bfloat16 would be off by 0.1.
    np.testing.assert_allclose(np.asarray(y, np.float64), e, rtol=0, atol=2.0**-7 * np.abs(e).max())


def test_large_scores_do_not_overflow():
    y = causal(1e3 * Q, 1e3 * KEYS, V)
    assert_close(y, reference.attention(1e3 * Q.astype(np.float64), 1e3 * KEYS, V))


@pytest.mark.parametrize("block", [0, 20])
def test_dropout_takes_weights_at_the_rate_and_scales_the_rest(block):
    """Queries of zero and values that are one-hot in time show the weights themselves: 1 / T each before dropout."""
    n, rate = 64, 0.25
    index = jnp.arange(n)
    q = np.zeros((1, n, 2, n), np.float32)
    k, v = np.zeros((1, n, 1, n), np.float32), np.eye(n, dtype=np.float32)[None, :, None]
    f = jax.jit(functools.partial(attend, block=block, dropout_rate=rate))
    weights = np.asarray(f(q, k, v, Mask(index, index, causal=False), key=jax.random.key(0)))[0]
    kept = weights != 0
    assert abs(kept.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / kept.size) ** 0.5
    np.testing.assert_allclose(weights[kept], 1 / n / (1 - rate), rtol=1e-5)
    rows = kept.swapaxes(0, 1).reshape(-1, n)  # no two heads, queries or blocks with the same mask
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert_equal(f(q, k, v, Mask(index, index, causal=False), key=jax.random.key(0))[0], weights)
    np.testing.assert_allclose(f(q, k, v, Mask(index, index, causal=False)), 1 / n, rtol=1e-5)


def test_new_keys_are_written_at_the_index_and_nowhere_else():
    d, slots, at = 7, 11, 4
    draw = lambda key, shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)
    attention = Attention(d, Heads(4, 6, n_kv=2), rngs=nnx.Rngs(0), inits=Inits(draw, draw))
    x = rng.normal(size=(B, 3, d)).astype(np.float32)
    old = KVCache(*(rng.normal(size=(B, slots, 2, 6)).astype(np.float32) for _ in range(2)))
    mask = Mask(at + jnp.arange(3), jnp.arange(slots))
    y, new = jax.jit(lambda x, cache, index: attention(x, mask, cache=cache, index=index))(x, old, at)
    for name in "kv":
        before, after = getattr(old, name), np.asarray(getattr(new, name))
        written = np.einsum("bsd,dgk->bsgk", x, np.asarray(getattr(attention, name)[...]))
        assert_close(after[:, at : at + 3], written)
        assert_equal(np.delete(after, range(at, at + 3), axis=1), np.delete(before, range(at, at + 3), axis=1))
    assert y.shape == x.shape


def formula(q, k, v, seen, *, scale, bias=None, softcap=None):
    """Attention in float64, one query at a time. seen bool [S,T]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    out = np.zeros_like(q)
    for b, s, h in np.ndindex(q.shape[:3]):
        scores = scale * k[b, :, h] @ q[b, s, h]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias[0, h, s]
        weights = np.where(seen[s], np.exp(scores), 0.0)
        out[b, s, h] = weights @ v[b, :, h] / weights.sum()
    return out


@pytest.mark.parametrize("block", [0, 1, 4])
@pytest.mark.parametrize("window", [1, 4, 13, 20])
def test_a_window_counts_the_query_itself(window, block):
    ahead = np.arange(S)[:, None] - np.arange(S)
    f = jax.jit(lambda q, k, v: attend(q, k, v, causal_mask(S).within(window), block=block))
    seen = (ahead >= 0) & (ahead < window)
    assert_close(f(Q, KEYS, V), formula(Q, KEYS, V, seen, scale=K**-0.5))


def test_a_block_reads_no_key_outside_of_its_window():
    mask = causal_mask(S).within(4)
    assert mask.keys_for(slice(6, 9)) == slice(3, 9)
    assert causal_mask(S).keys_for(slice(6, 9)) == slice(0, 9)
    assert full_mask(S, S).within(4).keys_for(slice(6, 9)) == slice(0, S)


@pytest.mark.parametrize("block", [0, 4])
def test_scale_softcap_and_bias_are_the_formula_in_this_order(block):
    bias = rng.normal(size=(1, H, S, S)).astype(np.float32)
    f = jax.jit(lambda *a: attend(*a, causal_mask(S), scale=1.3, bias=bias, softcap=2.0, block=block))
    seen = np.tril(np.ones((S, S), bool))
    assert_close(f(Q, KEYS, V), formula(Q, KEYS, V, seen, scale=1.3, bias=bias, softcap=2.0))


def test_memory_is_attended_to_as_keys_and_values_of_another_sequence():
    d, t = 12, 7
    attn = Attention(d, Heads(3, 4), rngs=nnx.Rngs(0), inits=Inits(normal(0.5), normal(0.5)), bias=True)
    x, other = (rng.normal(size=(B, n, d)).astype(np.float32) for n in (S, t))
    y, cache = attn(x, full_mask(S, t), memory=attn.keys_values(jnp.asarray(other)))
    q, k, v = (
        np.einsum("bsd,dhk->bshk", a, w[...]) + b[...]
        for a, w, b in ((x, attn.q, attn.q_bias), (other, attn.k, attn.k_bias), (other, attn.v, attn.v_bias))
    )
    seen = np.ones((S, t), bool)
    want = np.einsum("bshk,hkd->bsd", formula(q, k, v, seen, scale=0.5), attn.o[...]) + attn.o_bias[...]
    assert cache is None
    assert_close(y, want)


class TestKernels:
    def test_a_kernel_that_lacks_what_a_model_needs_is_refused_by_name_and_passed_over_by_auto(self, monkeypatch):
        plain = kernels.Kernel(lambda *args, **options: None, frozenset({"window"}))
        monkeypatch.setattr(kernels, "KERNELS", {"plain": plain, **kernels.KERNELS})
        row, packed = causal_mask(S), causal_mask(S, SEGMENTS)
        assert kernels.choose("auto", kernels.needs(row.within(4))) is plain.attend
        assert kernels.choose("auto", kernels.needs(packed)) is attend
        assert kernels.choose("reference", kernels.needs(row)) is attend
        with pytest.raises(UserError, match=r"^model\.compute\.attention: expected a kernel with bias, segments, "):
            kernels.choose("plain", kernels.needs(packed, bias=True))

    def test_what_a_call_needs_is_told_by_its_mask(self):
        assert kernels.needs(causal_mask(S)) == set()
        assert kernels.needs(full_mask(S, S), dropout=True) == {"not causal", "dropout"}
        assert kernels.needs(Mask(jnp.arange(1), jnp.arange(S)), softcap=True) == {"cache", "softcap"}

    def test_a_kernel_that_is_not_there_is_refused_when_the_config_is_made(self):
        with pytest.raises(UserError, match=r"^model\.compute\.attention: expected one of 'auto', 'reference', got 'f"):
            Compute(attention="flash")
        with pytest.raises(UserError, match=r"^model\.compute\.dot: expected one of 'default', got 'int8'"):
            Compute(dot="int8")


def test_block_attention_mlp_and_head_are_named_in_the_program():
    model = Bart(vocab_size=53, d_model=12, n_layers=2, n_heads=2, d_ff=20)
    parts = abstract(model)

    def logits(params, tokens):
        module = nnx.merge(parts.graphdef, params)
        return module.logits(module(tokens, tokens, dtype=jnp.float32).hidden)

    tokens = jax.ShapeDtypeStruct((B, S), jnp.int32)
    text = jax.jit(logits).lower(parts.params, tokens).as_text(debug_info=True)
    for scope in ("block/attention/", "block/cross_attention/", "block/mlp/", "head/"):
        assert scope in text, scope
