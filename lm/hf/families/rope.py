"""Rotary positions in config.json: what `rope_parameters` or the older `rope_scaling` says, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm.errors import UserError, did_you_mean
from lm.hf.families.carriers import ROPE_CARRIERS
from lm.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
REQUIRED: Any = object()


class Leftover(NamedTuple):
    """A field that nobody here knows; why: what is known of the object that it stands in."""

    name: str
    value: Any
    why: str

    def __hash__(self) -> int:
        return hash(self.name)  # the value may be a list


class Found(NamedTuple):
    rope: Rope
    left: list[Leftover]


def read_rope(rope: Mapping[str, Any], where: str, theta: float, fraction: float, longest: Any) -> Found:
    """Reads one object of parameters. theta, fraction: what holds where it says nothing. longest: the positions of the
    model. `where` begins every error."""
    fields = _Parameters(rope, where)
    theta = fields.number("rope_theta", theta)
    fraction = fields.number("partial_rotary_factor", fraction)
    kind, old_kind = fields.pop("rope_type"), fields.pop("type")
    kind = kind or old_kind or "default"
    kind = "linear" if kind == "default" and "factor" in fields.left else kind
    if kind not in KINDS:
        raise UserError(
            f"{where}: rope_type: expected one of {', '.join(KINDS)}, got {kind!r}{did_you_mean(str(kind), KINDS)}; "
            "other scalings are not supported"
        )
    scaling = None if kind == "default" else _scaling(kind, fields, longest)
    fields.pop("original_max_position_embeddings")
    left = {name: value for name, value in fields.left.items() if name not in ROPE_CARRIERS}
    why = f", which rope type {kind!r} has not"
    return Found(
        Rope(theta=theta, fraction=fraction, scaling=scaling), [Leftover(n, left[n], why) for n in sorted(left)]
    )


class _Parameters:
    """The parameters of one object that are left to read. A null is one that is not there."""

    def __init__(self, rope: Mapping[str, Any], where: str):
        self.left, self._where = {name: value for name, value in rope.items() if value is not None}, where

    def pop(self, name: str) -> Any:
        return self.left.pop(name, None)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.pop(name)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            quotes = "; write it without quotes" if isinstance(value, str) else ""
            got = "none" if value is None else repr(value)
            raise UserError(f"{self._where}.{name}: expected a number, got {got}{quotes}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.left.pop(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self._where}.{name}: expected true or false, got {value!r}")
        return value


def _scaling(kind: str, fields: _Parameters, longest: Any) -> Scaling:
    given = fields.number("original_max_position_embeddings", None)
    original = int(given or (longest if isinstance(longest, int) else 0))
    if kind == "linear":
        return LinearScaling(factor=fields.number("factor"))
    if kind == "dynamic":
        return DynamicScaling(factor=fields.number("factor"), max_positions=original)
    if kind == "llama3":
        return Llama3Scaling(
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_positions=original,
        )
    return YarnScaling(
        factor=fields.number("factor"),
        original_max_positions=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
        attention_factor=fields.number("attention_factor", None),
        mscale=fields.number("mscale", None),
        mscale_all_dim=fields.number("mscale_all_dim", None),
    )


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The inverse of `read_rope`, in the spelling of transformers 5."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        out["partial_rotary_factor"] = rope.fraction
    s = rope.scaling
    if isinstance(s, LinearScaling):
        out |= {"rope_type": "linear", "factor": s.factor}
    elif isinstance(s, DynamicScaling):
        out |= {"rope_type": "dynamic", "factor": s.factor}
    elif isinstance(s, Llama3Scaling):
        out |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    elif isinstance(s, YarnScaling):
        out |= {
            "rope_type": "yarn",
            "factor": s.factor,
            "original_max_position_embeddings": s.original_max_positions,
            "beta_fast": s.beta_fast,
            "beta_slow": s.beta_slow,
            "truncate": s.truncate,
        }
        optional = {"attention_factor": s.attention_factor, "mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim}
        out |= {name: value for name, value in optional.items() if value is not None}
    else:
        assert s is None, s
    return out


def max_positions(rope: Rope) -> dict[str, int]:
    """max_position_embeddings, where the scaling depends on it."""
    return {"max_position_embeddings": rope.scaling.max_positions} if isinstance(rope.scaling, DynamicScaling) else {}
