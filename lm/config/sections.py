"""The root config and the sections that have no package of their own."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lm.checkpoint.policy import Checkpoint
from lm.data import Data
from lm.errors import UserError, not_negative, positive
from lm.evals.config import Eval
from lm.mesh import Mesh
from lm.models import Model
from lm.objectives import Objective
from lm.optim import Optimizer
from lm.sharding import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """`microbatches` splits a batch for gradient accumulation; `precision` is that of the compute. `spike_sigmas`: a
    loss so many standard deviations above the last ones is reported with its documents (`lm.training.watch`)."""

    steps: int
    microbatches: int = 1
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    init_from: str | None = None  # folder of a run whose latest weights a new run begins with
    log_every: int = 10
    eval_every: int = 0  # steps; 0: only at the end
    spike_sigmas: float | None = 8.0

    def __post_init__(self):
        positive("train", self, "steps", "microbatches", "log_every")
        not_negative("train", self, "eval_every")
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise UserError(f"train.spike_sigmas: expected a positive number or None, got {self.spike_sigmas}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. A default appears in the class of its section; a recipe says what differs."""

    model: Model
    data: Data
    objective: Objective
    optim: Optimizer
    train: Train
    mesh: Mesh = Mesh()
    rules: Rules = Rules()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
