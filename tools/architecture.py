"""Draws which part of lm/ imports which, as mermaid, from the code: `python tools/architecture.py --write`.

Parts are the modules and packages directly below lm/. An arrow that follows from two others is left out.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- drawn by tools/architecture.py -->", "<!-- end -->"


def imports() -> dict[str, set[str]]:
    """Part -> parts it imports, wherever in its files."""
    parts: dict[str, set[str]] = {}
    for path in sorted((ROOT / "lm").rglob("*.py")):
        name = path.relative_to(ROOT / "lm").parts[0].removesuffix(".py")
        if name.startswith("__"):
            continue
        found = parts.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lm":
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm."):
                found.add(str(node.module).split(".")[1])
    return {name: {t for t in found if t != name and t in parts} for name, found in parts.items()}


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same reachability with the fewest arrows."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges[start])
        while todo:
            if (t := todo.pop()) not in seen:
                seen.add(t)
                todo += edges[t]
        return seen

    return {a: {b for b in targets if not any(b in reach(c) for c in targets - {b})} for a, targets in edges.items()}


def mermaid() -> str:
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"  {a} --> {b}" for a, targets in sorted(reduced(imports()).items()) for b in sorted(targets)]
    return "\n".join([*lines, "```"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into ARCHITECTURE.md")
    picture = mermaid()
    if parser.parse_args().write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{picture}\n{END}{rest.partition(END)[2]}")
    else:
        print(picture)


if __name__ == "__main__":
    main()
