"""The tensors of a Hugging Face model folder, read one by one and written as a stream. Torch is not needed.

Reads safetensors and PyTorch's own files, whole or in shards; writes safetensors. What the tensors mean is not known
here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.errors import UserError, did_you_mean
from lm.hf.tensors.file import TensorFile, parse_json
from lm.hf.tensors.pytorch import pickle_places
from lm.hf.tensors.safetensors import safetensors_places
from lm.hf.tensors.write import write_folder, write_tensors

__all__ = ["TensorFolder", "TensorInfo", "open_tensors", "write_folder", "write_tensors"]

# In order of preference: safetensors is checked faster and cannot ask for code.
FORMATS = {"model.safetensors": safetensors_places, "pytorch_model.bin": pickle_places}
LISTED = 12  # names of files in an error
_MENDED = "the folder mixes the files of two models or saves: download it again into an empty folder"


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read. bfloat16 is the dtype of ml_dtypes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path


class TensorFolder(contextlib.AbstractContextManager):
    """The tensors of a model folder by name; `open_tensors` makes it. Leaving the context forgets the files, while
    arrays that were read stay good."""

    def __init__(self, folder: Path, files: dict[str, TensorFile]):
        """Takes the file that holds each tensor."""
        self.folder = folder
        self._files = files
        self._names = tuple(sorted(files))
        self.n_bytes = sum(file.places[name].n_bytes for name, file in files.items())

    def __exit__(self, *error) -> None:
        self._files = {}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def names(self) -> tuple[str, ...]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Says what the header tells of a tensor; reads no data. UserError for a name that is not there."""
        file = self._file(name)
        return TensorInfo(file.places[name].shape, file.places[name].dtype, file.path)

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own shape and dtype. UserError for a name that is not there.

        A read-only view of the mapped file: the disk is read where the array is, so a slice costs its own bytes, and
        nothing stays in memory after the last view of it. The file must not be cut or rewritten in place meanwhile.
        The view may lie off the alignment of its dtype (numpy and JAX take that), and off C order in PyTorch's files.
        """
        return self._file(name).read(name)

    def _file(self, name: str) -> TensorFile:
        assert self._files or not self._names, "read after the folder was closed"
        if name not in self._files:
            raise UserError(f"{self.folder}: no tensor {name!r}{did_you_mean(name, self._names)}")
        return self._files[name]


def open_tensors(folder: str | Path) -> TensorFolder:
    """Opens, whichever is there first: model.safetensors, model.safetensors.index.json, pytorch_model.bin,
    pytorch_model.bin.index.json, the indices with their shards.

    Reads and checks all headers, and no tensors. UserError for no such file, a file that is cut or damaged, an index
    and shards that do not agree, and pickles that hold more than tensors.
    """
    folder = Path(folder)
    for name, parse in FORMATS.items():
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            file = TensorFile(single, parse)
            return TensorFolder(folder, dict.fromkeys(file.places, file))
        if index.is_file():
            shard_of = _read_index(index)
            shards = [TensorFile(folder / shard, parse) for shard in sorted(set(shard_of.values()))]
            return TensorFolder(folder, _match(index, shard_of, shards))
    raise _no_weights(folder)


def _read_index(path: Path) -> dict[str, str]:
    shard_of = parse_json(path, path.read_bytes(), "index").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{path}: expected 'weight_map' with the file of each tensor, got none; download it again")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or shard != Path(shard).name:  # an index must not lead out of its folder
            raise UserError(f"{path}: {name}: expected the name of a file in its folder, got {shard!r}; {_MENDED}")
    missing = sorted({shard for shard in shard_of.values() if not (path.parent / shard).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        lost = sum(shard in missing for shard in shard_of.values())
        raise UserError(
            f"{path}: expected the shard {missing[0]}{more} beside it, with {lost} of {len(shard_of)} tensors, got no "
            "such file; the download stopped early: start it again"
        )
    return shard_of


def _match(index: Path, shard_of: dict[str, str], shards: list[TensorFile]) -> dict[str, TensorFile]:
    """The shard of each tensor, where the index and the shards tell the same."""
    files: dict[str, TensorFile] = {}
    for shard in shards:
        for name in shard.places:
            if name in files:
                raise UserError(
                    f"{shard.path}: expected each tensor in one shard, got {name!r} duplicated: it is in "
                    f"{files[name].path.name} too; {_MENDED}"
                )
            files[name] = shard
    for name, expected in shard_of.items():
        if name not in files:
            raise UserError(f"{index.parent / expected}: {name}: expected as {index.name} tells, got none; {_MENDED}")
        if files[name].path.name != expected:
            raise UserError(f"{index}: {name}: expected in {expected}, got it in {files[name].path.name}; {_MENDED}")
    for name, shard in files.items():
        if name not in shard_of:
            raise UserError(f"{shard.path}: {name}: expected only tensors of {index.name}, got this one; {_MENDED}")
    return files


def _no_weights(folder: Path) -> UserError:
    wanted = ", ".join(f"{name}{end}" for name in FORMATS for end in ("", ".index.json"))
    if not folder.is_dir():
        got = f"a file; give the folder {folder.parent}" if folder.exists() else "nothing there; download the model"
        return UserError(f"{folder}: expected a model folder with one of {wanted}, got {got}")
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    cause = "download the folder again with its weights"
    kinds = {Path(name).suffix for name in names}
    if "adapter_config.json" in names:
        cause = "this is an adapter: give the folder of the model it was made for"
    elif ".safetensors" in kinds:
        cause = "shards are read through their index: download that too"
    elif kinds & {".h5", ".msgpack", ".gguf", ".pth"}:
        cause = "get the safetensors version of this model"
    return UserError(
        f"{folder}: expected one of {wanted}, got {', '.join(names[:LISTED]) or 'an empty folder'}{more}; {cause}"
    )
