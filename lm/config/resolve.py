"""A config with overrides applied, and where every value came from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lm import codec
from lm.config.check import check, check_task
from lm.config.recipe import load
from lm.config.sections import Config
from lm.errors import UserError
from lm.renamed import leaf_today, path_today

Origin = Literal["default", "recipe", "command line"]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config and the origin of each of its leaf values, by dotted path."""

    config: Config
    origins: dict[str, Origin]

    def to_json(self) -> str:
        return json.dumps({"config": codec.encode(self.config), "origins": self.origins}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> Resolved:
        tree = stored_tree(text, where)
        try:
            config = codec.decode(Config, tree["config"])
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        # An older version stored its own names.
        return cls(config, {path_today(config, path): origin for path, origin in tree["origins"].items()})


def stored_tree(text: str, where: str) -> dict[str, dict[str, Any]]:
    """The parts of a stored config, `config` and `origins`. Raises UserError where it is something else."""
    try:
        tree = json.loads(text)
        if isinstance(tree["config"], dict) and isinstance(tree["origins"], dict):
            return tree
        why = f"{type(tree['config']).__name__} and {type(tree['origins']).__name__}"
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        why = f"{type(e).__name__}: {e}"
    raise UserError(f"{where}: expected the config of a run, got something else ({why}); name the --workdir of a run")


def resolve(recipe: str, overrides: Sequence[str] = ()) -> Resolved:
    """The recipe with `a.b=value` overrides applied, checked across sections and as something to train."""
    found = resolved(load(recipe), overrides)
    check_task(found.config)
    return found


def resolved(config: Config, overrides: Sequence[str] = ()) -> Resolved:
    """A config made in Python, with overrides applied, checked across sections."""
    return overridden(Resolved(config, dict(_origins(config))), overrides)


def overridden(before: Resolved, overrides: Sequence[str]) -> Resolved:
    """Applies overrides to `before` and checks all across sections: types and values, what was there included."""
    config = codec.override(before.config, *overrides)
    check(config)
    given = {p.removesuffix(f".{codec.TYPE}") for a in overrides for p in codec.assigned(a, config)}
    old, origins = codec.flatten(codec.encode(before.config)), dict(_origins(config))
    for path, value in codec.flatten(codec.encode(config)).items():
        if path.removesuffix(f".{codec.TYPE}") in given:
            origins[path] = "command line"
        elif path in before.origins and path in old and old[path] == value:
            origins[path] = before.origins[path]
    return Resolved(config, origins)


def changes(stored: str, config: Config) -> list[str]:
    """Lists `path: before -> now` of what differs from the config of a run, as it was stored.

    A field that the version of that run did not have counts where it is set.
    """
    then = codec.flatten(json.loads(stored)["config"])
    before = dict(leaf_today(config, path, value) for path, value in then.items())
    now, origins = codec.flatten(codec.encode(config)), dict(_origins(config))
    different = [p for p in now if (before[p] != now[p] if p in before else origins[p] != "default")]
    return [f"{p}: {before.get(p)!r} -> {now[p]!r}" for p in different]


def _origins(node: Any, at: str = "", default: bool = False) -> Iterator[tuple[str, Origin]]:
    """(path, "default" or "recipe") of every leaf of a config, by the paths of `codec.flatten`."""
    if dataclasses.is_dataclass(node):
        yield (f"{at}.{codec.TYPE}" if at else codec.TYPE), "default" if default else "recipe"
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            yield from _origins(value, f"{at}.{f.name}" if at else f.name, default or codec.is_default(f, value))
    elif isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _origins(value, f"{at}.{key}", default)
    else:
        yield at, "default" if default else "recipe"
