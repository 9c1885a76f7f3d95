"""Old names of config fields, read wherever they stand, with one line that says the new name.

A config class lists them: `renamed: ClassVar[Mapping[str, str]] = {"remat": "compute.remat"}`, old field -> dotted path
of today from that class. `lm.codec` reads them in what is stored and on the command line, and where the class has the
metaclass `Renaming`, Python calls do too. An old name next to the new one replaces its value in a call (which makes
`dataclasses.replace` work) and yields to it in a file.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str, ...]


class Renaming(type):
    """`Llama(remat="full")` is `Llama(compute=Compute(remat="full"))`, for recipes of an older version."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if old := kwargs.keys() & old_names(cls).keys():
            say(cls.__name__, cls, sorted(old))
            moved = {tuple(old_names(cls)[name].split(".")): kwargs.pop(name) for name in sorted(old)}
            kwargs = _set(cls, kwargs, moved)
        return super().__call__(*args, **kwargs)


@functools.cache
def old_names(kind: type) -> dict[str, str]:
    """Old field name -> dotted path of today, those of base classes included; empty for a class without any."""
    tables = [vars(base).get("renamed", {}) for base in reversed(kind.__mro__)]
    fields = getattr(kind, "__dataclass_fields__", {})
    return {old: new for table in tables for old, new in table.items() if old not in fields}


def modernized(kind: type, encoded: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """The fields of one stored `kind`, at path `at`, under the names of today."""
    old = [name for name in encoded if name in old_names(kind)]
    if not old:
        return encoded
    say(at or kind.__name__, kind, old)
    out = {name: value for name, value in encoded.items() if name not in old}
    for name in old:
        node, (*above, last) = out, old_names(kind)[name].split(".")
        for key in above:
            node[key] = dict(node.get(key, {}))
            node = node[key]
        node.setdefault(last, encoded[name])
    return out


def path_today(node: Any, path: str) -> str:
    """`path` below a config `node` with every old name on it replaced; what is not on the way stays as it is."""
    keys, out = path.split("."), []
    while keys:
        key, *keys = keys
        kind: Any = type(node)
        names = old_names(kind)
        if key in names:
            keys = names[key].split(".") + keys
            continue
        out.append(key)
        node = node.get(key) if isinstance(node, dict) else getattr(node, key, None)
    return ".".join(out)


def say(at: str, kind: type, old: Iterable[str]) -> None:
    """Says on stderr what old names are called now; the same line once."""
    _say("; ".join(f"{at}.{name} is called {at}.{old_names(kind)[name]} now" for name in old))


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _set(kind: type, fields: Mapping[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
    """The arguments `fields` of `kind` with `values` set, at paths below it."""
    out = dict(fields)
    for name in dict.fromkeys(path[0] for path in values):
        below = {path[1:]: value for path, value in values.items() if path[0] == name}
        if () in below:
            out[name] = below[()]
            continue
        held = out[name] if name in out else _default(kind, name)
        if dataclasses.is_dataclass(held) and not isinstance(held, type):
            out[name] = dataclasses.replace(held, **_set(type(held), {}, below))
        else:
            inner = typing.get_type_hints(kind)[name]
            out[name] = inner(**_set(inner, {}, below))
    return out


def _default(kind: type, name: str) -> Any:
    field = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
