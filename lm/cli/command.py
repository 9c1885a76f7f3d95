"""What a command of `lm` is, and the arguments that several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

Run = Callable[[argparse.Namespace], int]


class Argument(NamedTuple):
    """What `add_argument` takes."""

    names: tuple[str, ...]
    settings: dict[str, Any]


class Command(NamedTuple):
    """A command: its words are `name`; `run` does it and gives the exit code."""

    name: str
    help: str
    arguments: tuple[Argument, ...]
    run: Run


def command(name: str, help: str, *arguments: Argument) -> Callable[[Run], Command]:
    """Makes a command of the function below it."""
    return lambda run: Command(name, help, arguments, run)


def argument(*names: str, **settings: Any) -> Argument:
    return Argument(names, settings)


RUN = "folder of the run, or its gs:// address"
VALUES = "config values, as optim.lr=1e-3 or optim=Lion(lr=1e-4)"
BATCH = "how many steps come before the batch; logs call it the next step"
RECIPE = argument("recipe", help="a recipe: path of a .py file, or its name in configs/")
WORKDIR = argument("workdir", help=RUN)
OVERRIDES = argument("overrides", nargs="*", metavar="a.b=value", help=VALUES)
CHECKPOINT = argument("--step", type=int, help="checkpoint to use (default: the latest)")
CORPUS = argument(
    "target", help="folder of a prepared corpus, of one source or split in it, url of a corpus, or a recipe"
)
CORPUS_OVERRIDES = argument("overrides", nargs="*", metavar="a.b=value", help=f"of a recipe: {VALUES}")
