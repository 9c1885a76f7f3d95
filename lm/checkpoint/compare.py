"""The tree of a checkpoint against the one that is wanted."""

from __future__ import annotations

from typing import Any

import jax

from lm.errors import UserError

WAY_OUT = "restore its config or take a new --workdir"


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape. Tuples, lists and named tuples are written alike, as they are after a round trip."""
    # Shapes of Orbax's metadata and of JAX are leaves alike.
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {".".join(_key(k) for k in path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _key(k: Any) -> str:
    return str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))


def compare(stored: dict[str, tuple], wanted: dict[str, tuple], where: str, way_out: str) -> None:
    """Raises UserError where the paths or shapes differ, with the likely cause. where: folder and item."""
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    other = [p for p in sorted(wanted.keys() & stored.keys()) if wanted[p] != stored[p]]
    if not (missing or extra or other):
        return
    # A few of each: one mistake changes hundreds of paths.
    lines = [f"{p} is {stored[p]} here, expected {wanted[p]}" for p in other[:3]]
    lines += [f"{p} is missing" for p in missing[:2]] + [f"{p} is not in this model" for p in extra[:2]]
    n = len(missing) + len(extra) + len(other)
    more = f" and {n - len(lines)} more" if n > len(lines) else ""
    if where.endswith("/train"):
        cause = "saved with another optimizer or another optim.ema_decay"
    elif not missing and not extra and all(stored[p][1:] == wanted[p][1:] for p in other):
        cause = "saved with another model.n_layers or model.vocab_size"
    else:
        cause = "saved by another model"
    raise UserError(f"{where}: {'; '.join(lines)}{more}; it was {cause}: {way_out}")
