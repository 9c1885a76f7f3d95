"""The folder of a prepared corpus: what lies where in it, by names that are spelt here alone.

    <path>/tokenizer.model tokenizer.json      the vocabulary and the settings it was learnt with
    <path>/<source>/{train,validation}/        a `Store` each
    <path>/<source>/report.json                what became of everything that was read
    <path>/<source>/near.u32                   signatures, where near-duplicates are looked for
    <path>/<source>/report-raw.json            names, sizes, times and checksums of its raw files, where there are any
    <path>/<source>/work/                      scans and receipts of an unfinished run
    <path>/raw/<source>/                       what a source had to download or build
    <path>/.plan.json                          what several hosts have agreed on (`lm.data.prepare.hosts`)

A `Store` names the files in its own folder (`lm.data.store.tokens`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.model", "tokenizer.json"
RAW, LOCK, WORK = "raw", "lock", "work"
MANIFEST = ".plan.json"  # no source can be called that
RESERVED = (RAW, LOCK, TOKENIZER, TOKENIZER_SETTINGS)  # names that no source may have, since its folder would


class CorpusFolder(NamedTuple):
    """Says where the files of the corpus at `path` are. Nothing here reads or writes."""

    path: Path

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @property
    def tokenizer_settings(self) -> Path:
        return self.path / TOKENIZER_SETTINGS

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    def lock_of_host(self, host: int) -> Path:
        return self.path / f".{LOCK}-{host}"

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def raw(self) -> Path:
        return self.path / RAW

    def evaluation(self, name: str) -> Path:
        """Where an evaluation that documents may overlap with has its raw text; no source can be called that."""
        return self.raw / f"overlap:{name}"

    def source(self, name: str) -> Path:
        return self.path / name

    def store(self, name: str, split: str) -> Path:
        return self.path / name / split

    def work(self, name: str) -> Path:
        return self.path / name / WORK

    def report(self, name: str) -> Path:
        return self.path / name / "report.json"

    def raw_files(self, name: str) -> Path:
        return self.path / name / "report-raw.json"

    def signatures(self, name: str) -> Path:
        """Where the signatures lie of a source's documents but for exact duplicates, near-duplicates included: a source
        that is added later is compared with them."""
        return self.path / name / "near.u32"
