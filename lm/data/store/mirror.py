"""A prepared corpus in an object store, brought to a local disk: stores are memory-mapped.

    <cache>/<name>-<hash of the url>/      as the folder that `lm prepare` made, of the stores that were asked for

It is read-only there and complete: made by `lm prepare` on a local path, then copied by any tool. What was copied is
never replaced: where the corpus in the store has changed it is refused, so a run that has the copy open keeps its text.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from lm.data.folder import TOKENIZER, TOKENIZER_SETTINGS, CorpusFolder
from lm.data.sources.files import copy_file
from lm.data.store.tokens import META, StoreMeta, parse_meta, shard_files
from lm.errors import UserError
from lm.files import Log, locked, write_atomic

CACHE = "~/.cache/lm/corpora"
THREADS = 8  # one stream of an object store gives some 100 MB/s, a host has ten times that
MAKE = "make it with `lm prepare` in a local folder, then copy that folder there"


class Copy(NamedTuple):
    """A file to bring: from where, to where, its bytes and checksum."""

    remote: Any
    local: Path
    size: int
    sha256: str


def cache_folder(url: str, cache: str | None = None) -> Path:
    """Where the corpus of a url is copied to. cache: folder of all of them; None: CACHE."""
    name = url.rstrip("/").rpartition("/")[2]
    root = Path(CACHE if cache is None else cache).expanduser()
    # With and without a slash at the end it is one corpus.
    return root / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]}"


def mirror(url: str, stores: Sequence[str], *, cache: str | None = None, log: Log = print) -> Path:
    """The local folder of a corpus in an object store, with these of its stores, `<source>/<split>`.

    What is there already is kept and compared with the store by its meta.json alone. A second process on the host waits
    for the first. UserError when the corpus cannot be reached, is not complete, has changed since it was copied, does
    not fit on the disk, or a file has another size or checksum than its meta.json says.
    """
    folder, root = cache_folder(url, cache), remote_path(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"data.cache: expected a folder that can be made, got {e}; name another") from None
    with locked(CorpusFolder(folder).lock, log, what="copies this corpus"):
        metas: dict[str, bytes] = {}
        copies: list[Copy] = []
        small = {name: _read(root / name, url) for name in (TOKENIZER, TOKENIZER_SETTINGS)}
        for left in folder.rglob(".*"):  # by a process that was killed
            if left.is_file():
                left.unlink()
        for name in stores:
            metas[name] = _read(root / name / META, url)  # it names the files to copy, with their checksums
            meta = parse_meta(metas[name], f"{url.rstrip('/')}/{name}/{META}")
            copies += _missing(root / name, folder / name, meta)
        small |= {f"{name}/{META}": content for name, content in metas.items()}
        for name, content in small.items():
            _check_same(root / name, folder / name, content)  # before anything is copied
        _copy(url, folder, copies, log)
        for name, content in small.items():  # a meta.json after its files: a folder without it is unfinished
            if not (folder / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(folder / name, content)
    return folder


def find_remote_stores(url: str) -> list[str]:
    """`<source>/<split>` of each store in the folder of a corpus. UserError where there is none."""
    root = remote_path(url)
    with _reaching(url):
        names = [f"{a.name}/{b.name}" for a in root.iterdir() if a.is_dir() for b in a.iterdir() if b.is_dir()]
        found = sorted(name for name in names if (root / name / META).exists())
    if not found:
        raise UserError(f"{url}: expected the folder of a prepared corpus, got no <source>/train in it; {MAKE}")
    return found


def remote_path(url: str) -> Any:
    """An epath. UserError for a scheme that it does not know, and for an address without a folder."""
    from etils import epath

    scheme, _, rest = url.partition("://")
    if not all(rest.strip("/").partition("/")[::2]):  # else the client tries for half a minute
        raise UserError(f"{url}: expected {scheme}://bucket/folder, got no folder; name that of a prepared corpus")
    try:
        return epath.Path(url)
    except KeyError:
        raise UserError(f"{url}: expected gs://, s3:// or az://, got {url.partition('://')[0]}://; copy it") from None


def _missing(remote: Any, local: Path, meta: StoreMeta) -> list[Copy]:
    """Lists the files to copy. One of the right size was compared with its checksum, but where there is no meta.json
    yet, perhaps with that of an earlier one."""
    whole = (local / META).is_file()
    named = [file for i, shard in enumerate(meta.shards) for file in shard_files(i, shard, meta.dtype)]
    files = [Copy(remote / name, local / name, size, sha256) for name, size, sha256 in named]
    return [f for f in files if _size(f.local) != f.size or not (whole or _sha256(f.local) == f.sha256)]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_same(remote: Any, local: Path, content: bytes) -> None:
    if local.is_file() and (here := local.read_bytes()) != content:
        got, expected = (hashlib.sha256(x).hexdigest()[:12] for x in (content, here))
        raise UserError(
            f"{remote}: expected sha256 {expected} as when it was copied, got {got}: the corpus there is another now; "
            f"set data.cache to another folder, or delete {local} and its folder when no run reads it"
        )


def _copy(url: str, folder: Path, copies: Sequence[Copy], log: Log) -> None:
    if not copies:
        return
    total, free = sum(c.size for c in copies), shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"{folder}: expected {total / 1e9:.3f} GB of free disk for {url}, got {free / 1e9:.3f} GB; make room or "
            "set data.cache to a folder on another disk"
        )
    log(f"{url}: copying {len(copies)} files, {total / 1e9:.2f} GB, to {folder}")
    began, way_out = time.monotonic(), f"open the corpus again, or copy it to {url} anew"
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(copy_file, c.remote, c.local, c.size, way_out, c.sha256) for c in copies]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    seconds = max(time.monotonic() - began, 1e-3)
    log(f"{url}: copied {total / 1e9:.2f} GB in {seconds:.1f} s, {total / 1e9 / seconds:.2f} GB/s")


def _read(path: Any, url: str) -> bytes:
    with _reaching(url):
        if path.exists():
            return path.read_bytes()
    raise UserError(f"{url}: expected a prepared corpus, got no {path.name} at {path}; {MAKE}")


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # each store has errors of its own: those of TensorFlow are no OSError
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"{url}: expected a store that can be read, got {reason}; check the address, your login and that its "
            "package is installed (for gs:// the extra 'gcs')"
        ) from None
