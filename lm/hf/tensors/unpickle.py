"""The pickles in PyTorch's files, read without torch and without running what is in them.

A pickle may name only what plain tensors are made of; every other name would be code to import and run, and is
refused. What comes out tells of tensors and storages: where these lie in a file is `lm.hf.tensors.pytorch`.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lm.errors import UserError
from lm.hf.tensors.file import DAMAGED, DTYPES

WAY_OUT = "get the safetensors version of this model"

_TORCH_NAMES = {
    "float64": ("F64", "Double"),
    "float32": ("F32", "Float"),
    "float16": ("F16", "Half"),
    "bfloat16": ("BF16", "BFloat16"),
    "int64": ("I64", "Long"),
    "int32": ("I32", "Int"),
    "int16": ("I16", "Short"),
    "int8": ("I8", "Char"),
    "uint8": ("U8", "Byte"),
    "bool": ("BOOL", "Bool"),
}
STORAGES = {f"torch.{kind}Storage": DTYPES[name] for name, kind in _TORCH_NAMES.values()}
STORAGES["torch.storage.UntypedStorage"] = DTYPES["U8"]
# Dtypes without a storage class of their own stand by name, beside an untyped storage.
TORCH_DTYPES = {f"torch.{name}": DTYPES[safe] for name, (safe, _) in _TORCH_NAMES.items()}
TORCH_DTYPES |= {f"torch.uint{bits}": DTYPES[f"U{bits}"] for bits in (16, 32, 64)}
CALLS = {
    "torch.Size",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}


class Storage(NamedTuple):
    """`n` elements of the storage saved under `key`, from element `first` on. total: elements in all of it."""

    key: str
    dtype: np.dtype
    total: int
    first: int
    n: int


class Tensor(NamedTuple):
    """A tensor in a storage. first and strides: in elements of `dtype`, from where the storage starts."""

    storage: Storage
    dtype: np.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """Stands for what a pickle names: `name` is one of STORAGES, TORCH_DTYPES, CALLS. An immutable record, so that a
    pickle can neither change it nor get at what is behind it."""

    name: str

    def __call__(self, *args: Any) -> Any:
        match self.name.rpartition(".")[2], args:
            case "Size", [tuple() | list() as size]:
                return tuple(size)
            case "_rebuild_tensor", [Storage() as storage, first, shape, strides]:
                return Tensor(storage, storage.dtype, first, shape, strides)
            case "_rebuild_tensor_v2", [Storage() as storage, first, shape, strides, _, _, *flags] if not any(flags):
                return Tensor(storage, storage.dtype, first, shape, strides)
            case "_rebuild_tensor_v3", [Storage() as storage, first, shape, strides, _, _, _Name(name), *flags] if (
                name in TORCH_DTYPES and not any(flags)
            ):
                return Tensor(storage, TORCH_DTYPES[name], first, shape, strides)
            case "_rebuild_parameter", [Tensor() as tensor, _, _]:
                return tensor
        raise pickle.UnpicklingError(f"{self.name} with other arguments than a plain tensor has")


class TensorUnpickler(pickle.Unpickler):
    """Makes Tensor records, dicts and plain values, and nothing else. storages: every storage that was named."""

    def __init__(self, path: Path, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self._path = path
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":  # what torch saves a state_dict in
            return OrderedDict
        if full in CALLS or full in STORAGES or full in TORCH_DTYPES:
            return _Name(full)
        if module == "torch" and re.fullmatch(r"[A-Z]\w*Storage|(float|complex|q?u?int|bits)\d\w*", name):
            known = ", ".join(sorted(TORCH_DTYPES))
            raise UserError(f"{self._path}: expected tensors of {known}, got {full}; {WAY_OUT} in BF16 or F32")
        raise UserError(f"{self._path}: wants to run code ({ascii(full)[1:-1][:100]}): refused; {WAY_OUT}")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ["storage", _Name(kind), str(key), _, int(n), *view] if kind in STORAGES and n >= 0:
                storage = Storage(key, STORAGES[kind], n, 0, n)
            case _:
                raise pickle.UnpicklingError("something else than a storage outside the pickle")
        if (known := self.storages.setdefault(key, storage)) != storage:
            raise pickle.UnpicklingError(f"storage {key} as {known.total} {known.dtype} and as {n} {storage.dtype}")
        match view:
            case [] | [None]:
                return storage
            case [[str(), int(first), int(size)]] if 0 <= first <= first + size <= n:
                return storage._replace(first=first, n=size)
        raise pickle.UnpicklingError(f"a view of storage {key} that does not fit it")


@contextlib.contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Turns what a cut or damaged pickle raises, which can be anything (says its documentation), into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if isinstance(e, EOFError) or "truncated" in str(e):
            raise UserError(f"{path}: truncated: expected more after its end ({e}); download it again") from e
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{path}: expected a dict of tensors as torch.save writes it, got {reason}; {DAMAGED}") from e
