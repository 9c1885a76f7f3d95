"""A small run on any mesh: its config, batches, a state to start from, and what some steps make of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from lm.config import Config, Train
from lm.data import Data, Stdlib
from lm.mesh import Mesh, make_mesh
from lm.models import GPT2, Llama
from lm.nn.position import Rope
from lm.objectives import CausalLM
from lm.optim import SGD, AdamW, Cosine
from lm.training.setup import Setup
from lm.training.state import State
from tests.models.reference import random_params

B, S, V = 8, 12, 98
START, PAD = 1, 0
LLAMA = Llama(vocab_size=V, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, rope=Rope(theta=50.0))
GPT = GPT2(vocab_size=V, d_model=24, n_layers=2, n_heads=4, max_positions=S)
# SGD hands gradients on as they are. Momentum then is the gradient, after one step, and shows it to the tests.
SGD_ = SGD(lr=0.3, schedule=Cosine(warmup_steps=2), clip_norm=None, ema_decay=0.8)
# With a larger eps than usual: gradients that are zero but for rounding would become steps of lr in either direction.
ADAMW = AdamW(lr=0.03, schedule=Cosine(warmup_steps=2), clip_norm=0.5, eps=1e-3)
CONFIG = Config(
    model=LLAMA,
    data=Data(path="unused", sources={"stdlib": Stdlib()}, tokenizer="unused", seq_len=S, batch_size=B),
    objective=CausalLM(start_id=START, pad_id=PAD, z_loss=0.01),
    optim=SGD_,
    train=Train(steps=10),
)
ONE_DEVICE = Mesh()


def config(**sections: Any) -> Config:
    """CONFIG with sections replaced, or, given a dict, with fields of a section replaced."""
    for name, value in sections.items():
        if isinstance(value, dict):
            sections[name] = dataclasses.replace(getattr(CONFIG, name), **value)
    return dataclasses.replace(CONFIG, **sections)


def make_setup(config: Config, mesh: Mesh = ONE_DEVICE) -> Setup:
    return Setup.make(config, make_mesh(mesh, jax.devices()[: mesh.n_devices or 1]))


def batch(seed: int) -> dict[str, np.ndarray]:
    """Rows of several documents. Every other pair is half padding, so that no two microbatches count the same."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, V, (B, S + 1)).astype(np.int32)
    tokens[rng.random((B, S + 1)) < 0.15] = START
    for row in range(B):
        if row % 4 > 1:
            tokens[row, 5 + row % 4 :] = PAD
    return {"tokens": tokens}


def start(setup: Setup, step: int = 0) -> State:
    """Random parameters and an optimizer that has not seen any gradient, on the devices of `setup`."""
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), setup.abstract_state)
    params, ema = random_params(setup.config.model), None if state.ema is None else random_params(setup.config.model)
    state = state._replace(step=np.asarray(step, np.int32), params=params, ema=ema)
    return put(state, jax.tree.map(lambda a: a.sharding, setup.abstract_state))


def put(tree: Any, shardings: Any) -> Any:
    return jax.device_put(tree, shardings, may_alias=False)  # the step deletes what it is given


@dataclasses.dataclass(frozen=True)
class Run:
    states: list[State]  # in numpy: at the start and after each step
    metrics: list[dict]


@functools.cache
def run(name: str, mesh: Mesh = ONE_DEVICE, steps: int = 2) -> Run:
    setup = make_setup(CONFIGS[name], mesh)
    step = setup.lower().compile()
    state = start(setup)
    out = Run([jax.tree.map(np.array, state)], [])
    for i in range(steps):
        state, metrics = step(state, put(batch(i), setup.batch_shardings))
        out.states.append(jax.tree.map(np.array, state))
        out.metrics.append(jax.tree.map(np.array, metrics))
    return out


CONFIGS = {
    "llama": CONFIG,
    "llama, 2 microbatches": config(train=dict(microbatches=2)),
    "llama, 4 microbatches": config(train=dict(microbatches=4)),
    "llama, clipped": config(optim=dict(clip_norm=0.1)),
    "llama, bfloat16": config(train=dict(precision="bfloat16")),
    "gpt2, adamw": config(model=GPT, optim=ADAMW),
}
