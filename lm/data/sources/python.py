"""What a Python installation holds to read, as sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.data.sources.base import Part
from lm.data.sources.tfds import Records, record_parts


@dataclass(frozen=True, kw_only=True)
class Stdlib(Records):
    """Source code of the running interpreter's standard library, and the topics of `help()`: about 12 MB that are
    always there. Differs between Python versions. include_tests: also its test suites, where installed (+19 MB)."""

    include_tests: bool = False

    def parts(self, cache: Path) -> list[Part]:
        from lm.data.sources import python_corpus

        builder = python_corpus.build(python_corpus.StdlibConfig.of(self.include_tests), cache)
        return record_parts(builder, "train", "text")


@dataclass(frozen=True, kw_only=True)
class Docstrings(Records):
    """Docstrings of installed packages, a document per module: the most English that a Python environment holds.

    packages: top-level import names; empty: all of site-packages. Sources are parsed, nothing is imported.
    """

    packages: tuple[str, ...] = ()

    def parts(self, cache: Path) -> list[Part]:
        from lm.data.sources import python_corpus

        builder = python_corpus.build(python_corpus.DocstringsConfig.of(self.packages), cache)
        return record_parts(builder, "train", "text")
