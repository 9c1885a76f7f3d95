"""Sources in columns: Parquet, Arrow IPC files and streams, and the folders that Hugging Face `datasets` saves.

They need pyarrow (the extra `arrow`), and nothing of Hugging Face. Only the columns of the text are read.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.data.sources.arrow import pyarrow
from lm.data.sources.base import Checked, Document, Fielded, Files, Part, Problem, stat_of, stretch_bytes
from lm.data.sources.kinds import ARROW, ARROW_STREAM, PARQUET
from lm.data.sources.opening import kind_of, unreadable
from lm.errors import UserError, did_you_mean
from lm.system_errors import refuse, system_error

BATCH_ROWS = 256  # that are Python objects at once


@dataclass(frozen=True, kw_only=True)
class Parquet(Fielded, Files):
    """Parquet files, a document a row. Units of a part: row groups."""

    def _cut(self, path: Path, n_bytes: int, part_bytes: int) -> list[Part]:
        try:
            meta = _parquet(str(path)).metadata
        except (OSError, pyarrow().ArrowException):
            return [Part(str(path), 0, 0, n_bytes)]  # whoever reads it meets the error, which may be skipped
        sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
        scale = n_bytes / max(1, sum(sizes))  # to bytes on disk
        return _stretches(str(path), [round(s * scale) for s in sizes], part_bytes)

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        try:
            file = _parquet(part.path)
            _check_again(part)
            columns = _columns(self, part.path, file.schema_arrow)
            n = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                yield from _rows(self, part.path, n, batch, max_bytes)
                n += batch.num_rows
        except (OSError, pyarrow().ArrowException, UnicodeDecodeError) as e:
            yield Problem("unreadable", _damaged(part.path, type(self).__name__, e))


class _Batches(Fielded, Checked):
    """Record batches of Arrow IPC, as a file or a stream. Units of a part: batches."""

    def _arrow_parts(self, paths: list[Path]) -> list[Part]:
        sizes_on_disk = {path: stat_of(path).st_size for path in paths}
        part_bytes = stretch_bytes(sum(sizes_on_disk.values()))
        parts = []
        for path in paths:
            try:
                sizes = [max(1, batch.nbytes) for batch in _batches(str(path))]
            except (OSError, pyarrow().ArrowException):
                parts.append(Part(str(path), 0, 0, sizes_on_disk[path]))
                continue
            scale = sizes_on_disk[path] / max(1, sum(sizes))
            parts += _stretches(str(path), [round(s * scale) for s in sizes], part_bytes)
        return parts

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        n = 0
        try:
            # Batches are mapped, not read: to pass over those of other parts costs their headers.
            for i, batch in enumerate(_batches(part.path)):
                if i >= part.stop > 0:
                    return
                if part.start <= i < part.stop:
                    columns = _columns(self, part.path, batch.schema)
                    batch = batch.select(columns)
                    for at in range(0, batch.num_rows, BATCH_ROWS):
                        yield from _rows(self, part.path, n + at, batch[at : at + BATCH_ROWS], max_bytes)
                n += batch.num_rows
            _check_again(part)  # only here: what was wrong with it may come after batches that are whole
        except (OSError, pyarrow().ArrowException, UnicodeDecodeError) as e:
            yield Problem("unreadable", _damaged(part.path, type(self).__name__, e))


@dataclass(frozen=True, kw_only=True)
class Arrow(_Batches, Files):
    """Arrow IPC files or streams, told apart by their first bytes, a document a row."""

    def parts(self, cache: Path) -> list[Part]:
        return self._arrow_parts([Path(p.path) for p in Files.parts(self, cache)])


@dataclass(frozen=True, kw_only=True)
class HFDataset(_Batches):
    """A folder that `save_to_disk` of Hugging Face `datasets` has written, of a Dataset or a DatasetDict, on a local
    disk. split: of a DatasetDict, or the one of a Dataset."""

    path: str
    split: str = "train"

    def parts(self, cache: Path) -> list[Part]:
        return self._arrow_parts(self._files())

    def files(self) -> list[Path] | None:
        return self._files() if os.path.isdir(self.path) else None

    def _files(self) -> list[Path]:
        folder = Path(self.path)
        if _is_file(folder / "dataset_dict.json"):
            splits = _strings(_read_json(folder / "dataset_dict.json").get("splits"), folder / "dataset_dict.json")
            if self.split not in splits:
                raise UserError(
                    f"{folder}: expected one of its splits {splits}, got {self.split!r}"
                    + did_you_mean(self.split, splits)
                )
            folder = folder / self.split
        if not _is_file(folder / "state.json"):
            raise UserError(
                f"{folder}: expected what datasets' save_to_disk wrote, got no state.json in it; check the path"
            )
        state = _read_json(folder / "state.json")
        if state.get("_split") not in (None, self.split):
            raise UserError(
                f"{folder}: expected split {self.split!r}, got {state['_split']!r}; set HFDataset(split=...)"
            )
        if state.get("_indices_data_files"):
            raise UserError(
                f"{folder}: expected rows in their order, got an index over them; save it again after flatten_indices()"
            )
        named = [f.get("filename") if isinstance(f, dict) else f for f in state.get("_data_files") or ()]
        files = [folder / f for f in _strings(named, folder / "state.json")]
        for file in files:
            if not _is_file(file):
                raise UserError(
                    f"{file}: expected it as {folder / 'state.json'} says, got nothing there; copy it again"
                )
        if not files:
            raise UserError(f"{folder}: expected data files in state.json, got none; save the dataset again")
        return files


def _is_file(path: Path) -> bool:
    """UserError where that may not be known."""
    try:
        return path.is_file()
    except OSError as e:
        raise refuse(path, e) from None


def _check_again(part: Part) -> None:
    """Raises OSError for a part without units: its file could not be read when parts were made."""
    if part.stop == 0:
        raise OSError("a file that was damaged and changed since")


def _damaged(path: str, source: str, error: BaseException) -> str:
    """Says in a line why a file in columns could not be read. source: that was to read it."""
    if os.path.isdir(path):
        error = IsADirectoryError(errno.EISDIR, "")
    if isinstance(error, OSError) and (said := system_error(path, error)):
        return said
    kind, own = kind_of(path), (PARQUET,) if source == "Parquet" else (ARROW, ARROW_STREAM)
    if kind is not None and kind not in own:
        return f"{path}: expected {own[0].name}, got {kind.name}; {kind.way_out}"
    return unreadable(path, ValueError(str(error).strip().split("\n")[0]))


def _parquet(path: str) -> Any:
    return pyarrow("pyarrow.parquet").ParquetFile(path, memory_map=True)


def _batches(path: str) -> Iterator[Any]:
    ipc = pyarrow("pyarrow.ipc")
    with pyarrow().memory_map(path) as f:
        if f.read(6) == b"ARROW1":  # a file begins so, a stream with a message
            file = ipc.open_file(f)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            f.seek(0)
            yield from ipc.open_stream(f)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise refuse(path, e) from None
    except ValueError as e:
        raise UserError(f"{path}: expected JSON that datasets wrote, got {e}; copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object that datasets wrote, got {found!r}; copy it again")
    return found


def _strings(found: Any, path: Path) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise UserError(f"{path}: expected names as datasets wrote them, got {found!r}; copy it again")
    return found


def _stretches(path: str, sizes: list[int], part_bytes: int) -> list[Part]:
    """Parts of whole units, each of about `part_bytes`."""
    parts, start, held = [], 0, 0
    for i, size in enumerate(sizes, 1):
        held += size
        if held >= part_bytes or i == len(sizes):
            parts.append(Part(path, start, i, held))
            start, held = i, 0
    return parts


def _columns(source: Fielded, path: str, schema: Any) -> list[str]:
    """The columns that hold the fields. UserError where there is none: a wrong name is a mistake in every row."""
    columns: dict[str, None] = {}
    for field in source._template().fields:
        name = field if field in schema.names else field.split(".")[0]
        if name not in schema.names:
            raise UserError(
                f"{path}: expected a column {name!r}, got {schema.names}; set {type(source).__name__}(field=...)"
            )
        if schema.names.count(name) > 1:
            raise UserError(
                f"{path}: expected one column {name!r}, got {schema.names.count(name)}; rename all but one, or set "
                f"{type(source).__name__}(field=...)"
            )
        columns[name] = None
    return list(columns)


def _rows(source: Fielded, path: str, n: int, batch: Any, max_bytes: int) -> Iterator[Document | Problem]:
    try:
        records = batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check its strings: what to do about it is not this module's to say
        columns = [_with_bytes(column) for column in batch.columns]
        records = pyarrow().RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
    for i, record in enumerate(records, n + 1):
        yield source._entry(record, f"row {i}", functools.partial("{}: row {}".format, path, i), max_bytes)


def _with_bytes(column: Any) -> Any:
    if pyarrow().types.is_dictionary(column.type):
        return _with_bytes(column.dictionary).take(column.indices)
    return column.cast(_as_bytes(column.type))


def _as_bytes(kind: Any) -> Any:
    """The type with the bytes of its strings in their place, inside objects too."""
    pa = pyarrow()
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_as_bytes(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_string(kind):
        return pa.binary()
    return pa.large_binary() if pa.types.is_large_string(kind) else kind
