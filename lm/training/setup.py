"""Everything a run computes with, built in one place: for training, evaluation, compile-only tests and planning."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from lm import sharding
from lm.config import Config
from lm.data.stream.batches import BatchShape
from lm.models import base as models
from lm.training import step as steps
from lm.training.state import State, StateSpec

Precision = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The compiled parts of a run on a mesh. `make` touches no device and runs no operation."""

    config: Config
    mesh: jax.sharding.Mesh
    spec: StateSpec
    abstract_state: State  # ShapeDtypeStructs with shardings: what a checkpoint is restored into
    batch_shardings: dict[str, NamedSharding]
    init: Any  # jitted () -> state
    step: Any  # jitted (state, batch) -> (state, metrics); the state is donated
    score: Any  # jitted (params, batch, token_bytes) -> Score

    @classmethod
    def make(cls, config: Config, mesh: jax.sharding.Mesh) -> Setup:
        """The parts for `config` on `mesh`, whose devices may be those of a topology that is not here."""
        rules, train = config.rules, config.train
        spec = StateSpec.of(config)
        shardings = spec.shardings(rules, mesh)

        def init() -> State:
            with sharding.scope(mesh, rules):
                params = models.init(config.model, jax.random.key(train.seed))
            # Copies: of a donated state no two arrays may share a buffer.
            ema = None if spec.abstract.ema is None else jax.tree.map(jnp.copy, params)
            return State(jnp.zeros((), jnp.int32), params, spec.tx.init(params), ema)

        with_sharding = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), spec.abstract, shardings
        )
        features = config.objective.features(config.data.batch_size, config.data.seq_len)
        batch_axes = {k: ("act_batch", *(None,) * (len(f.shape) - 1)) for k, f in features.items()}
        batch_shardings = sharding.shardings(rules, mesh, batch_axes, features)
        replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())

        dtype = compute_dtype(train.precision, mesh)
        train_step = steps.make_train_step(
            spec.graphdef,
            config.objective,
            config.optim,
            spec.tx,
            spec.schedule,
            dtype=dtype,
            microbatches=train.microbatches,
            seed=train.seed,
        )
        score = steps.make_score_step(spec.graphdef, config.objective, dtype=dtype)

        def scoped(f):
            def traced(*args):
                with sharding.scope(mesh, rules):
                    return f(*args)

            traced.__name__ = f.__name__  # names the compiled module, for profiles
            return traced

        return cls(
            config=config,
            mesh=mesh,
            spec=spec,
            abstract_state=with_sharding,
            batch_shardings=batch_shardings,
            init=jax.jit(init, out_shardings=shardings),
            step=jax.jit(
                scoped(train_step),
                donate_argnums=0,
                in_shardings=(shardings, batch_shardings),  # said, since it is compiled before there are arguments
                out_shardings=(shardings, replicated),  # the state where it was, or it could not be donated
            ),
            score=jax.jit(
                scoped(score),
                in_shardings=(shardings.params, batch_shardings, replicated),
                out_shardings=replicated,
            ),
        )

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The model without its parameters."""
        return self.spec.graphdef

    @property
    def infos(self) -> dict:
        """The ParamInfo of every parameter."""
        return self.spec.infos

    @property
    def rows(self) -> NamedSharding:
        """Where the rows of a batch go, which is the same for all its arrays."""
        return next(iter(self.batch_shardings.values()))

    def abstract_batch(self, shape: BatchShape | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch without values, of a phase of `data.ramp` or of what it ends in."""
        data = self.config.data
        n_rows, seq_len = (data.batch_size, data.seq_len) if shape is None else (shape.rows, shape.seq_len)
        features = self.config.objective.features(n_rows, seq_len)
        return {
            k: jax.ShapeDtypeStruct(f.shape, f.dtype, sharding=self.batch_shardings[k]) for k, f in features.items()
        }

    def lower(self, shape: BatchShape | None = None) -> jax.stages.Lowered:
        """The train step lowered for the mesh: `.compile()` it without any state at hand."""
        return self.step.lower(self.abstract_state, self.abstract_batch(shape))


def compute_dtype(precision: Precision, mesh: jax.sharding.Mesh) -> DTypeLike:
    """`auto`: bfloat16 on TPU and GPU, float32 on CPU, whose matmuls gain nothing from it."""
    if precision == "auto":
        return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    return jnp.dtype(precision)
