"""Which cases of a matrix `make test` runs; the others are in `make test-slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], names: Iterable[Any]) -> list[Any]:
    """A parameter for each name, marked slow but for those of `fast`, all of which must be there."""
    names = list(names)
    assert set(fast) <= set(names), set(fast) - set(names)
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow, id=str(n)) for n in names]
