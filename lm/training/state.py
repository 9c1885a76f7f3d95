"""What a run carries from step to step, and what is known of it before any of it is on a device."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lm import sharding
from lm.config import Config
from lm.data.stream.batches import BatchShape
from lm.models import base as models
from lm.nn import param
from lm.optim import make_optimizer, state_axes


class Position(NamedTuple):
    """Where a run is: how many steps are done, and how many examples they read, which is all that the data needs."""

    step: int = 0
    examples_seen: int = 0

    def after(self, shape: BatchShape) -> Position:
        """The position after a step on a batch of this shape."""
        return Position(self.step + 1, self.examples_seen + shape.examples)


class State(NamedTuple):
    """A run's arrays, or a tree of what belongs to each of them. ema: None where no moving average is kept.

    The order of the fields is that in which `StateSpec.shardings` meets them: an error names a parameter before the
    moment of an optimizer that follows from it.
    """

    step: Any  # int32 []
    params: Any
    opt: Any
    ema: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: their moving average where one is kept."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """What follows of a config for the state, the optimizer included: needs no mesh and touches no device."""

    graphdef: nnx.GraphDef
    infos: dict  # ParamInfo of every parameter
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: State  # ShapeDtypeStructs
    axes: State  # tuples of logical axis names

    @classmethod
    def of(cls, config: Config) -> StateSpec:
        """Derives the spec from a config. Raises UserError where the schedule does not fit the run."""
        model = models.abstract(config.model)
        axes = _map_infos(lambda i: i.axes, model.infos)
        decay = _map_infos(lambda i: i.decay, model.infos)
        tx, schedule = make_optimizer(config.optim, config.train.steps, decay, axes)
        keep_ema = config.optim.ema_decay is not None
        return cls(
            graphdef=model.graphdef,
            infos=model.infos,
            tx=tx,
            schedule=schedule,
            abstract=State(
                step=jax.ShapeDtypeStruct((), jnp.int32),
                params=model.params,
                opt=jax.eval_shape(tx.init, model.params),
                ema=model.params if keep_ema else None,
            ),
            axes=State(step=(), params=axes, opt=state_axes(tx, model.params, axes), ema=axes if keep_ema else None),
        )

    def shardings(self, rules: sharding.Rules, mesh: jax.sharding.Mesh) -> State:
        """A NamedSharding for each array. Raises UserError with the path of what does not fit the mesh."""
        parts = zip(self.abstract, self.axes, strict=True)
        return State(*(sharding.shardings(rules, mesh, axes, abstract) for abstract, axes in parts))


def _map_infos(f: Any, infos: dict) -> Any:
    return jax.tree.map(f, infos, is_leaf=lambda x: isinstance(x, param.ParamInfo))
