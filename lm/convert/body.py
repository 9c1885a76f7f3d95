"""Folders of a class without a head (BertModel, LlamaModel): a run of one has a head all the same, tied or made anew.

What such a folder has and no head reads, a pooler, is carried along; the export is the folder's class again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lm import sharding
from lm.hf.families import known
from lm.hf.families.family import TASKS
from lm.hf.families.table import Slot
from lm.hf.folder import Opened
from lm.models import Body, LanguageModeling, Model
from lm.models import base as models
from lm.nn.param import paths
from lm.training.setup import Setup

LISTED = 3  # names of parameters in a line


def headed(model: Model) -> Model:
    """The model that a run has of a folder's: with a head for words where the folder has none."""
    return dataclasses.replace(model, task=LanguageModeling()) if isinstance(model.task, Body) else model


def body_of(model: Model, config: Mapping[str, Any]) -> Model:
    """The part of a run's model that its folder holds, but for a pooler; the whole where that has a head."""
    _, ending = known.of_config(config, "config.json")
    if TASKS[ending] is not Body:
        return model
    return dataclasses.replace(model, task=Body(encoder_only=ending == "EncoderModel"))


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    return {path: tuple(leaf.shape) for path, leaf in paths(models.abstract(model).params).items()}


def read_slots(opened: Opened) -> dict[str, Slot]:
    """The tensors that become parameters of a run."""
    ours = shapes_of(headed(opened.model)).keys()
    return {name: slot for name, slot in opened.slots.items() if set(slot.row.paths) <= ours}


def untrained(opened: Opened) -> tuple[str, ...]:
    """The parameters of a run that its folder does not have."""
    return tuple(sorted(shapes_of(headed(opened.model)).keys() - opened.shapes.keys()))


def fresh(setup: Setup, wanted: tuple[str, ...]) -> dict[str, jax.Array]:
    """Makes the parameters `wanted`, by path, as a new run has them; the compiler leaves out all others."""
    if not wanted:
        return {}
    config = setup.config
    shardings = {path: leaf.sharding for path, leaf in paths(setup.abstract_state.params).items()}

    def init() -> dict[str, jax.Array]:
        with sharding.scope(setup.mesh, config.rules):
            made = paths(models.init(config.model, jax.random.key(config.train.seed)))
        return {path: made[path] for path in wanted}

    return jax.jit(init, out_shardings={path: shardings[path] for path in wanted})()


def note(opened: Opened) -> tuple[str, ...]:
    """What to tell of the head of a folder without one."""
    if not isinstance(opened.model.task, Body):
        return ()
    name, new = opened.config["architectures"][0], untrained(opened)
    if not new:
        return (f"a {name} has no head: here it is the embedding, as config.json ties it",)
    listed = ", ".join(new[:LISTED]) + (f" and {len(new) - LISTED} more" if len(new) > LISTED else "")
    return (f"a {name} has no head: {listed} are new; train them before the run is evaluated or generates",)
