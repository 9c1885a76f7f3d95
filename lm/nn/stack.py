"""n layers applied in order. Parameters are always stacked on a leading layers axis, however they are run.

So a checkpoint does not depend on `scan` or `remat`, and those can change between a run and its continuation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.block import Block, MakeBlock

Remat = Literal["none", "selective", "dots", "full"]

# What `selective` keeps of a layer; the parts name these with `keep`. Norms, activations and attention weights are
# recomputed: cheap to make again and as large as all the rest together (Korthikanti et al., 2022, section 5).
_KEPT = ("q", "k", "v", "attended", "residual", "up", "gate")
_POLICIES = {
    "selective": jax.checkpoint_policies.save_only_these_names(*_KEPT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul outputs, recompute the rest
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the layer's input
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """How n layers run: x [B,S,D] -> ([B,S,D], caches). It holds no parameters; the model holds `init`'s result.

    `scan` compiles one layer and loops over it (small programs, fast compiles); otherwise the loop is unrolled.
    `remat` says what the backward pass recomputes. `cache` has a leading layers axis; `args` go to every layer.
    """

    n_layers: int
    scan: bool = True
    remat: Remat = "none"

    def init(self, make: MakeBlock, rngs: nnx.Rngs) -> Block:
        """One block whose parameters are those of all layers, stacked."""
        metadata = {nnx.PARTITION_NAME: "layers", "axes": "layers"}
        stacked = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata=metadata)
        return stacked(rngs.split(self.n_layers))

    def __call__(
        self, block: Block, x: jax.Array, *args: Any, key: jax.Array | None = None, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        graphdef, params = nnx.split(block)
        keys = None if key is None else jax.random.split(key, self.n_layers)

        def layer(x, xs):
            p, k, c = xs
            return nnx.merge(graphdef, p)(x, *args, key=k, cache=c)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=_POLICIES[self.remat], prevent_cse=not self.scan)
        if self.scan:
            return jax.lax.scan(layer, x, (params, keys, cache))
        caches = []
        for xs in zip(*(_unstack_tree(t, self.n_layers) for t in (params, keys, cache)), strict=True):
            x, c = layer(x, xs)
            caches.append(c)
        return x, None if cache is None else jax.tree.map(lambda *c: jnp.stack(c), *caches)


def _unstack_tree(tree: Any, n: int) -> list:
    leaves, treedef = jax.tree.flatten(tree)
    rows = [unstack(leaf, n) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [r[i] for r in rows]) for i in range(n)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(x: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """x [n, ...] -> n arrays. Its gradient is one `stack`; that of indexing would be a sum of n padded copies."""
    return tuple(x[i] for i in range(n))


unstack.defvjp(lambda x, n: (unstack(x, n), None), lambda n, _, g: (jnp.stack(g),))
