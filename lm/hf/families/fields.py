"""config.json of a Hugging Face folder, in the spelling of transformers 5 and in older ones; every field accounted for.

A field is taken, known to say nothing about the numbers (see `carriers`), accepted by the user by its name, or refused:
a default in its place would be a wrong model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lm.errors import UserError, did_you_mean
from lm.hf.families import carriers
from lm.hf.families.rope import Leftover, read_rope
from lm.nn.rope import Rope

REQUIRED: Any = object()  # None may be a default

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
ACTIVATION_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "tanh": "tanh"}

TYPES: dict[type, tuple[type | tuple[type, ...], str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    bool: ((bool, int), "true or false"),
    str: (str, "a name"),
    list: (list, "a list"),
    tuple: (list, "a list"),
    dict: (dict, "an object"),
}
LISTED = 8  # names of fields in an error


class Fields:
    """The fields of one config.json; `where` begins every error. stored: the tensors beside it, by name. ignored: names
    of fields, within an object as `rope_parameters.x`, that are accepted though nobody here knows them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        stored: Mapping[str, np.ndarray],
        ignored: Collection[str] = (),
    ):
        self.config, self.where, self.stored, self.ignored = dict(config), where, stored, tuple(ignored)
        self._taken: set[str] = set()
        self._left: list[Leftover] = []

    def take(self, *names: str, default: Any = REQUIRED, kind: type | None = None) -> Any:
        """The first of `names` that is there and not null, else `default`. All of them count as taken.

        It must be of `kind`, which is the default's type; an integer where there is none, or it is None.
        """
        self._taken |= set(names)
        for name in names:
            if self.config.get(name) is not None:
                self._check_type(name, kind or _kind(default))
                return self.config[name]
        if default is REQUIRED:
            raise UserError(
                f"{self.where}: expected the field {names[0]!r}, got none{did_you_mean(names[0], self.config)}; "
                "take the config.json that belongs to the weights"
            )
        return default

    def _check_type(self, name: str, kind: type) -> None:
        value: Any = self.config[name]
        if kind not in TYPES:
            return
        expected, words = TYPES[kind]
        number = kind in (int, float)
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, expected) or infinite or (number and isinstance(value, bool)):
            quotes = "; write it without quotes" if isinstance(value, str) and (number or kind is bool) else ""
            raise UserError(f"{self.where}: {name}: expected {words}, got {value!r}{quotes}")

    def given(self, name: str, *, default: Any, kind: type | None = None) -> Any:
        """The field as it is there, null too, else `default`: of fields where null is a value."""
        self._taken.add(name)
        if self.config.get(name) is not None:
            self._check_type(name, kind or _kind(default))
        return self.config.get(name, default)

    def windowed(self, n_layers: int, *, default: Sequence[bool]) -> tuple[bool, ...]:
        """Says which layers look back over a window only, by `layer_types`: the shortest pattern that repeats to it.

        default: of all layers, where the field is not there.
        """
        kinds = self.take("layer_types", default=None, kind=list)
        known = {"sliding_attention": True, "full_attention": False}
        if kinds is not None and (len(kinds) != n_layers or not all(kind in known for kind in kinds)):
            raise UserError(
                f"{self.where}: layer_types: expected {' or '.join(known)} for each of {n_layers} layers, got {kinds}; "
                "other kinds of layers are not supported"
            )
        layers = tuple(default) if kinds is None else tuple(known[kind] for kind in kinds)
        periods = (n for n in range(1, n_layers) if all(layers[i] == layers[i % n] for i in range(n_layers)))
        return layers[: next(periods, n_layers)]

    def ignore(self, *names: str) -> None:
        """Takes fields that say nothing about what this family computes."""
        self._taken |= set(names)

    def expect(self, name: str, *values: Any, why: str) -> None:
        """Refuses a field that is there with another value than one of `values`; `why` says what is not supported."""
        self._taken.add(name)
        if name in self.config and self.config[name] not in values:
            expected = " or ".join(map(repr, values))
            raise UserError(f"{self.where}: {name}: expected {expected}, got {self.config[name]!r}; {why}")

    def tied(self, head: str, embed: str, *, default: bool) -> bool:
        """Says whether the head is the embedding: as tie_word_embeddings does, but that a head which is stored and
        differs is a head of its own, whatever the config says (T5 1.1 as transformers 5 writes it)."""
        tied = bool(self.take("tie_word_embeddings", default=default))
        if tied and head in self.stored and embed in self.stored:
            a, b = self.stored[head], self.stored[embed]
            return a.shape == b.shape and bool(np.array_equal(a, b))
        return tied

    def activation(self, *names: str, default: Any = REQUIRED) -> Any:
        """Our name of an activation."""
        theirs = self.take(*names, default=default)
        if theirs not in ACTIVATIONS:
            raise UserError(
                f"{self.where}: {names[0]}: expected one of {', '.join(sorted(ACTIVATIONS))}, got {theirs!r}; "
                "this activation is not supported"
            )
        return ACTIVATIONS[theirs]

    def rope(self, *, theta: float = 10_000.0, fraction: float = 1.0, key: str | None = None) -> Rope:
        """Rotary positions: `rope_parameters` of transformers 5 (`key`: the part of one layer type), or the older
        rope_theta, rope_scaling, partial_rotary_factor, rotary_pct and rotary_emb_base. theta, fraction: the family's
        defaults."""
        rope, old, at = self.take("rope_parameters", default={}), self.take("rope_scaling", default={}), ""
        if key is not None and key in rope:
            rope, at = self._object(f"rope_parameters.{key}", rope[key]), f".{key}"
        return self.rope_of(
            rope or old,
            f"rope_parameters{at}" if rope or not old else "rope_scaling",
            theta=self.take("rope_theta", "rotary_emb_base", default=theta),
            fraction=self.take("partial_rotary_factor", "rotary_pct", default=fraction),
        )

    def rope_of(self, rope: Any, at: str, *, theta: float, fraction: float) -> Rope:
        """Reads rotary positions from one dict of parameters, whose place in config.json is `at`."""
        longest = self.config.get("max_position_embeddings")
        found = read_rope(self._object(at, rope), f"{self.where}: {at}", theta, fraction, longest)
        self._left += [left._replace(name=f"{at}.{left.name}") for left in found.left]
        return found.rope

    def _object(self, name: str, value: Any) -> dict[str, Any]:
        """A copy of an object within the config; null is an empty one."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {name}: expected an object, got {value!r}")
        return dict(value)

    def done(self) -> None:
        """Refuses what was not taken: a field that may change the numbers. And a name to ignore that stands for no such
        field."""
        if self.config.get("quantization_config") is not None:
            raise UserError(
                f"{self.where}: quantization_config: quantized weights are not supported; take the full ones"
            )
        for name, values in carriers.INERT.items():
            self.expect(name, *values, None, why="a model that says so computes something else")
        left = [Leftover(n, self.config[n], "") for n in carriers.unknown(self.config, self._taken)]
        left += [field for field in self._left if field.name not in {x.name for x in left}]
        for name in self.ignored:
            if name not in {field.name for field in left}:
                got = "one that is read" if name in self.config else "none of that name"
                raise UserError(
                    f"{self.where}: --ignore-field {name}: expected a field that would be refused, got {got}"
                    f"{_near(name, [field.name for field in left])}; leave the option out"
                )
        refused = list(dict.fromkeys(field for field in left if field.name not in self.ignored))
        if refused:
            first, names = refused[0], [field.name for field in refused]
            more = f" (and {', '.join(names[1:LISTED])})" if names[1:] else ""
            options = " ".join(f"--ignore-field {name}" for name in names[:LISTED])
            raise UserError(
                f"{self.where}: unknown field {first.name!r} = {first.value!r}{first.why}{more}"
                f"{_near(first.name, self._taken)}; a {self.config.get('model_type')} with it may compute something "
                f"else, so it is refused; if you know that it does not: {options} (ignore_fields in Python)"
            )


def _kind(default: Any) -> type:
    return int if default is REQUIRED or default is None else type(default)


def _near(name: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?`, and nothing where no name is near."""
    return did_you_mean(name, known) if difflib.get_close_matches(name, known, n=1, cutoff=0.6) else ""
