"""The rules of ARCHITECTURE.md that a reader of one file cannot see, checked on the syntax trees."""

import ast
import collections
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LM = sorted(p for p in (ROOT / "lm").rglob("*.py"))

# Imports go from a layer to those above it in this list, or stay inside one package. A new module goes in here.
LAYERS = (
    {"errors", "renamed"},
    {"system_errors", "codec", "files", "mesh", "distributed", "hardware", "compilation"},
    {"workdir", "sharding"},
    {"nn", "checkpoint"},
    {"models", "data", "optim"},
    {"objectives", "generation", "lora"},
    {"hf"},
    {"evals"},
    {"config"},
    {"training"},
    {"describe", "run", "aot", "planner"},
    {"convert"},
    {"serve", "cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What of Flax may be used: NNX as a builder of parameter trees. Its rng state, optimizers and transforms stay out.
NNX = {
    "GraphDef",
    "Module",
    "PARTITION_NAME",
    "Param",
    "Rngs",
    "eval_shape",
    "initializers",
    "merge",
    "split",
    "to_flat_state",
    "to_pure_dict",
    "vmap",
}
# `generation` runs the layers one by one, each over its own cache.
NNX_PLACES = {
    "nn": NNX,
    "models": NNX,
    "lora": NNX,
    "training": {"GraphDef", "merge"},
    "generation": {"merge", "split"},
    "hf": {"merge"},
}

MOST_FILES, MOST_LINES = 22, 400
ONE_FILE_A_FAMILY = {"lm/models", "lm/hf/families"}  # may hold more files

READS_ENVIRONMENT = {"lm/__init__.py", "lm/distributed.py", "lm/data/tf.py"}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unit(path: Path) -> str:
    """The module or package directly below `lm` that a file belongs to."""
    return path.relative_to(ROOT / "lm").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file; of a package its __init__."""
    return {name(p).removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in LM}


def imported_modules(path: Path) -> set[str]:
    """Those of lm that a file imports, wherever in it."""
    found = set()
    for _, imported in imports(path):
        whole = imported if imported in modules() else imported.rpartition(".")[0]
        found |= {whole} & modules().keys()
    return found


def roots(path: Path) -> set[str]:
    return {imported.partition(".")[0] for _, imported in imports(path)}


def attributes(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, x) of every `module.x`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield node.lineno, node.attr


def test_there_is_something_to_check():
    assert {"nn", "models", "training", "cli"} <= {unit(p) for p in LM}


def test_every_module_has_its_layer():
    assert {unit(p) for p in LM} - LEVEL.keys() == {"__init__"}


@pytest.mark.parametrize("path", [p for p in LM if unit(p) != "__init__"], ids=name)
def test_imports_go_downward(path):
    wrong = []
    for line, imported in imports(path):
        root, _, rest = imported.partition(".")
        if root != "lm":
            continue
        target = rest.partition(".")[0]
        if target != unit(path) and not LEVEL.get(target, 99) < LEVEL.get(unit(path), 0):
            wrong.append(f"{name(path)}:{line}: {unit(path)} imports {imported}")
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    """Not even where the import stands in a function, or is for types alone."""
    edges = {module: imported_modules(path) - {module} for module, path in modules().items()}
    done: set[str] = set()

    def walk(module: str, behind: tuple[str, ...]) -> None:
        assert module not in behind, " -> ".join([*behind[behind.index(module) :], module])
        if module not in done:
            for further in sorted(edges[module]):
                walk(further, (*behind, module))
            done.add(module)

    for module in edges:
        walk(module, ())


def test_folders_and_files_are_small():
    files = collections.Counter(name(path.parent) for path in LM)
    assert {folder: n for folder, n in files.items() if n > MOST_FILES}.keys() <= ONE_FILE_A_FAMILY
    lines = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in LM}
    assert not {path: n for path, n in lines.items() if n > MOST_LINES}


def test_imports_in_lm_are_absolute():
    for path in LM:
        levels = {node.level for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)}
        assert levels <= {0}, name(path)


def test_importing_lm_imports_none_of_its_modules():
    module = tree(ROOT / "lm" / "__init__.py")
    eager = [n for n in module.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not [n for n in eager if ast.unparse(n).startswith(("from lm", "import lm"))]


def test_data_never_meets_models_and_models_never_meet_data():
    for path in LM:
        used = {imported.split(".")[1] for _, imported in imports(path) if imported.startswith("lm.")}
        if unit(path) == "data":
            assert used <= {"data", "errors", "system_errors", "files", "workdir", "checkpoint", "renamed"}, name(path)
        if unit(path) == "models":
            assert used <= {"models", "nn", "sharding", "errors", "renamed"}, name(path)


def test_tensorflow_is_imported_by_data_alone_and_never_at_the_top_of_its_package():
    for path in LM:
        if unit(path) != "data":
            assert not roots(path) & {"tensorflow", "tensorflow_datasets"}, name(path)
    eager = [n for n in tree(ROOT / "lm" / "data" / "tf.py").body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not [n for n in eager if "tensorflow" in ast.unparse(n)]


def test_data_but_for_its_loader_imports_no_framework():
    for path in LM:
        if unit(path) == "data" and path.parent.name != "loader":
            assert not roots(path) & {"jax", "flax", "torch"}, name(path)


def test_lm_imports_nothing_that_is_not_installed_with_it():
    for path in LM:
        assert not roots(path) & {"launch", "tools", "tests", "configs"}, name(path)


def test_launch_imports_nothing_from_lm():
    for path in (ROOT / "launch").rglob("*.py"):
        assert "lm" not in roots(path), name(path)


def test_flax_is_used_as_a_parameter_tree_builder_in_few_places():
    wrong = []
    for path in LM:
        allowed = NNX_PLACES.get(unit(path), set())
        for line, imported in imports(path):
            if imported.startswith("flax") and (imported != "flax.nnx" or not allowed):
                wrong.append(f"{name(path)}:{line}: imports {imported}")
        wrong += [f"{name(path)}:{line}: nnx.{x}" for line, x in attributes(path, "nnx") if x not in allowed]
    assert not wrong


def test_every_allowed_nnx_name_is_still_used():
    assert {x for path in LM for _, x in attributes(path, "nnx")} == NNX


def test_the_environment_is_read_in_two_places():
    readers = set()
    for path in LM:
        names = {x for _, x in attributes(path, "os")} | {
            i.removeprefix("os.") for _, i in imports(path) if i.startswith("os.")
        }
        if names & {"environ", "environb", "getenv", "putenv", "unsetenv"}:
            readers.add(name(path))
    assert readers <= READS_ENVIRONMENT


def test_only_the_command_line_parses_arguments_and_sets_exit_codes():
    for path in LM:
        if unit(path) != "cli":
            assert "argparse" not in roots(path), name(path)
            assert not {x for _, x in attributes(path, "sys")} & {"argv", "exit"}, name(path)


def test_no_benchmark_is_imported_by_a_test():
    for path in (ROOT / "tests").rglob("*.py"):
        assert "tools" not in roots(path), name(path)


def test_no_exception_is_swallowed():
    """No bare `except`, and where Exception is caught something is done about it."""

    def all_of(node: ast.expr | None) -> bool:
        kinds = node.elts if isinstance(node, ast.Tuple) else [node]
        return any(isinstance(k, ast.Name) and k.id in ("Exception", "BaseException") for k in kinds)

    def idle(body: list[ast.stmt]) -> bool:
        return all(ast.unparse(n) in ("pass", "continue", "break", "...", "return", "return None") for n in body)

    wrong = []
    for path in LM:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                swallowed = node.type is None or (all_of(node.type) and idle(node.body))
            else:
                swallowed = (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func).endswith("suppress")
                    and any(map(all_of, node.args))
                )
            if swallowed:
                wrong.append(f"{name(path)}:{node.lineno}")
    assert not wrong


def test_no_module_is_called_after_nothing():
    assert not {p.stem for p in LM} & {"utils", "util", "helpers", "common", "misc"}


def test_the_picture_in_the_page_is_drawn_from_the_code():
    drawn = subprocess.run(
        [sys.executable, ROOT / "tools" / "architecture.py"], capture_output=True, text=True, check=True
    )
    page = (ROOT / "ARCHITECTURE.md").read_text()
    assert drawn.stdout.strip() in page, "run: python tools/architecture.py --write"
