"""A parameter declares once what everything else derives from: shape, axes, init, weight decay, where it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.sharding import Axes

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
# The places of a row that are multiplied with a parameter: each that the layers run over, those where something is
# predicted, those of an encoder that a decoder reads, one for the row, or none, as it is only looked up.
Used = Literal["token", "target", "memory", "row", "lookup"]


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What a parameter declared: `axes` names each dimension of `shape`; `decay` says if weight decay applies.

    used: at which places. keys: of a map that makes queries, at which places their keys are.
    """

    shape: tuple[int, ...]
    axes: Axes
    decay: bool
    used: Used = "token"
    keys: Used | None = None


def normal(std: float) -> Init:
    """Normal with standard deviation `std`."""
    return nnx.initializers.normal(std)


zeros: Init = nnx.initializers.zeros
ones: Init = nnx.initializers.ones


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: Axes,
    init: Init,
    *,
    decay: bool = True,
    used: Used = "token",
    keys: Used | None = None,
) -> nnx.Param:
    """A float32 parameter. Norm scales, biases and positions pass `decay=False`; see `ParamInfo` for used and keys."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, decay=decay, used=used, keys=keys)


def place(part: nnx.Module | nnx.Param | None, used: Used, *, was: Used = "token") -> None:
    """Declares for what a part holds that it is used at other places than it was: its container knows, it does not."""
    if isinstance(part, nnx.Param):
        meta = part.get_metadata()
        if meta["used"] == was:  # what a part declared itself stays
            part.set_metadata(used=used)
        if meta["keys"] == was:
            part.set_metadata(keys=used)
    elif part is not None:
        for inner in vars(part).values():
            if isinstance(inner, (nnx.Module, nnx.Param)):
                place(inner, used, was=was)


def attach(module: nnx.Module, **parts: nnx.Module | None) -> None:
    """Sets the parts that are given; a module without one has no such attribute."""
    for name, part in parts.items():
        if part is not None:
            setattr(module, name, part)


def cast(p: nnx.Param, like: jax.Array) -> jax.Array:
    """The parameter in the dtype of the activation it meets."""
    return p[...].astype(like.dtype)


def keep(x: jax.Array, name: str) -> jax.Array:
    """`x`, named for the remat policy `selective` to keep for the backward pass (see `lm.nn.stack`)."""
    return checkpoint_name(x, name)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """(graphdef, params, infos): the parameters as a plain nested dict, and a `ParamInfo` for each."""
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)  # plain dicts: paths in checkpoints do not depend on Flax
    infos: dict = {}
    for path, variable in nnx.to_flat_state(state):
        meta = variable.get_metadata()
        node = infos
        for key in path[:-1]:
            node = node.setdefault(key, {})
        axes = tuple(meta["axes"])
        node[path[-1]] = ParamInfo(tuple(variable.shape), axes, meta["decay"], meta["used"], meta["keys"])
    return graphdef, params, infos


def paths(tree: Any) -> dict[str, Any]:
    """Flat `layers.attn.q` -> leaf of a nested dict."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, ParamInfo))
    return {".".join(str(k.key) for k in path): leaf for path, leaf in leaves}
