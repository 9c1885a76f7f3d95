"""The model cases, each made once: reference, folder, loaded model, and what its compiled program gives."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from pathlib import Path

import pytest

from lm import hf
from tests.hf import compare
from tests.hf.cases import ALIKE, reference


def model_cases(*names: str, fast: Collection[str] | None = None) -> pytest.MarkDecorator:
    """`name` of each case, in a group of its own: whatever is asked of a model, one worker makes and compiles it. Those
    that are not among `fast` are slow; None: none is."""
    assert fast is None or set(fast) <= set(names)
    slow = lambda name: [pytest.mark.slow] if fast is not None and name not in fast else []
    marks = lambda name: [pytest.mark.xdist_group(f"model {name}"), *slow(name)]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in names])


class Cases:
    """What tests ask of a case by name. Folders and models are shared: copy a folder before you change it."""

    def __init__(self, make_folder):
        self._make_folder = make_folder
        self.folder = functools.cache(self._folder)
        # Of few at a time: a group asks for one, and compiled programs take memory maps of the process.
        self.loaded = functools.lru_cache(maxsize=4)(self._loaded)
        self.differences = functools.lru_cache(maxsize=4)(self._differences)

    def _folder(self, name: str, dtype: str = "float32") -> Path:
        """As transformers writes it."""
        import torch

        path = self._make_folder("hf")
        model = reference(name)
        if dtype != "float32":
            model = copy.deepcopy(model).to(getattr(torch, dtype))
        model.save_pretrained(path)
        return path

    def _loaded(self, name: str) -> hf.HFModel:
        return hf.load(self.folder(name))

    def _differences(self, name: str) -> compare.Differences:
        return compare.differences(name, self.loaded(name), gradients=name not in ALIKE)
