"""One small model's worth of parameters, with sizes that tell every axis apart."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.optim import Constant, clip_by_norm, global_norm, make_optimizer

AXES = {
    "embed": {"table": ("vocab", "embed")},
    "position": {"table": ("position", "embed")},
    "head": {"kernel": ("embed", "vocab")},
    "norm": {"scale": ("norm",)},
    "layers": {
        "norm": {"scale": ("layers", "norm")},
        "attn": {
            "q": ("layers", "embed", "heads", "head_dim"),
            "o": ("layers", "heads", "head_dim", "embed"),
            "q_bias": ("layers", "heads", "head_dim"),
        },
        "mlp": {"up": ("layers", "embed", "mlp")},
        "moe": {"router": ("layers", "embed", "experts"), "up": ("layers", "experts", "embed", "mlp")},
    },
}
PRIME = dict(layers=3, embed=7, heads=2, head_dim=5, mlp=11, vocab=13, position=4, norm=7, experts=2)
# For the mesh: sizes that 2 divides, and fewer parameters, each an example of its kind.
FEW = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {"norm": {"scale": ("layers", "norm")}, "attn": {"o": ("layers", "heads", "head_dim", "embed")}},
}
EVEN = dict(layers=2, embed=12, heads=4, head_dim=6, vocab=28, norm=12)
# Written out, not derived: the tests' own account of what is a matrix. (leading stacked dims, dims that are rows)
MATRICES = {
    "embed.table": (0, 1),
    "position.table": (0, 1),
    "head.kernel": (0, 1),
    "layers.attn.q": (1, 1),
    "layers.attn.o": (1, 2),
    "layers.mlp.up": (1, 1),
    "layers.moe.router": (1, 1),
    "layers.moe.up": (2, 1),
}
MUON = {"layers.attn.q", "layers.attn.o", "layers.mlp.up", "layers.moe.router", "layers.moe.up"}
UNDECAYED = {"position.table", "norm.scale", "layers.norm.scale", "layers.attn.q_bias"}


def is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Parameters, and one tree of gradients a step, unrelated to them."""

    params: Any
    grads: list[Any]
    axes: Any
    decay: Any
    matrices = MATRICES
    muon = MUON

    @staticmethod
    def flat(tree: Any) -> dict[str, Any]:
        """`layers.attn.q` -> leaf."""
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_axes)
        return {".".join(k.key for k in path): leaf for path, leaf in leaves}

    @classmethod
    def make(cls, axes: Any, sizes: dict[str, int], steps: int) -> Problem:
        rng = np.random.default_rng(0)

        def draw(scale: float) -> Any:
            def leaf(names):
                return jnp.asarray(scale * rng.normal(size=[sizes[a] for a in names]), jnp.float32)

            return jax.tree.map(leaf, axes, is_leaf=is_axes)

        decay = jax.tree_util.tree_map_with_path(
            lambda path, _: ".".join(k.key for k in path) not in UNDECAYED, axes, is_leaf=is_axes
        )
        # The scale varies over the steps, so that clipping and bias correction show.
        return cls(draw(0.5), [draw(0.1 * (i + 1)) for i in range(steps)], axes, decay)

    @functools.cache  # noqa: B019, a handful of instances
    def run(self, config: Any, *, jit: bool = True, total_steps: int = 100) -> tuple[Any, Any]:
        """(params, optimizer state) after all the gradients, as the train step would apply them."""
        tx, _ = make_optimizer(config, total_steps, self.decay, self.axes)

        def step(params, state, grads):
            grads = clip_by_norm(grads, global_norm(grads), config.clip_norm)
            updates, state = tx.update(grads, state, params)
            return jax.tree.map(jnp.add, params, updates), state

        step = jax.jit(step) if jit else step
        params, state = self.params, tx.init(self.params)
        for grads in self.grads:
            params, state = step(params, state, grads)
        return params, state


@pytest.fixture(scope="session")
def problem() -> Problem:
    return Problem.make(AXES, PRIME, steps=4)


@pytest.fixture(scope="session")
def small_problem() -> Problem:
    return Problem.make(FEW, EVEN, steps=3)


@pytest.fixture(params=["AdamW", "Lion", "SGD", "Adafactor", "Muon"])
def config(request) -> Any:
    """Each optimizer, with settings under which all of its parts act on the small parameters."""
    from lm import optim

    common = dict(lr=0.01, schedule=Constant(), weight_decay=0.1, clip_norm=2.0)
    extra = {"Adafactor": dict(min_dim_size_to_factor=5), "Muon": dict(adamw_lr=0.003)}
    return getattr(optim, request.param)(**common, **extra.get(request.param, {}))
