"""Pretraining of Transformer language models: `from lm import train, restore, generate`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# One client for gs:// in all of the process, chosen before a path is used: gcsfs, where it is installed. `etils.epath`
# would take TensorFlow's file system, since TensorFlow is there. Commands that need none of it would wait seconds for
# its import, its errors are no OSError, and it talks to Google alone, so that no test can be run against it.
if importlib.util.find_spec("gcsfs") is not None:
    os.environ.setdefault("EPATH_USE_TF", "0")

if TYPE_CHECKING:
    from lm.config import Config
    from lm.run import generate, restore
    from lm.training.loop import Result

__all__ = ["generate", "restore", "train"]


def train(recipe: str | Config, workdir: str | Path, overrides: Sequence[str] = ()) -> Result:
    """Trains a recipe (its path or name) or a `Config`, with `a.b=value` overrides; the same call resumes."""
    from lm import compilation, config, distributed
    from lm.training import train as training

    resolved = config.resolve(recipe, overrides) if isinstance(recipe, str) else config.resolved(recipe, overrides)
    distributed.use_cpu_cores(*config.rows_and_devices(resolved.config))
    compilation.enable_cache()
    return training.train(resolved, workdir)


def __getattr__(name: str) -> Any:
    # On first use: a command that never restores should not wait for Orbax.
    if name in ("generate", "restore"):
        from lm import run

        return getattr(run, name)
    raise AttributeError(f"module 'lm' has no attribute {name!r}")
