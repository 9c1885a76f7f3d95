"""What is there of a corpus before it is prepared and when it is, and what has to go."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from lm.data.made_from import CorpusSpec
from lm.data.prepare import raw_files
from lm.data.prepare.preparation import Preparation
from lm.data.store.splits import SPLITS
from lm.data.store.tokens import META, Store
from lm.errors import UserError
from lm.files import Log, remove_temporary


def missing_sources(spec: CorpusSpec) -> list[str]:
    """The sources that have not all of their stores."""
    stores = {name: [spec.folder.store(name, split) for split in spec.splits] for name in spec.sources}
    return [name for name, paths in stores.items() if not all((path / META).is_file() for path in paths)]


def is_finished(spec: CorpusSpec) -> bool:
    """Says whether all is written that `prepare` writes."""
    return spec.folder.tokenizer.is_file() and not missing_sources(spec)


def remove_work(spec: CorpusSpec) -> None:
    """Removes what only an unfinished corpus needs."""
    for name in spec.sources:
        shutil.rmtree(spec.folder.work(name), ignore_errors=True)


def check_raw(spec: CorpusSpec, names: Iterable[str], threads: int, log: Log) -> None:
    """Raises UserError where the raw files of one of these sources are no more what its store was made from."""
    for name in names:
        store = spec.folder.store(name, "train")
        if (changed := raw_files.difference(spec, name, Store(store).meta.raw, threads, log)) is not None:
            raise UserError(
                f"{store}: expected raw files of data.sources[{name!r}] as they were, got {changed}: a file was added, "
                "removed or changed; run `lm prepare --force`, or put it back"
            )


def clear(p: Preparation, force: bool) -> list[str]:
    """Removes what a killed process left, with `force` all that was made of these sources too, and checks the raw files
    of what stays. Returns the sources to make. For host 0: the others write only to work and the splits."""
    spec, folder = p.spec, p.spec.folder
    for path in (folder.path, *map(folder.source, spec.sources)):
        remove_temporary(path.glob(".*"))
    remove_temporary(folder.raw.rglob(".*"))  # no other host writes there
    if force:
        _remove(spec)
    todo = missing_sources(spec)
    check_raw(spec, spec.sources.keys() - set(todo), p.workers.n, p.log)
    return todo or ([] if folder.tokenizer.is_file() else list(spec.sources))


def _remove(spec: CorpusSpec) -> None:
    """Deletes the tokenizer and all that is known of the sources, the raw text that was fetched included."""
    folder = spec.folder
    for file in (folder.tokenizer, folder.tokenizer_settings):
        file.unlink(missing_ok=True)
    for name in spec.sources:
        for path in (*(folder.store(name, split) for split in SPLITS), folder.work(name), folder.raw / name):
            shutil.rmtree(path, ignore_errors=True)
        for file in (folder.report(name), folder.signatures(name), folder.raw_files(name)):
            file.unlink(missing_ok=True)
    for name in spec.overlap.files if spec.overlap else ():
        shutil.rmtree(folder.evaluation(name), ignore_errors=True)
