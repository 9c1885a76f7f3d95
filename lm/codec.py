"""Frozen dataclasses to JSON and back, and `a.b=value` overrides: one strict decoder for both.

Every error is a `UserError` that starts with the dotted path. Nothing is coerced but int to float.
A field annotated with a base dataclass takes any subclass: in JSON by `"_type": "Class"`, or `"package.module.Class"`
where it is not of this package, on the command line by name (`optim=Lion` keeps what was set in the fields that both
classes share) or as a call (`optim=Lion(lr=1e-4)`: all else is Lion's default).

Names of our own classes are unique below each base, and stored without their module: a class may move, and what was
stored is read. `lm.some.module.Class`, as it was stored once, is read by its last part. Fields, values
and classes that were renamed are read by their old names (`lm.renamed`).
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib
import math
import sys
import types
import typing
from typing import Any

from lm.errors import UserError, did_you_mean
from lm.renamed import class_of, class_today, modernized, old_names, path_today, say, value_today

TYPE = "_type"
OURS = __name__.partition(".")[0]  # this package
_WORDS = {"true": True, "false": False}


class _NoneWord(str):
    """`none` or `null` on the command line: None, or the text itself where only that fits (`compute.remat=none`)."""

    def meant(self, kind: Any) -> str | None:
        only_text = kind is str or (typing.get_origin(kind) is typing.Literal and str(self) in typing.get_args(kind))
        return str(self) if only_text else None


def encode(value: Any) -> Any:
    """A dataclass tree as JSON-ready dicts, lists and scalars, with the class of every dataclass."""
    if dataclasses.is_dataclass(value):
        kind = type(value)
        out = {TYPE: stored_name(kind)}
        return out | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    return value


def decode(kind: Any, value: Any, at: str = "") -> Any:
    """The inverse of `encode`: `value` checked against the type annotation `kind`, at path `at`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, _NoneWord):
        value = value.meant(kind)
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, at)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, at)
    if origin is typing.Literal:
        # The types too, since 1 == True.
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
        # `float` of a larger one raises; inf is refused below.
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if type(value) is not kind:  # not isinstance: True is no number
        raise UserError(f"{at}: expected {_name(kind)}, got {value!r}{_way_out(kind, value, at)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{at}: expected a finite number, got {value!r}")
    return value


def override(config: Any, *assignments: str) -> Any:
    """`config` with the fields at dotted paths replaced: `override(c, "optim.lr=1e-3", "train.steps=5")`.

    The result is checked as a whole, what `config` held before included, so that the order of the assignments does not
    matter (`model.d_model=128 model.n_heads=4` either way).
    """
    for assignment in assignments:
        path, value = _assignment(assignment)
        config = _replace(type(config), config, path.split("."), value, path)
    return decode(type(config), encode(config))  # every __post_init__ runs again


def assigned(assignment: str, config: Any = None) -> set[str]:
    """The leaf paths that an assignment names: `optim=Lion(lr=1e-4)` -> `optim._type` and `optim.lr`.

    config: what it made, which knows the old names on the paths.
    """
    path, value = _assignment(assignment)
    return {path_today(config, leaf) for leaf in flatten(value, path)}


def parse(text: str) -> Any:
    """A command-line value: a Python literal, a call with keywords, a list or dict of them, else the text itself.

    A bare word is text, but for true, false and none.
    """
    try:
        return _literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError):  # TypeError: an unhashable key
        return text


def stored_name(kind: type) -> str:
    """What `encode` writes for a class: its name, with its module where it is not one of ours."""
    return kind.__name__ if _is_ours(kind) else f"{kind.__module__}.{kind.__qualname__}"


def flatten(encoded: Any, at: str = "") -> dict[str, Any]:
    """Leaf path -> value of an encoded config, `_type` entries included, in today's spelling."""
    if isinstance(encoded, dict) and encoded:  # an empty one is a leaf, whose value is {}
        items = [flatten(v, f"{at}.{k}" if at else k) for k, v in encoded.items()]
        return functools.reduce(lambda a, b: a | b, items, {})
    return {at: _today(encoded, at.rpartition(".")[2])}


def _today(encoded: Any, key: str = "") -> Any:
    """Writes names of our classes as they are called today, without the module that an old file has."""
    if isinstance(encoded, dict):
        return {k: _today(v, k) for k, v in encoded.items()}
    if isinstance(encoded, list):
        return [_today(v) for v in encoded]
    if key == TYPE and isinstance(encoded, str):
        module, _, short = encoded.rpartition(".")
        return class_today(short) if not module or _is_module_of_ours(module) else encoded
    return encoded


def field_types(kind: type) -> dict[str, Any]:
    """Field name -> resolved annotation of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def is_default(f: dataclasses.Field, value: Any) -> bool:
    """Says whether `value` is what the field has when nothing is said."""
    if f.default_factory is not dataclasses.MISSING:
        return value == f.default_factory()
    return f.default is not dataclasses.MISSING and value == f.default


# --- decoding ---------------------------------------------------------------------------------------------------------


def _decode_dataclass(kind: type, value: Any, at: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise UserError(
            f"{at or kind.__name__}: expected {_name(kind)}, got {value!r}; {_known_classes(kind, '(...)')}"
        )
    if TYPE in value:
        kind = resolve_class(kind, value[TYPE], at or kind.__name__)
    hints = field_types(kind)
    fields = {}
    for k, v in modernized(kind, value, at).items():
        if k == TYPE:
            continue
        where = f"{at}.{k}" if at else k
        if k not in hints:
            raise UserError(f"{where}: {kind.__name__} has no field {k!r}{did_you_mean(str(k), hints)}")
        fields[k] = decode(hints[k], value_today(kind, k, v, at or kind.__name__), where)
    needed = [f.name for f in dataclasses.fields(kind) if _required(f)]
    if missing := [name for name in needed if name not in fields]:
        # All that are needed: what is written in place of this value does not keep those it had.
        example = f"{kind.__name__}({', '.join(f'{name}=...' for name in needed)})"
        raise UserError(f"{at or kind.__name__}: {kind.__name__} needs {', '.join(missing)}; write {example}")
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
        # Of several options the one that got beyond its first look tells more.
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


def _assignment(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"{text!r}: expected path=value, for example optim.lr=1e-3")
    return path, parse(value)


def _replace(kind: Any, node: Any, keys: list[str], value: Any, path: str) -> Any:
    """`node`, annotated as `kind`, with the value below `keys` replaced; the node itself is not checked again."""
    at = path if len(keys) == 1 else path[: -len(".".join(keys[1:])) - 1]
    key, rest = keys[0], keys[1:]
    if isinstance(node, dict):
        if key not in node and rest:
            raise UserError(f"{at}: no entry {key!r}{did_you_mean(key, node)}")
        of = next(typing.get_args(k)[1] for k in (kind, *typing.get_args(kind)) if typing.get_origin(k) is dict)
        return node | {key: _replaced(of, node.get(key), rest, value, path, at)}
    if not dataclasses.is_dataclass(node):
        parent = at.rpartition(".")[0]
        raise UserError(f"{at}: {parent} is {node!r}, which has no fields; set {parent} itself")
    holder: Any = type(node)
    if key in old_names(holder):
        say(at.rpartition(".")[0] or holder.__name__, holder, [key])
        today = [*old_names(holder)[key].split("."), *rest]
        return _replace(kind, node, today, value, ".".join([*path.split(".")[: -len(keys)], *today]))
    hints = field_types(type(node))
    if key not in hints:
        raise UserError(f"{at}: {type(node).__name__} has no field {key!r}{did_you_mean(key, hints)}")
    if not rest:
        value = value_today(type(node), key, value, at.rpartition(".")[0] or type(node).__name__)
    new = copy.copy(node)
    # Past __post_init__: another assignment may still make it fit.
    object.__setattr__(new, key, _replaced(hints[key], getattr(node, key), rest, value, path, at))
    return new


def _replaced(kind: Any, old: Any, rest: list[str], value: Any, path: str, at: str) -> Any:
    return _replace(kind, old, rest, value, path) if rest else decode(kind, _carry(kind, old, value, at), at)


def _carry(kind: Any, old: Any, value: Any, at: str) -> Any:
    """A class given by its bare name keeps what was set in the fields it shares with the value it replaces.

    A default of the old class does not replace that of the new one: Adafactor does not clip because AdamW did.
    """
    bases = [k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and dataclasses.is_dataclass(k)]
    if not bases:
        return value
    if isinstance(value, str) and not isinstance(value, _NoneWord) and str not in typing.get_args(kind):
        new = resolve_class(bases[0], value, at)
        needed = {f.name: _required(f) for f in dataclasses.fields(new)}
        kept = {TYPE: stored_name(new)}
        for f in dataclasses.fields(old) if dataclasses.is_dataclass(old) else ():
            v = getattr(old, f.name)
            if f.name in needed and (needed[f.name] or not is_default(f, v)):
                kept[f.name] = encode(v)
        return kept
    return value


def resolve_class(base: type, name: Any, at: str) -> type:
    """The dataclass called `name` (short or dotted) that is `base` or one of its subclasses."""
    known = {c.__name__: c for c in sorted(_subclasses(base), key=_is_ours)}  # ours last: a bare name means them first
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"{at}: expected the name of a class or Name(field=value), got {name!r}; {_known_classes(base)}"
        )
    module, _, short = name.rpartition(".")
    if _is_module_of_ours(module):
        name, module = short, ""
    if name in known:
        return known[name]
    if name == base.__name__:
        return base
    if not module and (renamed := class_of(base, name, at)):
        return renamed
    if not module:
        raise UserError(f"{at}: no {base.__name__} is called {name!r}{did_you_mean(name, known)}")
    try:
        found = getattr(importlib.import_module(module), short)
    except (ImportError, AttributeError) as e:
        raise UserError(f"{at}: cannot find the class {name!r}: {e}; is its package installed?") from e
    if not (isinstance(found, type) and issubclass(found, base) and dataclasses.is_dataclass(found)):
        raise UserError(f"{at}: expected {base.__name__}, got the class {name!r}; {_known_classes(base)}")
    return found


def _subclasses(base: type) -> list[type]:
    """Lists the classes below `base` that have been imported, else `base`. A `_Name` only exists to be subclassed."""

    def below(kind: type) -> list[type]:
        direct: list[type] = kind.__subclasses__()
        return [c for sub in direct for c in (sub, *below(sub))]

    return [c for c in below(base) if not c.__name__.startswith("_")] or [base]


def _is_ours(kind: type) -> bool:
    return _is_module_of_ours(kind.__module__)


def _is_module_of_ours(module: str) -> bool:
    return module.partition(".")[0] == OURS


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=word):
            return _NoneWord(word) if word.lower() in ("none", "null") else _WORDS.get(word.lower(), word)
        case ast.Call(func=func, args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {TYPE: ast.unparse(func)} | {str(k.arg): _literal(k.value) for k in keywords}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_literal(k): _literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(e) for e in elements]
        case _:
            return ast.literal_eval(node)


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _way_out(kind: Any, value: Any, at: str) -> str:
    if kind is int and type(value) is float and value.is_integer():
        return f"; write {int(value)}"
    if kind is bool:
        return "; write true or false"
    if kind is str and type(value) in (int, float, bool, type(None)):
        return f"""; for text write {at}='"{value}"'"""
    return ""


def _name(kind: Any) -> str:
    return "None" if kind is type(None) else getattr(kind, "__name__", None) or str(kind)


def _known_classes(kind: type, call: str = "") -> str:
    return f"one of {', '.join(sorted(c.__name__ + call for c in _subclasses(kind)))}"
