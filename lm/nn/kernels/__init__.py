"""Implementations of attention behind one function type. A new one is a file here and a line in `KERNELS`.

A kernel gets q, k and v where projections leave them: batch, sequence and heads on their mesh axes. What it needs
gathered, it gathers itself.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

import jax

from lm.errors import UserError
from lm.nn.kernels import reference
from lm.nn.mask import Mask

Feature = Literal["bias", "softcap", "dropout", "window", "segments", "prefix", "not causal", "cache"]
ALL: frozenset[Feature] = frozenset(get_args(Feature))
AUTO = "auto"


class Attend(Protocol):
    """q [B,S,H,K], k, v [B,T,G,K], bias [B or 1,H,S,T] -> [B,S,H,K]; see `reference.attend`, which all agree with."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        *,
        scale: float,
        bias: jax.Array | None,
        softcap: float | None,
        dropout_rate: float,
        key: jax.Array | None,
        block: int,
    ) -> jax.Array: ...


class Kernel(NamedTuple):
    """`attend`, and what of a call it can do besides plain causal attention over whole rows."""

    attend: Attend
    can: frozenset[Feature]


KERNELS: dict[str, Kernel] = {  # the first that can do a call is what `AUTO` takes
    "reference": Kernel(reference.attend, ALL),
}


def needs(mask: Mask, *, bias: bool = False, softcap: bool = False, dropout: bool = False) -> set[Feature]:
    """What a call asks of a kernel."""
    asked: dict[Feature, bool] = {
        "bias": bias,
        "softcap": softcap,
        "dropout": dropout,
        "window": mask.window is not None,
        "segments": mask.q_segments is not None,
        "prefix": mask.prefix is not None,
        "not causal": not mask.causal,
        "cache": mask.causal and not mask.aligned,  # queries and keys are not the same tokens
    }
    return {feature for feature, needed in asked.items() if needed}


def choose(name: str, needed: set[Feature]) -> Attend:
    """The kernel called `name`, or for `AUTO` the first that can do what is needed."""
    if name == AUTO:
        # There is one: the reference can do all.
        return next(kernel.attend for kernel in KERNELS.values() if needed <= kernel.can)
    if missing := needed - KERNELS[name].can:
        raise UserError(
            f"model.compute.attention: expected a kernel with {', '.join(sorted(missing))}, which this model needs, "
            f"got {name!r}; set model.compute.attention=auto"
        )
    return KERNELS[name].attend
