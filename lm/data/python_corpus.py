"""TFDS: the builder behind `Stdlib` and `Docstrings`, and finding the record files of any dataset.

Importing this module imports tensorflow_datasets; only the process that plans the work does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from lm.data.docstrings import SKIPPED, TESTS, docstrings_of, python_files
from lm.data.sources import Part, stretch_bytes
from lm.data.tf import tensorflow
from lm.errors import UserError


@dataclasses.dataclass(kw_only=True)
class StdlibConfig(tfds.core.BuilderConfig):
    include_tests: bool = False

    @classmethod
    def of(cls, include_tests: bool) -> StdlibConfig:
        name = "stdlib_with_tests" if include_tests else "stdlib"
        return cls(name=name, description="Standard library sources and help topics.", include_tests=include_tests)

    def documents(self) -> Iterator[tuple[str, bytes]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in python_files(root, skip=SKIPPED if self.include_tests else SKIPPED | TESTS):
            name = path.relative_to(root).as_posix()
            if name != "pydoc_data/topics.py":
                yield name, path.read_bytes()
        from pydoc_data.topics import topics

        for name, text in sorted(topics.items()):
            yield f"topics/{name}", text.encode()


@dataclasses.dataclass(kw_only=True)
class DocstringsConfig(tfds.core.BuilderConfig):
    packages: tuple[str, ...] = ()

    @classmethod
    def of(cls, packages: tuple[str, ...]) -> DocstringsConfig:
        """The name holds what is installed, so that another environment builds anew."""
        installed = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
        key = hashlib.sha256("\n".join([*packages, "", *installed]).encode()).hexdigest()[:12]
        return cls(name=f"docstrings_{key}", description="Docstrings of installed packages.", packages=tuple(packages))

    def documents(self) -> Iterator[tuple[str, bytes]]:
        roots = sorted({Path(sysconfig.get_paths()[k]) for k in ("purelib", "platlib")})
        entries = {e.stem: e for r in roots for e in sorted(r.iterdir()) if (e.is_dir() or e.suffix == ".py")}
        for missing in sorted(set(self.packages) - set(entries)):
            raise UserError(
                f"Docstrings.packages: expected packages in {roots[0]}, got {missing!r}; install or drop it"
            )
        files = [
            (path, path.relative_to(entries[name].parent).as_posix())
            for name in self.packages or sorted(n for n in entries if n.isidentifier())
            for path in (
                python_files(entries[name], skip=SKIPPED | TESTS) if entries[name].is_dir() else [entries[name]]
            )
        ]
        for (_, module), text in zip(files, docstrings_of(files), strict=True):
            if text:
                yield module, text.encode()


class PythonCorpus(tfds.core.GeneratorBasedBuilder):
    """What a Python installation holds to read: {"name", "text"}, one split, in order. Version: that of Python."""

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, (name, text) in enumerate(self.builder_config.documents()):
            yield i, {"name": name, "text": text}


def build(config: tfds.core.BuilderConfig, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The finished PythonCorpus under `data_dir`; built if it is not there."""
    # tfrecord: parquet loses rows in TFDS 4.9.10.
    builder = PythonCorpus(config=config, data_dir=str(data_dir), file_format="tfrecord")
    with contextlib.redirect_stdout(None):  # TFDS announces a download
        _download_and_prepare(builder)
    return builder


def find(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """A dataset by TFDS name. UserError for an unknown one or a failed download."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"Tfds({name!r}): expected a TFDS name, with data_dir={data_dir!r}; {reason}") from None
    _download_and_prepare(builder)
    return builder


def _download_and_prepare(builder):
    tensorflow()  # TFDS would import it louder
    tfds.disable_progress_bar()
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def record_parts(builder: tfds.core.DatasetBuilder, split: str, *fields: str) -> list[Part]:
    """The record files of a split, in stretches of about `stretch_bytes`. UserError for a split, field or format that
    is not there or not readable."""
    name = builder.info.full_name
    file_format = builder.info.file_format.value
    if file_format != "tfrecord":
        raise UserError(
            f"{name}: expected file_format tfrecord, got {file_format}; build it with file_format='tfrecord'"
        )
    texts = sorted(_text_features(builder.info.features))
    for field in fields:
        if field.replace(".", "/") not in texts:
            raise UserError(
                f"{name}: expected field to be one of its texts {texts}, got {field!r}; set Tfds(field=...)"
            )
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as e:
        raise UserError(f"{name}: expected a split of {sorted(builder.info.splits)}, got {split!r} ({e})") from None
    for i in instructions:
        if not os.path.isfile(i.filename):
            raise UserError(
                f"{i.filename}: expected it as the dataset_info.json beside it says, got nothing there; copy it again "
                f"or delete {os.path.dirname(i.filename)}, to build it anew"
            )
    parts, part_bytes = [], stretch_bytes(sum(os.path.getsize(i.filename) for i in instructions))
    for i in instructions:
        n = i.examples_in_shard if i.take == -1 else i.take
        n_bytes = os.path.getsize(i.filename) * n // max(1, i.examples_in_shard)
        step = -(-n // max(1, round(n_bytes / part_bytes)))
        for at in range(i.skip, i.skip + n, max(1, step)):
            stop = min(at + step, i.skip + n)
            parts.append(Part(str(i.filename), at, stop, n_bytes * (stop - at) // max(1, n)))
    return parts


def _text_features(features, prefix="") -> Iterator[str]:
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Text):
            yield prefix + name
        elif isinstance(feature, tfds.features.FeaturesDict):
            yield from _text_features(feature, f"{prefix}{name}/")
