"""Recipes: Python files with a `config` of type `Config`.

A recipe is named by path, or by name: a file of that name in `./configs`, then in the `configs` folder beside this
package.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

from lm.config.sections import Config
from lm.errors import UserError, did_you_mean


def load(recipe: str) -> Config:
    """The `config` of a recipe file."""
    path = find_recipe(recipe)
    spec = importlib.util.spec_from_file_location(f"lm_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the annotations of classes that a recipe defines are looked up
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever a recipe raises is a mistake in the recipe
        what = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{path}{_line(str(spec.origin), e)}: {' '.join(what.split())}") from e
    except SystemExit as e:
        raise UserError(
            f"{path}: expected `config = Config(...)`, got an exit with {e.code!r}; a recipe only says what is wanted"
        ) from None
    if not hasattr(module, "config"):
        raise UserError(f"{path}: expected `config = Config(...)`, got no `config`")
    if not isinstance(module.config, Config):
        raise UserError(f"{path}: expected `config = Config(...)`, got {type(module.config).__name__}")
    return module.config


def _line(file: str, e: Exception) -> str:
    """`:` and the line of the recipe that raised; nothing where it has none, as of a file that cannot be read.

    file: as Python calls it, which is not as the user does.
    """
    if isinstance(e, SyntaxError) and e.filename == file:
        return f":{e.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == file]
    return f":{lines[-1]}" if lines else ""


def find_recipe(recipe: str) -> Path:
    """The file a recipe's path or name stands for."""
    path = Path(recipe)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"{recipe}: no such recipe file{did_you_mean(path.name, _names(path.parent))}")
        return path
    # A user's own recipe wins over ours of its name.
    folders = [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]
    for folder in folders:
        if (folder / f"{recipe}.py").is_file():
            return folder / f"{recipe}.py"
    known = {name.removesuffix(".py") for folder in folders for name in _names(folder)}
    raise UserError(f"{recipe}: no recipe of that name{did_you_mean(recipe, known)}")


def _names(folder: Path) -> list[str]:
    return [f.name for f in folder.glob("*.py")] if folder.is_dir() else []
