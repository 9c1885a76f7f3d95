"""Checkpoints of a run: `manager` saves and restores them, `meta` stands beside the arrays, `policy` says which stay.

Importing this does not import Orbax: `Checkpoints` comes on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm.checkpoint.meta import Meta
from lm.checkpoint.policy import Checkpoint

if TYPE_CHECKING:
    from lm.checkpoint.manager import Checkpoints

__all__ = ["Checkpoint", "Checkpoints", "Meta"]


def __getattr__(name: str) -> Any:
    if name == "Checkpoints":
        from lm.checkpoint.manager import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
