"""How a model runs, apart from what it is: nothing here changes its parameters, or but for rounding its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Literal

from lm.errors import UserError, did_you_mean
from lm.nn.dot import DOTS
from lm.nn.kernels import AUTO, KERNELS

Remat = Literal["none", "selective", "dots", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model runs: `lm.nn.stack.Stack` reads it and hands it to every layer in its context.

    scan: compile one unit of layers and loop over it (small programs, fast compiles), or unroll all of them.
    remat: what the backward pass recomputes (`lm.nn.stack`).
    attention: a kernel of `lm.nn.kernels`, or "auto": the first that can do what a call needs.
    query_block: queries that the reference kernel takes at a time, 0: all at once.
    dot: a kind of product of activations with weights, of `lm.nn.dot`.
    """

    scan: bool = True  # also 1.14 times as fast as unrolled on a CPU, at 10M parameters
    remat: Remat = "selective"
    attention: str = AUTO
    # Blocks skip the future: 1.08 times the steps of all at once, at 10M parameters on a CPU (README, Measured). Larger
    # ones skip less; smaller ones are more copies of the attention to compile, `reference.MAX_BLOCKS` at most.
    query_block: int = 64
    dot: str = "default"

    def __post_init__(self):
        if self.query_block < 0:
            raise UserError(f"model.compute.query_block: expected 0 or a number of queries, got {self.query_block}")
        _check_known("attention", self.attention, [AUTO, *KERNELS])
        _check_known("dot", self.dot, DOTS)


def _check_known(field: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        names = ", ".join(map(repr, known))
        raise UserError(f"model.compute.{field}: expected one of {names}, got {value!r}{did_you_mean(value, known)}")


DEFAULT = Compute()
