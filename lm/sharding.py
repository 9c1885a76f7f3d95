"""Logical axes -> mesh axes. A parameter or activation names what its dimensions are; `Rules` says where they go.

Weight axes and activation axes have different names, so that FSDP shards `embed` of a weight without touching
`act_embed`. An unknown name, two dimensions on one mesh axis, or a size that does not divide raises: nothing is
replicated in silence.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm.errors import UserError, did_you_mean
from lm.mesh import AXES

Placement = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical axis -> mesh axis (or several, or None for replicated). The default is FSDP plus tensor parallelism."""

    # weights
    layers: Placement = None  # a scan slices this axis: split, each turn would fetch its layer
    embed: Placement = "fsdp"
    vocab: Placement = "tensor"
    heads: Placement = "tensor"
    kv_heads: Placement = "tensor"  # as `heads`: queries find their group's keys on their device
    head_dim: Placement = None  # a rotation needs both halves of a head
    mlp: Placement = "tensor"
    experts: Placement = "expert"
    position: Placement = None
    norm: Placement = None  # scales and biases of width d_model: too small to be worth a gather
    # activations
    act_batch: Placement = ("data", "fsdp", "expert")
    act_seq: Placement = "seq"
    act_embed: Placement = None  # each product with a weight would gather it again
    act_heads: Placement = "tensor"
    act_kv_heads: Placement = "tensor"
    act_mlp: Placement = "tensor"
    act_vocab: Placement = "tensor"
    act_experts: Placement = "expert"
    act_groups: Placement = ("data", "fsdp")  # rows whose tokens stand with their experts: act_batch less act_experts

    def __post_init__(self):
        for f in dataclasses.fields(self):
            axes = _as_tuple(getattr(self, f.name))
            for axis in axes:
                if axis not in AXES:
                    raise UserError(f"rules.{f.name}: no mesh axis {axis!r}{did_you_mean(axis, AXES)}")
            if len(set(axes)) < len(axes):
                raise UserError(f"rules.{f.name}: expected each mesh axis once, got {axes}; drop one")

    def spec(self, axes: Sequence[str | None], where: str = "") -> PartitionSpec:
        """The `PartitionSpec` of an array whose dimensions are `axes` (None: replicated)."""
        placed: list[Placement] = []
        used: dict[str, str] = {}
        for axis in axes:
            if axis is not None and axis not in _RULE_NAMES:
                raise UserError(f"{where}: no logical axis {axis!r}{did_you_mean(axis, _RULE_NAMES)}")
            placement = None if axis is None else getattr(self, axis)
            for mesh_axis in _as_tuple(placement):
                if mesh_axis in used:
                    raise UserError(
                        f"{where}: axes {used[mesh_axis]!r} and {axis!r} both go to mesh axis {mesh_axis!r}; "
                        f"set one of rules.{used[mesh_axis]}, rules.{axis} to None"
                    )
                used[mesh_axis] = str(axis)
            placed.append(placement)
        return PartitionSpec(*placed)


_RULE_NAMES = tuple(f.name for f in dataclasses.fields(Rules))


def spec_for(rules: Rules, sizes: Mapping[str, int], axes: Axes, shape: Sequence[int], where: str) -> PartitionSpec:
    """`rules.spec` checked against a shape and the mesh sizes (mesh axis -> devices)."""
    if len(axes) != len(shape):
        raise UserError(f"{where}: {len(axes)} axes {axes} for an array of shape {tuple(shape)}")
    spec = rules.spec(axes, where)
    for axis, size, placement in zip(axes, shape, spec, strict=True):
        shards = math.prod(sizes[a] for a in _as_tuple(placement))
        if size % shards:
            mesh_axes = " x ".join(f"{a}={sizes[a]}" for a in _as_tuple(placement))
            raise UserError(
                f"{where}: axis {axis!r} of size {size} is not divisible by mesh axis {mesh_axes}; "
                f"set Rules({axis}=None) or another mesh"
            )
    return spec


def shard_shape(sizes: Mapping[str, int], spec: PartitionSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape one device holds."""
    return tuple(n // math.prod(sizes[a] for a in _as_tuple(p)) for n, p in zip(shape, spec, strict=True))


def shardings(rules: Rules, mesh: jax.sharding.Mesh, axes: Any, abstract: Any) -> Any:
    """A `NamedSharding` for every array of `abstract`; `axes` has its structure with tuples of names as leaves."""

    def one(path, leaf, names):
        where = ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        return NamedSharding(mesh, spec_for(rules, mesh.shape, names, leaf.shape, where))

    return jax.tree_util.tree_map_with_path(one, abstract, axes)


_scope: contextvars.ContextVar[tuple[jax.sharding.Mesh, Rules] | None] = contextvars.ContextVar("scope", default=None)


@contextlib.contextmanager
def scope(mesh: jax.sharding.Mesh, rules: Rules) -> Iterator[None]:
    """Within it, `constrain` acts. Entered while a step is traced, so that modules need not carry a mesh."""
    token = _scope.set((mesh, rules))
    try:
        yield
    finally:
        _scope.reset(token)


def shards(axis: str) -> int:
    """Says over how many devices the current `scope` spreads a logical axis; 1 outside of one."""
    current = _scope.get()
    if current is None:
        return 1
    mesh, rules = current
    return math.prod(mesh.shape[a] for a in _as_tuple(getattr(rules, axis)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` pinned to where its activation axes go; does nothing outside a `scope` or on one device."""
    current = _scope.get()
    if current is None or current[0].size == 1:
        return x
    mesh, rules = current
    spec = spec_for(rules, mesh.shape, axes, x.shape, f"activation {axes}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def per_device(f: Callable[..., jax.Array], ins: Sequence[Axes], out: Axes, summed: str) -> Callable[..., jax.Array]:
    """`f` run on each device's own part of its arguments, whose axes are `ins`; what it returns has the axes `out`.

    The results are summed over the devices of the logical axis `summed`, one that arguments have and the result has
    not. For what the compiler cannot divide by itself, like a sort. Outside a `scope` or on one device it is `f`.
    """
    current = _scope.get()
    if current is None or current[0].size == 1:
        return f
    mesh, rules = current
    axes = _as_tuple(getattr(rules, summed))

    def local(*args: jax.Array) -> jax.Array:
        y = f(*args)
        return jax.lax.psum(y, axes) if axes else y

    def outer(*args: jax.Array) -> jax.Array:
        specs = tuple(
            spec_for(rules, mesh.shape, names, x.shape, f"activation {names}")
            for names, x in zip(ins, args, strict=True)
        )
        # check_vma would ask every loop within f to say over which mesh axes its carry varies.
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rules.spec(out), check_vma=False)(*args)

    return outer


def _as_tuple(placement: Placement) -> tuple[str, ...]:
    if placement is None:
        return ()
    return (placement,) if isinstance(placement, str) else tuple(placement)
