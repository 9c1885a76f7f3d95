"""docs/troubleshooting.md quotes lines that the code prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = [q for row in re.findall(r"^\| (`.*?`) \| \S", PAGE, re.M) for q in re.findall(r"`([^`]+)`", row)]


def messages() -> list[str]:
    """Every text in the code; what is put into it is left out."""
    found = []
    for path in (ROOT / "lm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


MESSAGES = messages()


def test_the_page_quotes_lines():
    assert len(QUOTED) > 50


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_line_in_the_page_is_one_of_the_code(quoted):
    pieces = [re.escape(piece.strip(" :;")) for piece in quoted.split("...") if piece.strip(" :;")]
    pattern = re.compile(".*".join(pieces), re.S)
    assert any(pattern.search(message) for message in MESSAGES), quoted
