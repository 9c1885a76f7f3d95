"""Optimizers and learning-rate schedules: configs, each beside what it makes.

tx, schedule = make_optimizer(config, total_steps, decay_mask, axes)
norm = global_norm(grads)
grads = clip_by_norm(grads, norm, config.clip_norm)
updates, state = tx.update(grads, state, params)
"""

from lm.optim.optimizers import (
    SGD,
    Adafactor,
    AdamW,
    Lion,
    Muon,
    Optimizer,
    clip_by_norm,
    global_norm,
    make_optimizer,
)
from lm.optim.schedules import WSD, Constant, Cosine, InverseSqrt, Linear, Schedule
from lm.optim.state import state_axes

__all__ = [
    "SGD",
    "WSD",
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "InverseSqrt",
    "Linear",
    "Lion",
    "Muon",
    "Optimizer",
    "Schedule",
    "clip_by_norm",
    "global_norm",
    "make_optimizer",
    "state_axes",
]
