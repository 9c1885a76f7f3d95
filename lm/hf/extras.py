"""What sentence-transformers keeps in a model folder beside the model: which modules follow it, and their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

MODULES = "modules.json"
SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")


def copy_extras(source: Path, target: Path) -> None:
    """Copies them byte for byte, where `source` has any."""
    for name in _names(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _names(folder: Path) -> list[str]:
    if not (folder / MODULES).is_file():
        return []
    names = [name for name in (MODULES, *SETTINGS) if (folder / name).is_file()]
    for module in _modules(folder / MODULES):
        # The first module is the model itself, at ""; nothing outside of the folder is one.
        if module not in ("", "..") and Path(module).name == module:
            names += [str(p.relative_to(folder)) for p in sorted((folder / module).rglob("*")) if p.is_file()]
    return names


def _modules(path: Path) -> list[str]:
    try:
        listed = json.loads(path.read_bytes())
    except ValueError:
        return []  # no model reads it
    listed = listed if isinstance(listed, list) else []
    return [m["path"] for m in listed if isinstance(m, dict) and isinstance(m.get("path"), str)]
