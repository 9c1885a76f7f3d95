"""Whether the raw files of a source are those that its store was made from: by name, size and checksum.

The checksums are kept with the corpus, and made again of files whose size or time is another than then: touching a file
changes nothing. Content that changed within one size and one time is not noticed. Corpora of earlier code know names,
sizes and times alone, and are compared by those.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lm.data.made_from import CorpusSpec
from lm.data.sources.base import stat_of
from lm.errors import UserError
from lm.files import Log, write_atomic
from lm.system_errors import refuse

TAG = "sha256_"  # of a digest that is made of checksums
BATCH_FILES, SMALL_BYTES = 64, 1 << 16
SAID_BYTES = 1 << 30  # to read, of which a person is told


class RawFile(NamedTuple):
    """What a raw file is known by. sha256: of its content; None where it could not be read."""

    path: str
    size: int
    mtime_ns: int
    sha256: str | None

    @property
    def identity(self) -> list:
        return [self.path, self.size, self.sha256]


def take(spec: CorpusSpec, name: str, threads: int, log: Log) -> str | None:
    """The digest that a store keeps of the raw files of its source, whose checksums are written to the corpus; None
    where there are no files or some of them are not here."""
    files = spec.sources[name].files()
    if files is None:
        return spec.raw_digest(name, spec.sources[name].identity())
    known = _load(spec, name)
    found = _look(_listed(files), known, threads, log, name)
    _save(spec, name, known, found)
    return _digest(spec, name, found)


def digest_here(spec: CorpusSpec, name: str, of_host_0: str | None, log: Log) -> str | None:
    """What `take` gives on this host for the files that it sees. of_host_0: what it gave there."""
    files = spec.sources[name].files()
    if files is None or not _by_checksum(of_host_0):
        return spec.raw_digest(name, spec.sources[name].identity())
    return _digest(spec, name, _look(_listed(files), _load(spec, name), 1, log, name, _remembered))


def difference(spec: CorpusSpec, name: str, prepared: str | None, threads: int, log: Log) -> str | None:
    """Says what of the raw files is not as it was when the store was made, whose digest is `prepared`; None where all
    is, or that cannot be told here."""
    files = spec.sources[name].files()
    if files is None or not _by_checksum(prepared):
        raw = spec.raw_digest(name, spec.sources[name].identity())
        return None if raw in (None, prepared) else "other names, sizes or times (all that this store knows of them)"
    known = _load(spec, name)
    listed = _listed(files)
    if known and (changed := _other_names(known, {f.path: f for f in listed})):
        return changed
    found = _look(listed, known, threads, log, name)
    now = _digest(spec, name, found)
    if now == prepared:
        _save(spec, name, known, found)
    if now in (None, prepared):
        return None
    return _other_content(known, found) or "other content of a file that filters read"


def _by_checksum(digest: str | None) -> bool:
    return digest is not None and digest.startswith(TAG)


def _digest(spec: CorpusSpec, name: str, found: Iterable[RawFile]) -> str | None:
    made = spec.raw_digest(name, [f.identity for f in found])
    return None if made is None else TAG + made


def _other_names(known: Mapping[str, RawFile], listed: Mapping[str, RawFile]) -> str | None:
    """What can be told without reading them: other names, or other sizes."""
    if more := sorted(listed.keys() - known.keys()):
        return f"{len(more)} more, as {more[0]}"
    if less := sorted(known.keys() - listed.keys()):
        return f"{len(less)} less, as {less[0]}"
    other = next((path for path, now in listed.items() if now.size != known[path].size), None)
    return other and f"{other} of {listed[other].size} bytes, which had {known[other].size}"


def _other_content(known: Mapping[str, RawFile], found: Iterable[RawFile]) -> str | None:
    if not known:
        return "other content"
    for now in found:
        was = known[now.path]
        if now.sha256 is None and was.sha256 is not None:
            raise UserError(
                f"{now.path}: expected a file that can be read, since its time is not that of the corpus, got one that "
                f"cannot; change its permissions (chmod a+r {now.path})"
            )
        if now.sha256 != was.sha256:
            return f"other content in {now.path}"
    return None


def _listed(files: Iterable[Path]) -> list[RawFile]:
    """The files as they are named and sized, without checksums."""
    return [RawFile(str(path), s.st_size, s.st_mtime_ns, None) for path in files for s in [stat_of(path)]]


def _look(
    listed: Sequence[RawFile],
    known: Mapping[str, RawFile],
    threads: int,
    log: Log,
    name: str,
    read: Callable[[RawFile], str | None] | None = None,
) -> list[RawFile]:
    """What the files are known by. Only those are read whose size or time is not the known one. read: gives the
    checksum of one."""
    found, todo = {f.path: known.get(f.path, f) for f in listed}, list[RawFile]()
    for now in listed:
        if now.path not in known or found[now.path][1:3] != now[1:3]:
            todo.append(now)
    if (n_bytes := sum(f.size for f in todo)) > SAID_BYTES:
        log(f"{name}: checksums of {len(todo)} raw files, {n_bytes / 1e9:.1f} GB")
    read_all = lambda files: [f._replace(sha256=(read or _sha256)(f)) for f in files]
    n = max(1, min(BATCH_FILES, len(todo) // (4 * threads)))  # large files are few
    batches = [todo[at : at + n] for at in range(0, len(todo), n)]
    with ThreadPoolExecutor(threads) if threads > 1 and len(todo) > 1 else contextlib.nullcontext() as pool:
        for done in (pool.map if pool else map)(read_all, batches):
            found |= {f.path: f for f in done}
    return list(found.values())


def _sha256(file: RawFile) -> str | None:
    """The checksum of a file; None where it cannot be read, which whoever reads it will say. UserError where it changes
    meanwhile."""
    try:
        with open(file.path, "rb", buffering=0) as f:
            # Most corpora of many files have small ones, for which `file_digest` takes three times as long.
            small = file.size < SMALL_BYTES
            sha256 = (hashlib.sha256(f.read()) if small else hashlib.file_digest(f, "sha256")).hexdigest()
            stat = os.fstat(f.fileno())
    except FileNotFoundError as e:
        raise refuse(file.path, e) from None
    except OSError:
        return None
    if (stat.st_size, stat.st_mtime_ns) != file[1:3]:
        raise UserError(f"{file.path}: expected a file that stays as it is, got one that changes; run it again later")
    return sha256


@functools.lru_cache(maxsize=1 << 16)
def _remembered(file: RawFile) -> str | None:
    """As `_sha256`, for a host that waits for another and looks again and again."""
    return _sha256(file)


def _load(spec: CorpusSpec, name: str) -> dict[str, RawFile]:
    """The files that the corpus knows by path; none where that is not written or damaged: they are looked at again."""
    try:
        read = json.loads(spec.folder.raw_files(name).read_bytes())
        return {path: RawFile(path, *rest) for path, *rest in read["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _save(spec: CorpusSpec, name: str, known: Mapping[str, RawFile], found: Iterable[RawFile]) -> None:
    if {f.path: f for f in found} == known:
        return
    path = spec.folder.raw_files(name)
    with contextlib.suppress(OSError):  # a corpus may be read-only: the files are then read again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"files": list(found)}).encode())
