"""The TFDS builder behind `Stdlib` and `Docstrings`.

Importing this module imports tensorflow_datasets; only the process that plans the work does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lm.data.sources.docstrings import SKIPPED, TESTS, docstrings_of, python_files
from lm.data.sources.tfds import download_and_prepare
from lm.data.tf import tensorflow
from lm.errors import UserError

tensorflow()  # not by TFDS, beside a thread that does
import tensorflow_datasets as tfds  # noqa: E402


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
            if name != "pydoc_data/topics.py":  # its texts are documents below
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
        # TFDS would order documents by a hash.
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
        download_and_prepare(builder)
    return builder
