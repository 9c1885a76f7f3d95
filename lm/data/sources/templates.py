"""From the fields of a record to one text: `"{question}\\n{answers.first}"`.

Dots reach into nested objects; `{{` and `}}` are braces. Strings and numbers can be filled in; anything else, null and
a field that is not there are missing: a text with a hole in it is not what the template says.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm.errors import UserError


class Missing(NamedTuple):
    """A field that could not be filled: its name. got: what was there instead, for the message."""

    field: str
    got: str


class Template(NamedTuple):
    """Pieces of (literal text, the field that follows it or None at the end). numbers: whether they can be filled
    in."""

    pieces: tuple[tuple[str, str | None], ...]
    numbers: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """Names each field once, in the order of the template."""
        return tuple(dict.fromkeys(field for _, field in self.pieces if field is not None))

    def fill(self, record: Mapping[str, Any]) -> str | Missing:
        """The text of a record, or the first field that it lacks."""
        out = []
        for literal, field in self.pieces:
            out.append(literal)
            if field is not None:
                value = lookup(record, field)
                if isinstance(value, bytes):
                    value = value.decode("utf-8", errors="surrogateescape")
                elif self.numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
                    value = str(value)
                if not isinstance(value, str):
                    return Missing(field, _describe(record, field))
                out.append(value)
        return "".join(out)


@functools.lru_cache
def parse_template(template: str, owner: str) -> Template:
    """Parses a template. owner: the class whose it is. UserError for a brace too many, no field, or a conversion."""
    at = f"{owner}(template={template!r})"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as e:
        raise UserError(f"{at}: expected fields as '{{question}}', got {e}; write a brace of the text twice") from None
    for _, field, spec, conversion in parsed:
        if field is not None and (spec or conversion or not all(field.split("."))):
            raise UserError(
                f"{at}: expected only names of fields in braces, got {field!r}, {spec or conversion or 'no name'!r}; "
                "write '{name}' or '{outer.inner}'"
            )
    if not any(field for _, field, _, _ in parsed):
        raise UserError(f"{at}: expected at least one field as '{{text}}', got none; name one")
    return Template(tuple((literal, field) for literal, field, _, _ in parsed))


def one_field(field: str) -> Template:
    """The text that is in one field, as it is."""
    return Template((("", field),), numbers=False)


def lookup(record: Mapping[str, Any], field: str) -> Any:
    """The value at a dotted path, None where there is none. A key that holds the dots itself comes first."""
    if field in record:
        return record[field]
    value: Any = record
    for key in field.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _describe(record: Mapping[str, Any], field: str) -> str:
    if field in record or lookup(record, field) is not None:
        return f"a {type(lookup(record, field)).__name__} in it"
    return str(sorted(record))
