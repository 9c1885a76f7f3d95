"""Mixture of experts: a router sends each token to a few of many gated feed-forward layers.

Without a capacity no token is dropped, and a device needs the weights of all experts, one layer at a time: the mesh
axis `expert` then saves memory like `fsdp`. With one, experts stay where they are and tokens travel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.errors import UserError
from lm.nn.compute import DEFAULT, Compute
from lm.nn.dot import dot
from lm.nn.param import Init, cast, keep, param
from lm.sharding import constrain, per_device

BLOCK = 128  # rows of one product in `grouped_dot`: enough to use a matrix unit, and few to waste at the end of a group


class Router(NamedTuple):
    """What a router did, summed over the valid tokens, so that layers and batches add up; all in float32.

    counts [E]: how often each expert was among the top k. probs [E]: its probability. z []: logsumexp(logits)^2.
    n []: the tokens. dropped []: the pairs of token and expert that were over capacity.
    """

    counts: jax.Array
    probs: jax.Array
    z: jax.Array
    n: jax.Array
    dropped: jax.Array


class MoE(nnx.Module):
    """sum over the top_k experts e of a token: p_e (activation(x gate_e) * (x up_e)) down_e. x [B,S,D] -> [B,S,D].

    p is the softmax over all experts, in float32; `normalize` makes those of the top k sum to 1 (Mixtral does, Jiang et
    al., 2024). `capacity_factor` None: no token is dropped. Else an expert takes at most
    ceil(capacity_factor * top_k * S / E) tokens of a row, first choices before second ones and earlier tokens before
    later ones; a token over it gets only what its other experts give (Lepikhin et al., 2021; Fedus et al., 2021). Rows
    do not compete, so the result depends on neither batch nor devices; the dispatch takes memory in S^2.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        top_k: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
        init: Init,
        out_init: Init,
        normalize: bool = True,
        capacity_factor: float | None = None,
    ):
        if n_experts < 1:
            raise UserError(f"model.n_experts: expected a positive number, got {n_experts}")
        if not 1 <= top_k <= n_experts:
            raise UserError(f"model.top_k: expected 1 to model.n_experts={n_experts}, got {top_k}; set one of the two")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise UserError(
                f"model.capacity_factor: expected a positive number, got {capacity_factor}; None drops no token"
            )
        self.n_experts, self.top_k, self.activation = n_experts, top_k, activation
        self.normalize, self.capacity_factor = normalize, capacity_factor
        self.router = param(rngs, (d_model, n_experts), ("embed", "experts"), init)
        self.gate = param(rngs, (n_experts, d_model, d_ff), ("experts", "embed", "mlp"), init)
        self.up = param(rngs, (n_experts, d_model, d_ff), ("experts", "embed", "mlp"), init)
        self.down = param(rngs, (n_experts, d_ff, d_model), ("experts", "mlp", "embed"), out_init)

    def __call__(
        self,
        x: jax.Array,
        *,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        compute: Compute = DEFAULT,
    ) -> tuple[jax.Array, Router]:
        """x [B,S,D], valid bool [B,S] -> ([B,S,D], statistics). A token that is not valid goes nowhere and gets 0."""
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        # HIGHEST: a TPU rounds the factors of a float32 product to bfloat16, which changes who is chosen.
        logits = jnp.einsum("bsd,de->bse", x.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        probs = jax.nn.softmax(logits, axis=-1)
        weights, chosen = _top_k(probs, self.top_k)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        hot = jax.nn.one_hot(chosen, self.n_experts) * valid[..., None, None]  # padding takes no place in a queue
        if self.capacity_factor is None:
            y, dropped = self._dropless(x, weights, jnp.where(valid[..., None], chosen, self.n_experts)), jnp.zeros(())
        else:
            capacity = math.ceil(self.capacity_factor * self.top_k * x.shape[1] / self.n_experts)
            # A token chooses an expert once, so that a row never sends one more than its own length.
            y, dropped = self._dispatch(x, weights, hot, min(capacity, x.shape[1]), compute.dot)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        seen = valid.astype(jnp.float32)
        stats = (hot.sum((0, 1, 2)), jnp.einsum("bse,bs->e", probs, seen), (z * seen).sum(), seen.sum(), dropped)
        return constrain(y, "act_batch", "act_seq", "act_embed"), Router(*stats)

    def _dropless(self, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """weights, chosen [B,S,k], E for no choice. A device sorts its own tokens and has a part of each expert."""
        into, out_of = (None, None, "act_mlp"), (None, "act_mlp", None)
        tokens = ("act_batch", "act_seq", None)
        run = per_device(  # the compiler would gather all tokens for the sort
            functools.partial(_sorted_experts, activation=self.activation),
            (tokens, tokens, tokens, into, into, out_of),
            tokens,
            "act_mlp",
        )
        return run(x, weights, chosen, cast(self.gate, x), cast(self.up, x), cast(self.down, x))

    def _dispatch(
        self, x: jax.Array, weights: jax.Array, hot: jax.Array, capacity: int, kind: str
    ) -> tuple[jax.Array, jax.Array]:
        """weights [B,S,k], hot [B,S,k,E] -> ([B,S,D], pairs dropped). C is the capacity of an expert in a row."""
        b, s, k, e = hot.shape
        queue = jnp.swapaxes(hot, 1, 2).reshape(b, k * s, e)  # all first choices, then all second ones
        place = jnp.swapaxes((jnp.cumsum(queue, axis=1) - 1).reshape(b, k, s, e), 1, 2)
        taken = hot * (place < capacity)
        place = jnp.where(taken.sum(2) > 0, (place * taken).sum(2), -1)  # [B,S,E]: a token chooses an expert once
        # All zeros for -1: a dropped pair is sent nowhere.
        dispatch = jax.nn.one_hot(place.astype(jnp.int32), capacity, dtype=x.dtype)
        combine = dispatch * jnp.einsum("bske,bsk->bse", taken, weights)[..., None].astype(x.dtype)

        # Two places for one array make the compiler exchange tokens; else it gathers all of them for every expert.
        home, inner = (None, "act_batch", None, "act_embed"), ("act_experts", "act_groups", None)
        sent = constrain(constrain(jnp.einsum("bsec,bsd->ebcd", dispatch, x), *home), *inner, "act_embed")
        gate = keep(dot("ebcd,edf->ebcf", sent, self.gate, kind), "gate")
        up = keep(dot("ebcd,edf->ebcf", sent, self.up, kind), "up")
        y = constrain(self.activation(gate) * up, *inner, "act_mlp")
        y = constrain(constrain(dot("ebcf,efd->ebcd", y, self.down, kind), *inner, "act_embed"), *home)
        return jnp.einsum("bsec,ebcd->bsd", combine, y), (hot - taken).sum()


def _top_k(probs: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` along the last axis as a sort, which the compiler divides over devices; it gathers for top_k."""
    places = jax.lax.broadcasted_iota(jnp.int32, probs.shape, probs.ndim - 1)
    # Stable: of equal ones the lower id is first, as in top_k.
    negative, places = jax.lax.sort((-probs, places), dimension=-1, num_keys=1, is_stable=True)
    return -negative[..., :k], places[..., :k]


def _sorted_experts(x, weights, chosen, gate, up, down, *, activation) -> jax.Array:
    b, s, d = x.shape
    k, e = chosen.shape[-1], gate.shape[0]
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # [N k]: the pairs of token and choice, by expert
    # The last count is of what goes nowhere.
    sizes = jnp.bincount(chosen.reshape(-1), length=e + 1)[:e].astype(jnp.int32)
    sent = x.reshape(-1, d)[order // k]
    y = activation(keep(grouped_dot(sent, gate, sizes), "gate")) * keep(grouped_dot(sent, up, sizes), "up")
    y = grouped_dot(y, down, sizes)[jnp.argsort(order)].reshape(b, s, k, d)
    # The sum over experts is in float32 and rounded once.
    return jnp.einsum("bskd,bsk->bsd", y, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def balance_loss(counts: jax.Array, probs: jax.Array, n: jax.Array, n_experts: int) -> jax.Array:
    """E sum_e (counts_e / n) (probs_e / n) (Fedus et al., 2021, equation 4), top_k where the load is even.

    counts, probs [E] and n are `Router`'s, summed over whatever is to be balanced as one: tokens, and layers.
    """
    # A batch of padding alone has no tokens.
    n = jnp.maximum(n, 1)
    return n_experts * jnp.sum(counts / n * (probs / n))


def z_loss(z: jax.Array, n: jax.Array) -> jax.Array:
    """The mean of logsumexp(logits)^2, which keeps logits small (Zoph et al., 2022, equation 5)."""
    return z / jnp.maximum(n, 1)


# --- products of groups of rows with a matrix each --------------------------------------------------------------------


def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [M,D], w [E,D,F], sizes int32 [E] -> [M,F]: the first sizes[0] rows times w[0], and so on; 0 in rows left over.

    A TPU has an instruction for it. Elsewhere XLA would multiply all rows with all matrices, so blocks are looped over.
    """
    return jax.lax.platform_dependent(x, w, sizes, tpu=jax.lax.ragged_dot, default=blocked_dot)


@jax.custom_vjp  # by hand: JAX has no reverse mode for a loop whose number of turns is known at run time alone
def blocked_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_dot` as a loop over blocks of rows of one group each: M + E BLOCK rows of work at most."""
    block, n, at = _blocks(x.shape[0], sizes)
    # The last block may reach beyond the rows, where dynamic_slice would move it back.
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def body(i, y):
        group, start, _ = at(i)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, block)
        # Rows behind the end of the group belong to later blocks, which overwrite them, or to none.
        return jax.lax.dynamic_update_slice_in_dim(y, (rows @ w[group]).astype(y.dtype), start, axis=0)

    y = jax.lax.fori_loop(0, n, body, jnp.zeros((padded.shape[0], w.shape[2]), x.dtype))[: x.shape[0]]
    return jnp.where(jnp.arange(x.shape[0])[:, None] < sizes.sum(), y, 0)


def _blocked_dot_forward(x, w, sizes):
    return blocked_dot(x, w, sizes), (x, w, sizes)


def _blocked_dot_backward(saved, g):
    x, w, sizes = saved
    block, n, at = _blocks(x.shape[0], sizes)
    x_padded, g_padded = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, g))

    def body(i, dw):
        group, start, end = at(i)
        rows, grads = (jax.lax.dynamic_slice_in_dim(a, start, block) for a in (x_padded, g_padded))
        # Rows behind the end are of other groups.
        grads = jnp.where((start + jnp.arange(block) < end)[:, None], grads, 0)
        return dw.at[group].add(jnp.matmul(rows.T, grads, preferred_element_type=jnp.float32))

    # Float32: each block adds to it.
    dw = jax.lax.fori_loop(0, n, body, jnp.zeros(w.shape, jnp.float32)).astype(w.dtype)
    return blocked_dot(g, jnp.swapaxes(w, 1, 2), sizes), dw, None


blocked_dot.defvjp(_blocked_dot_forward, _blocked_dot_backward)


def _blocks(n_rows: int, sizes: jax.Array):
    """(rows of a block, how many there are, i -> the group of block i, its first row, and the end of the group)."""
    block = min(BLOCK, n_rows)
    ends, blocks = jnp.cumsum(sizes), -(-sizes // block)
    last = jnp.cumsum(blocks)

    def at(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.sum(last <= i)  # the first whose last block is after i; searchsorted is a loop of its own
        start = ends[group] - sizes[group] + (i - last[group] + blocks[group]) * block
        return group, start, ends[group]

    return block, last[-1], at
