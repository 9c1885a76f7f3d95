"""The root config: `sections` are its classes, `recipe` finds one, `resolve` applies overrides, `check` refuses."""

from lm.checkpoint.policy import Checkpoint
from lm.config.check import check, check_mesh, check_task, rows_and_devices
from lm.config.recipe import find_recipe, load
from lm.config.resolve import Origin, Resolved, changes, overridden, resolve, resolved
from lm.config.sections import Config, Train
from lm.evals.config import Eval

__all__ = [
    "Checkpoint",
    "Config",
    "Eval",
    "Origin",
    "Resolved",
    "Train",
    "changes",
    "check",
    "check_mesh",
    "check_task",
    "find_recipe",
    "load",
    "overridden",
    "resolve",
    "resolved",
    "rows_and_devices",
]
