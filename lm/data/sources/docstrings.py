"""Docstrings of Python files, by parsing: nothing is imported or run."""

from __future__ import annotations

import ast
import gc
import inspect
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "node_modules"}
TESTS = {"test", "tests", "idle_test", "testing", "testdata"}
CHUNK_FILES = 64  # a process takes this many at a time; fewer than some chunks are not worth starting any


def python_files(root: Path, skip: set[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def docstrings(source: bytes, module: str) -> str:
    """Docstrings of a module's classes and functions in order, each under its dotted name; "" without any, or when
    this Python cannot parse it."""
    if b'"""' not in source and b"'''" not in source:  # parsing is what takes time
        return ""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    found: list[str] = []

    def visit(node, name):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if doc := ast.get_docstring(node, clean=False):
                found.append(f"{name}\n\n{inspect.cleandoc(doc)}\n")
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return
        for child in [*node.body, *getattr(node, "orelse", ())]:  # statements only: expressions take twice the time
            if hasattr(child, "body"):
                inner = getattr(child, "name", None)
                visit(child, f"{name}.{inner}" if inner else name)

    visit(tree, module.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return "\n".join(found).encode(errors="replace").decode()  # source may spell lone surrogates


def docstrings_of(files: Sequence[tuple[Path, str]]) -> Iterator[str]:
    """`docstrings` of each (file, module name), in order; by several processes, since parsing takes a second a 4 MB."""
    if len(files) < 4 * CHUNK_FILES:
        yield from map(_docstrings, files)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=gc.disable) as pool:  # trees are acyclic
        yield from pool.map(_docstrings, files, chunksize=CHUNK_FILES)


def _docstrings(file: tuple[Path, str]) -> str:
    path, module = file
    return docstrings(path.read_bytes(), module)
