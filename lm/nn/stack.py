"""Layers applied in order. Parameters are always stacked on a leading layers axis, however they are run.

So a checkpoint does not depend on `scan` or `remat`, and those can change between a run and its continuation. Layers
may differ in what is static (windows, rotations: a `Layer` each), come from several blocks (dense and routed layers in
turn) and share parameters (ALBERT): a scan then runs over the unit that repeats.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.block import AnyBlock, Context, Layer, MakeBlock
from lm.nn.compute import Compute

# What `selective` keeps of a layer; the parts name these with `keep`. Norms, activations and attention weights are
# recomputed: cheap to make again and as large as all the rest together (Korthikanti et al., 2022, section 5).
_KEPT = ("q", "k", "v", "attended", "residual", "up", "gate")
_POLICIES = {
    "selective": jax.checkpoint_policies.save_only_these_names(*_KEPT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul outputs, recompute the rest
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the layer's input
}
MAX_UNIT = 8  # layers that a scan may hold in its body: what compiles is a copy of each


class Stacked(NamedTuple):
    """x [B,S,D]; the new caches [L,...]; router statistics of the layers that have a router, [N,...] or None; and, if
    recorded, the output of each layer [L,B,S,D]."""

    x: jax.Array
    cache: Any
    router: Any
    states: jax.Array | None


class Segment(NamedTuple):
    """`unit` run `repeats` times: each time with the next parameters of its blocks, or, if `shared`, with the same."""

    unit: tuple[Layer, ...]
    repeats: int
    shared: bool


@dataclasses.dataclass(frozen=True)
class Stack:
    """How layers run. It holds no parameters; the model holds what `init` makes, one block for each kind of layer.

    `layers` is a number of equal layers, or says what each is. `compute` says how they run, here and inside of them.
    """

    layers: int | tuple[Layer, ...]
    compute: Compute = Compute()

    @functools.cached_property
    def order(self) -> tuple[Layer, ...]:
        if isinstance(self.layers, int):
            return tuple(Layer(index=i) for i in range(self.layers))
        return self.layers

    def init(self, make: MakeBlock, rngs: nnx.Rngs, block: int = 0) -> Any:
        """One block whose parameters are those of all its layers, stacked."""
        n = 1 + max(layer.index for layer in self.order if layer.block == block)
        metadata = {nnx.PARTITION_NAME: "layers", "axes": "layers"}
        stacked = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata=metadata)
        return stacked(rngs.split(n))

    def __call__(
        self,
        blocks: Sequence[AnyBlock],
        x: jax.Array,
        context: Context,
        *,
        key: jax.Array | None = None,
        cache: Any = None,
        record: bool = False,
    ) -> Stacked:
        """Runs the layers over x [B,S,D]; cache has a leading layers axis; `record` keeps the output of every layer."""
        graphdefs, params = zip(*(nnx.split(block) for block in blocks), strict=True)
        # By layer: scanned and unrolled, dropout is the same.
        keys = None if key is None else jax.random.split(key, len(self.order))
        context = context._replace(compute=self.compute)

        def run(layer: Layer):
            def one(x, params, key, cache):
                return nnx.merge(graphdefs[layer.block], params)(x, context, layer, key=key, cache=cache)

            if self.compute.remat == "none":
                return one
            # Within a scan XLA cannot merge the recomputation with the forward pass, and the barriers against it would
            # only cost time.
            return jax.checkpoint(one, policy=_POLICIES[self.compute.remat], prevent_cse=not self.compute.scan)

        outs = []
        first = 0
        # Unrolled, it is one unit of all layers, which finds its parameters by index, as a shared one does.
        for segment in segments(self.order) if self.compute.scan else [Segment(self.order, 1, True)]:
            n = len(segment.unit) * segment.repeats
            x, out = _run(segment, run, params, x, _cut(keys, first, n), _cut(cache, first, n), record)
            outs.append(out)
            first += n
        cache, router, states = (_join([out[i] for out in outs]) for i in range(3))
        return Stacked(x, cache, router, states)


def segments(order: Sequence[Layer]) -> list[Segment]:
    """The layers as repeated units, each over as long a stretch as can be found."""
    out, at = [], 0
    while at < len(order):
        longest = min(MAX_UNIT, len(order) - at)
        options = [_repeat(order, at, size, shared) for size in range(1, longest + 1) for shared in (False, True)]
        options = options[:1] + [s for s in options if s.repeats > 1]  # where nothing repeats, a single layer
        best = max(options, key=lambda s: len(s.unit) * s.repeats)  # of equals the first, with the shortest unit
        out.append(best)
        at += len(best.unit) * best.repeats
    return out


def _repeat(order: Sequence[Layer], at: int, size: int, shared: bool) -> Segment:
    unit = tuple(order[at : at + size])
    # How far a layer's index moves from repeat to repeat.
    steps = [0 if shared else sum(other.block == layer.block for other in unit) for layer in unit]
    repeats = 1
    while at + (repeats + 1) * size <= len(order) and all(
        order[at + repeats * size + j] == dataclasses.replace(layer, index=layer.index + repeats * step)
        for j, (layer, step) in enumerate(zip(unit, steps, strict=True))
    ):
        repeats += 1
    return Segment(unit, repeats, shared)


def _run(segment: Segment, run: Any, params: Sequence[Any], x: jax.Array, keys: Any, caches: Any, record: bool):
    """(x, (caches, routers, states)) of one segment, with a leading axis of its layers, or of its routers."""
    unit, repeats, shared = segment
    bodies = [run(layer) for layer in unit]
    used = {layer.block: [other.index for other in unit if other.block == layer.block] for layer in unit}

    def body(x, xs):
        own, keys, caches = xs
        rows = {b: _unstack_tree(tree, jax.tree.leaves(tree)[0].shape[0]) for b, tree in own.items()}
        first = {b: 0 if shared else min(indexes) for b, indexes in used.items()}
        layers = [rows[layer.block][layer.index - first[layer.block]] for layer in unit]
        return _unit(bodies, x, layers, *(_unstack_tree(t, len(unit)) for t in (keys, caches)), record)

    if repeats == 1:
        own = {b: params[b] if shared else _cut(params[b], min(n), len(n)) for b, n in used.items()}
        return body(x, (own, keys, caches))

    def folded(tree: Any, size: int) -> Any:  # [repeats * size, ...] -> [repeats, size, ...]
        return jax.tree.map(lambda t: t.reshape(repeats, size, *t.shape[1:]), tree)

    moving = {}
    if not shared:
        for b, indexes in used.items():
            moving[b] = folded(_cut(params[b], min(indexes), repeats * len(indexes)), len(indexes))
    fixed = {b: params[b] for b in used if shared}  # as scanned arrays they would be repeated for each turn
    xs = (moving, folded(keys, len(unit)), folded(caches, len(unit)))
    x, outs = jax.lax.scan(lambda x, xs: body(x, (fixed | xs[0], *xs[1:])), x, xs, length=repeats)
    return x, tuple(jax.tree.map(lambda t: t.reshape(-1, *t.shape[2:]), out) for out in outs)


def _unit(bodies, x: jax.Array, params: Sequence[Any], keys: Sequence[Any], caches: Sequence[Any], record: bool):
    new, routers, states = [], [], []
    for body, p, k, c in zip(bodies, params, keys, caches, strict=True):
        x, c, router = body(x, p, k, c)
        new += [] if c is None else [c]
        routers += [] if router is None else [router]
        states += [x] if record else []
    stack = lambda trees: jax.tree.map(lambda *t: jnp.stack(t), *trees) if trees else None
    return x, tuple(map(stack, (new, routers, states)))


def _cut(tree: Any, first: int, n: int) -> Any:
    """Takes rows first to first + n of every array."""
    return jax.tree.map(lambda x: x if n == x.shape[0] else x[first : first + n], tree)


def _join(trees: list) -> Any:
    trees = [t for t in trees if t is not None]
    if not trees:
        return None
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *t: jnp.concatenate(t), *trees)


def _unstack_tree(tree: Any, n: int) -> list:
    leaves, treedef = jax.tree.flatten(tree)
    rows = [unstack(leaf, n) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [r[i] for r in rows]) for i in range(n)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(x: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """x [n, ...] -> n arrays. Its gradient is one `stack`; that of indexing would be a sum of n padded copies."""
    return tuple(x[i] for i in range(n))


unstack.defvjp(lambda x, n: (unstack(x, n), None), lambda n, _, g: (jnp.stack(g),))
