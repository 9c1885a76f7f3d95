"""Logical axes of an optimizer's state, from which its shardings follow as the parameters' do."""

from __future__ import annotations

from typing import Any

import jax
import optax


def state_axes(tx: optax.GradientTransformation, params_abstract: Any, axes: Any) -> Any:
    """A tree with the structure of `tx.init(params)` and a tuple of logical axis names for each array.

    A leaf whose path ends in a parameter's takes that parameter's axes, with None where it keeps a dimension as 1
    (Adafactor's averages); any other (step counts, Muon's coefficients) is replicated. Only shapes are
    read: no device is touched.
    """
    shapes = _by_path(params_abstract)
    names = _by_path(axes)

    def one(path, leaf) -> tuple[str | None, ...]:
        key = _param_path(path)
        if key not in shapes:
            return (None,) * leaf.ndim  # small, and needed by every device
        shape = shapes[key].shape
        assert leaf.ndim == len(shape), f"{jax.tree_util.keystr(path)}: {leaf.shape} for a parameter of {shape}"
        # Anything else would get axes that are not its own.
        assert all(n in (1, full) for n, full in zip(leaf.shape, shape, strict=True)), (path, leaf.shape, shape)
        return tuple(a if n == full else None for a, n, full in zip(names[key], leaf.shape, shape, strict=True))

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(tx.init, params_abstract))


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {_param_path(path): leaf for path, leaf in leaves}


def _param_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dict keys a path ends in: `[1].mu['layers']['attn']['q']` -> ('layers', 'attn', 'q')."""
    keys: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, jax.tree_util.DictKey):
            break
        keys.append(entry.key)
    return tuple(reversed(keys))
