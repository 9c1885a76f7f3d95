"""Which dimensions of a parameter make a matrix, read from its logical axes.

A weight is declared inputs first: `y = x W` contracts the `rows` and yields the `cols`. Muon orthogonalises such a
matrix and Adafactor factors its second moment. Leading layers and experts axes are a stack of separate matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from lm.errors import UserError

STACK_AXES = ("layers", "experts")
Axes = tuple[str | None, ...]


class Matrix(NamedTuple):
    """Dimensions of one parameter: `q` with axes (layers, embed, heads, head_dim) is rows (1,), cols (2, 3)."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]


def as_matrix(axes: Axes, where: str) -> Matrix | None:
    """The matrix in a parameter, or None for a scalar or a vector (biases and norms, per layer or not).

    (heads, head_dim) count as one dimension, of size heads * head_dim: `q`, `k`, `v` and `o` are matrices, their
    biases vectors. Raises for three dimensions or more, where no rule says which are inputs.
    """
    groups: list[tuple[int, ...]] = []
    for i in range(n_stacked(axes), len(axes)):
        if axes[i] == "head_dim" and groups and axes[i - 1] in ("heads", "kv_heads"):
            groups[-1] += (i,)
        else:
            groups.append((i,))
    if len(groups) > 2:
        names = ", ".join(str(tuple(axes[i] for i in g)) for g in groups)
        raise UserError(
            f"{where}: expected at most one input and one output dimension after {STACK_AXES}, got {names}; "
            "use AdamW, or teach lm/optim/matrices.py this parameter"
        )
    return Matrix(*groups) if len(groups) == 2 else None  # one group is a vector, whatever its dimensions


def n_stacked(axes: Axes) -> int:
    """How many leading dimensions stack independent parameters; a router's (layers, embed, experts) has one."""
    return next((i for i, axis in enumerate(axes) if axis not in STACK_AXES), len(axes))


def map_axes(f: Any, axes: Any) -> Any:
    """`f(names, "layers.attn.q")` over a tree of axis names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, names: f(names, ".".join(str(k.key) for k in path)),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
