"""Parameter names and layouts of a family on disk: a table of rows, run in both directions.

A row says which of our arrays a stored tensor is, and by an einops pattern how its axes stand. Our layers are stacked
on leading axes, theirs are numbered: `{}` in a name stands for a number. Every expected tensor must be there once, and
every stored one used; anything else is an error that names it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from lm.errors import UserError, did_you_mean

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Map:
    """A row of a table. ours: a path as `layers.attn.q`; of several paths each is a part of the first axis of the
    pattern's result. theirs: a name with `{}` for the numbers of stacked axes. pattern: einops, theirs -> ours without
    the stacked axes, as `(h k) d -> d h k`; empty where they agree. at: the numbers for each place of the stacked axis,
    where they are not 0, 1, 2 ... (of layers that alternate between two blocks, or of ALBERT's groups).
    """

    ours: str | tuple[str, ...]
    theirs: str
    pattern: str = ""
    at: tuple[tuple[int, ...], ...] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Alias:
    """A tensor that older files store besides the one it is tied to. It must be equal to it, and is not written."""

    theirs: str
    of: str


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one stored tensor goes: place `index` of the stacked axes of `row`'s arrays."""

    row: Map
    index: tuple[int, ...]
    shape: Shape  # as stored

    def to_ours(self, x: np.ndarray, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
        """A stored tensor -> path -> its part of our array. Views where the layout allows."""
        paths = self.row.paths
        sizes = _sizes(self.row, _rest(self.row, shapes))
        y = rearrange(x, self.row.pattern, **_used(self.row.pattern, sizes)) if self.row.pattern else x
        return {paths[0]: y} if isinstance(self.row.ours, str) else {p: y[i] for i, p in enumerate(paths)}

    def to_theirs(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """path -> the part at `index` of our array -> the tensor to store."""
        pattern = self.row.pattern
        ys = [parts[p] for p in self.row.paths]
        y = ys[0] if isinstance(self.row.ours, str) else np.stack(ys)
        if not pattern:
            return y
        back = " -> ".join(reversed(pattern.split(" -> ")))
        sizes = dict(zip(pattern.split(" -> ")[1].split(), y.shape, strict=True))
        return rearrange(y, back, **_used(back, sizes))


def layout(rows: Iterable[Map], shapes: Mapping[str, Shape]) -> dict[str, Slot]:
    """Name of every tensor that a model of these parameter shapes has on disk -> where it goes.

    Raises AssertionError where the rows do not cover the parameters: a mistake in the table, not of a user.
    """
    slots: dict[str, Slot] = {}
    covered: set[str] = set()
    for row in rows:
        covered |= set(row.paths)
        assert all(p in shapes for p in row.paths), f"{row}: no such parameter"
        rest = _rest(row, shapes)
        stacked = shapes[row.paths[0]][: len(shapes[row.paths[0]]) - len(rest)]
        places = list(itertools.product(*map(range, stacked)))
        numbers = places if row.at is None else row.at
        assert len(numbers) == len(places), f"{row}: {len(numbers)} numbers for {len(places)} places"
        sizes = _sizes(row, rest)
        shape = _left(row.pattern, sizes) if row.pattern else rest
        for place, number in zip(places, numbers, strict=True):
            name = row.theirs.format(*number)
            assert name not in slots, f"{name}: in two rows"
            slots[name] = Slot(row, place, shape)
    missing = shapes.keys() - covered
    assert not missing, f"no row for {sorted(missing)}"  # a parameter without a row would not be read
    return slots


def check(stored: Mapping[str, Shape], slots: Mapping[str, Slot], aliases: Sequence[Alias], where: str) -> None:
    """Refuses a folder whose tensors are not exactly those of `slots`, but for aliases."""
    extra = stored.keys() - slots.keys() - {a.theirs for a in aliases}
    missing = slots.keys() - stored.keys()
    problems = [f"{n}: missing, expected {list(slots[n].shape)}{did_you_mean(n, extra)}" for n in sorted(missing)]
    problems += [f"{n}: not a tensor of this model, got {list(stored[n])}" for n in sorted(extra)]
    for name in sorted(slots.keys() & stored.keys()):
        if tuple(stored[name]) != slots[name].shape:
            problems.append(f"{name}: expected {list(slots[name].shape)}, got {list(stored[name])}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        cause = "config.json is of another model or size than the weights"
        if missing and not extra:
            cause = "an incomplete download, or weights of a base model without the head that config.json names"
        elif extra and not missing:
            cause = "config.json names fewer layers, another class, or a tied head where the weights have their own"
        raise UserError(f"{where}: {'; '.join(problems[:3])}{more}; likely cause: {cause}")


def _rest(row: Map, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of our array without its stacked axes."""
    shape = shapes[row.paths[0]]
    if row.pattern:
        n = len(row.pattern.split(" -> ")[1].split()) - (0 if isinstance(row.ours, str) else 1)
        return shape[len(shape) - n :]
    return shape[_n_stacked(row) :]


def _n_stacked(row: Map) -> int:
    """Counts the stacked axes: one for each number in the name, or one for all of them where `at` lists them."""
    return min(1, row.theirs.count("{}")) if row.at is not None else row.theirs.count("{}")


def _sizes(row: Map, rest: Shape) -> dict[str, int]:
    """Axis name of the pattern -> size."""
    if not row.pattern:
        return {}
    names = row.pattern.split(" -> ")[1].split()
    full = rest if isinstance(row.ours, str) else (len(row.paths), *rest)
    return dict(zip(names, full, strict=True))


def _left(pattern: str, sizes: Mapping[str, int]) -> Shape:
    """The stored shape, from the left side of the pattern."""
    groups = re.findall(r"\(([^)]*)\)|(\S+)", pattern.split(" -> ")[0])
    return tuple(math.prod(1 if n == "1" else sizes[n] for n in (group or single).split()) for group, single in groups)


def _used(pattern: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """einops wants to be told only what it cannot see: the axes within brackets on the left."""
    inside = set(" ".join(re.findall(r"\(([^)]*)\)", pattern.split(" -> ")[0])).split())
    return {name: size for name, size in sizes.items() if name in inside}
