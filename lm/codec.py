"""Frozen dataclasses to JSON and back, and `a.b=value` overrides: one strict decoder for both.

Every error is a `UserError` that starts with the dotted path. Nothing is coerced but int to float.
A field annotated with a base dataclass takes any subclass: in JSON by `"_type": "package.module.Class"`,
on the command line by name (`optim=Lion` keeps the fields that both classes share) or as a call
(`optim=Lion(lr=1e-4)`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import math
import types
import typing
from typing import Any

from lm.errors import UserError, did_you_mean

TYPE = "_type"
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def encode(value: Any) -> Any:
    """A dataclass tree as JSON-ready dicts, lists and scalars, with the class of every dataclass."""
    if dataclasses.is_dataclass(value):
        kind = type(value)
        out = {TYPE: f"{kind.__module__}.{kind.__qualname__}"}
        return out | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    return value


def decode(kind: Any, value: Any, at: str = "") -> Any:
    """The inverse of `encode`: `value` checked against the type annotation `kind`, at path `at`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, at)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, at)
    if origin is typing.Literal:
        if value not in args or not any(value == a and type(value) is type(a) for a in args):
            raise UserError(f"{at}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        return _decode_tuple(args, value, at)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{at}: expected a dict, got {value!r}")
        return {decode(args[0], k, at): decode(args[1], v, f"{at}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{at}: expected {_name(kind)}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{at}: expected a finite number, got {value!r}")
    return value


def override(config: Any, assignment: str) -> Any:
    """`config` with the field at a dotted path replaced: `override(c, "optim.lr=1e-3")`."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(f"{assignment!r}: expected path=value, for example optim.lr=1e-3")
    return _replace(config, path.split("."), parse(text, path), path)


def parse(text: str, at: str = "") -> Any:
    """A command-line value: a Python literal, a class name or a call with keywords, else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return text
    try:
        return _literal(node, at)
    except _NotLiteral:
        return text


def flatten(encoded: Any, at: str = "") -> dict[str, Any]:
    """Leaf path -> value of an encoded config, `_type` entries included."""
    if isinstance(encoded, dict) and encoded:
        items = [flatten(v, f"{at}.{k}" if at else k) for k, v in encoded.items()]
        return functools.reduce(lambda a, b: a | b, items, {})
    return {at: encoded}


def field_types(kind: type) -> dict[str, Any]:
    """Field name -> resolved annotation of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


# --- decoding ---------------------------------------------------------------------------------------------------------


def _decode_dataclass(kind: type, value: Any, at: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{at}: expected {_name(kind)}, got {value!r}{_known_classes(kind)}")
    if TYPE in value:
        kind = resolve_class(kind, value[TYPE], at)
    hints = field_types(kind)
    fields = {}
    for k, v in value.items():
        if k == TYPE:
            continue
        where = f"{at}.{k}" if at else k
        if k not in hints:
            raise UserError(f"{where}: {kind.__name__} has no field {k!r}{did_you_mean(k, hints)}")
        fields[k] = decode(hints[k], v, where)
    missing = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in fields]
    if missing:
        raise UserError(f"{at or kind.__name__}: {kind.__name__} needs {', '.join(missing)}")
    return kind(**fields)


def _decode_union(args: tuple, value: Any, at: str) -> Any:
    if value is None and type(None) in args:
        return None
    errors = []
    for a in (a for a in args if a is not type(None)):
        try:
            return decode(a, value, at)
        except UserError as e:
            errors.append(e)
    options = [a for a in args if a is not type(None)]
    if len(options) == 1 or (isinstance(value, dict) and any(dataclasses.is_dataclass(a) for a in options)):
        raise errors[0] if len(options) == 1 else min(errors, key=lambda e: str(e).startswith(f"{at}: expected"))
    raise UserError(f"{at}: expected {' or '.join(_name(a) for a in args)}, got {value!r}")


def _decode_tuple(args: tuple, value: Any, at: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{at}: expected a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(decode(args[0], v, f"{at}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise UserError(f"{at}: expected {len(args)} values, got {len(value)}: {value!r}")
    return tuple(decode(a, v, f"{at}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _replace(node: Any, keys: list[str], value: Any, path: str) -> Any:
    at = path if len(keys) == 1 else path[: -len(".".join(keys[1:])) - 1]
    key, rest = keys[0], keys[1:]
    if isinstance(node, dict):
        if key not in node and rest:
            raise UserError(f"{at}: no entry {key!r}{did_you_mean(key, node)}")
        return node | {key: _replace(node[key], rest, value, path) if rest else value}
    if not dataclasses.is_dataclass(node):
        parent = at.rpartition(".")[0]
        raise UserError(f"{at}: {parent} is {node!r}, which has no fields; set {parent} itself")
    hints = field_types(type(node))
    if key not in hints:
        raise UserError(f"{at}: {type(node).__name__} has no field {key!r}{did_you_mean(key, hints)}")
    old = getattr(node, key)
    if rest:
        new = decode(hints[key], encode(_replace(old, rest, value, path)), at)
    else:
        new = decode(hints[key], _carry(hints[key], old, value, at), at)
    return dataclasses.replace(node, **{key: new})


def _carry(kind: Any, old: Any, value: Any, at: str) -> Any:
    """A class given by its bare name keeps the fields it shares with the value it replaces."""
    bases = [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
    if not bases:
        return value
    if isinstance(value, str) and str not in typing.get_args(kind):
        new = resolve_class(bases[0], value, at)
        shared = {} if not dataclasses.is_dataclass(old) else encode(old)
        return {TYPE: _path(new)} | {k: v for k, v in shared.items() if k in field_types(new)}
    return value


def resolve_class(base: type, name: str, at: str) -> type:
    """The dataclass called `name` (short or dotted) that is `base` or one of its subclasses."""
    known = {c.__name__: c for c in _subclasses(base)}
    if name in known:
        return known[name]
    module, _, short = name.rpartition(".")
    if not module:
        raise UserError(f"{at}: no {base.__name__} is called {name!r}{did_you_mean(name, known)}")
    try:
        found = getattr(importlib.import_module(module), short)
    except (ImportError, AttributeError) as e:
        raise UserError(f"{at}: cannot find the class {name!r}: {e}; is its package installed?") from e
    if not (isinstance(found, type) and issubclass(found, base) and dataclasses.is_dataclass(found)):
        raise UserError(f"{at}: expected a {base.__name__}, got the class {name!r}")
    return found


def _subclasses(base: type) -> list[type]:
    """`base` (unless it only exists to be subclassed) and everything below it that has been imported."""
    below = [c for sub in base.__subclasses__() for c in _subclasses(sub)]
    return below if below else [base]


class _NotLiteral(Exception):
    pass


def _literal(node: ast.expr, at: str) -> Any:
    match node:
        case ast.Call(func=func, args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {TYPE: ast.unparse(func)} | {str(k.arg): _literal(k.value, at) for k in keywords}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_literal(k, at): _literal(v, at) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(e, at) for e in elements]
        case _:
            try:
                return ast.literal_eval(node)
            except (ValueError, TypeError, SyntaxError) as e:
                raise _NotLiteral from e


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _name(kind: Any) -> str:
    return "None" if kind is type(None) else getattr(kind, "__name__", None) or str(kind)


def _known_classes(kind: type) -> str:
    return f"; one of {', '.join(sorted(c.__name__ for c in _subclasses(kind)))}"
