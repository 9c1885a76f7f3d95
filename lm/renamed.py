"""Old names of config fields, values and classes, read wherever they stand, with one line that says the new name.

A config class lists them: `renamed: ClassVar[Mapping[str, str]] = {"remat": "compute.remat"}`, old field -> dotted path
of today from that class. `lm.codec` reads them in what is stored and on the command line, and where the class has the
metaclass `Renaming`, Python calls do too. An old name next to the new one replaces its value in a call (which makes
`dataclasses.replace` work) and yields to it in a file. Values that a field had once stand in
`renamed_values: ClassVar[...] = {"packing": {"windows": "split"}}`, and `@formerly("Words")` above a class says what it
was called. A package gives its names by the old ones with `__getattr__ = renamed_names(__name__, {...})`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Path = tuple[str, ...]
Kind = TypeVar("Kind", bound=type)
_CLASSES: dict[str, list[type]] = {}  # by their old names


class Renaming(type):
    """`Llama(remat="full")` is `Llama(compute=Compute(remat="full"))`, for recipes of an older version."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if old := kwargs.keys() & old_names(cls).keys():
            say(cls.__name__, cls, sorted(old))
            moved = {tuple(old_names(cls)[name].split(".")): kwargs.pop(name) for name in sorted(old)}
            kwargs = _set(cls, kwargs, moved)
        # After the fields: an old field may hold an old value.
        kwargs = {name: value_today(cls, name, value, cls.__name__) for name, value in kwargs.items()}
        return super().__call__(*args, **kwargs)


@functools.cache
def old_names(kind: type) -> dict[str, str]:
    """Old field name -> dotted path of today, those of base classes included; empty for a class without any."""
    tables = [vars(base).get("renamed", {}) for base in reversed(kind.__mro__)]  # a subclass has the last word
    fields = getattr(kind, "__dataclass_fields__", {})
    # An old name that is a field again means the field.
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


def value_today(kind: type, field: str, value: Any, at: str) -> Any:
    """`value` of a field of `kind`, at path `at`, as it is written today. at empty: nothing is said."""
    for base in kind.__mro__:
        values = vars(base).get("renamed_values", {}).get(field, {})
        if isinstance(value, str) and value in values:
            if at:
                _say(f"{at}.{field}: {value!r} is called {values[value]!r} now")
            return values[value]
    return value


def leaf_today(config: Any, path: str, value: Any) -> tuple[str, Any]:
    """A leaf of a stored config, by the names of today; `config` is what was read of it."""
    path = path_today(config, path)
    node, (*above, last) = config, path.split(".")
    for key in above:
        node = node.get(key) if isinstance(node, dict) else getattr(node, key, None)
    return path, value_today(type(node), last, value, "")


def formerly(*names: str) -> Callable[[Kind], Kind]:
    """Marks a config class that was called `names`: it is read by them where its base is asked for."""

    def mark(kind: Kind) -> Kind:
        for name in names:
            # A name may have been that of several, which their bases tell apart.
            _CLASSES.setdefault(name, []).append(kind)
        return kind

    return mark


def class_of(base: type, name: str, at: str) -> type | None:
    """The class below `base` that was called `name`, for what stands at path `at`."""
    for kind in _CLASSES.get(name, ()):
        if issubclass(kind, base):
            _say(f"{at}: {name} is called {kind.__name__} now")
            return kind
    return None


def class_today(name: str) -> str:
    """The name of today of one of our classes."""
    known = {kind.__name__ for kind in _CLASSES.get(name, ())}
    return known.pop() if len(known) == 1 else name


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose names `names` maps old -> new: gives what is called so now, and says it."""

    def __getattr__(name: str) -> Any:
        if name in names:
            _say(f"{module}.{name} is called {names[name]} now")
            return getattr(sys.modules[module], names[name])
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


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
