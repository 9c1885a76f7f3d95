"""Raw files, near or far: which they are, copies of those in an object store, and lines and chunks of them."""

from __future__ import annotations

import glob
import hashlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lm.data.sources.find import alternatives, find_below, find_files, no_files
from lm.errors import UserError
from lm.files import is_remote, open_atomic

COPY_BYTES = 1 << 24  # a request of an object store costs some 50 ms


class Layer(io.RawIOBase):
    """What is read out of another file, which is closed with it; a subclass has `readinto`."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def read_line(f: IO[bytes], max_bytes: int) -> tuple[bytes, int]:
    """(the next line with its end, its size in bytes); (b"", size) for one of more than `max_bytes`, which is passed
    over without being held, and (b"", 0) at the end."""
    line = f.readline(max_bytes + 1)
    if len(line) <= max_bytes:
        return line, len(line)
    return b"", len(line) + (0 if line.endswith(b"\n") else skip_line(f))


def skip_line(f: IO[bytes]) -> int:
    """Goes behind the next line end and returns the bytes passed. Memory does not depend on the line."""
    passed = 0
    while part := f.readline(1 << 20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def find(pattern: str, cache: Path | None, *, refuse_dead_links: bool = False) -> list[Path]:
    """Files that match a pattern (`lm.data.sources.find`), by name. Of a remote one: what `download` has put into
    `cache`.

    refuse_dead_links: UserError for a match that is a link to nothing, which would be text that nobody misses.
    """
    if not is_remote(pattern):
        return find_files(pattern, refuse_dead_links)
    found: set[Path] = set()
    for root, inner in map(_split, alternatives(pattern)):
        if cache is not None:
            found |= set(find_below(_staged(cache, root), inner))
    return sorted(found)


def found(pattern: str, cache: Path | None) -> list[Path]:
    """As `find`, and dead links are refused. UserError where there is no file."""
    paths = find(pattern, cache, refuse_dead_links=True)
    if not paths:
        raise _no_copies(pattern) if is_remote(pattern) else no_files(pattern)
    return paths


def download(pattern: str, cache: Path, log: Callable[[str], None]) -> None:
    """Copies what matches a remote glob (`gs://bucket/folder/*.jsonl.gz`) into `cache`, from where workers read it.

    A file of the same size is kept, one that is gone from the store goes. UserError where the store cannot be reached
    or holds no match.
    """
    began, target = time.monotonic(), _staged(cache, _split(pattern)[0])
    files = _remote_files(pattern, cache)
    if not files:
        raise _no_copies(pattern)
    for gone in set(find(pattern, cache)) - files.keys():
        gone.unlink()
    copies = [(path, local, size) for local, (path, size) in files.items()]
    todo = [(p, local, size) for p, local, size in copies if not local.is_file() or local.stat().st_size != size]
    total = sum(size for _, _, size in todo)
    if todo:
        log(f"{pattern}: copying {len(todo)} of {len(files)} files, {total / 1e6:.1f} MB, to {target}")
    for path, local, size in todo:
        copy_file(path, local, size, "prepare again")
    if todo:
        seconds = time.monotonic() - began
        log(f"{pattern}: copied in {seconds:.0f} s, {total / 1e6 / max(seconds, 1e-3):.1f} MB/s")


def _remote_files(pattern: str, cache: Path) -> dict[Path, tuple[Any, int]]:
    """Where each file that matches will lie -> its path in the store, and its size."""
    from etils import epath

    files = {}
    try:
        for root, inner in map(_split, alternatives(pattern)):
            folder = epath.Path(root)
            literal = folder / inner
            matches = [literal] if glob.has_magic(inner) and literal.exists() else sorted(folder.glob(inner))
            for path in matches:
                if path.is_file():
                    files[_staged(cache, root) / path.relative_to(folder)] = path, path.stat().length
    except UserError:
        raise
    except Exception as e:  # each store has its own: those of TensorFlow are no OSError
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"{pattern}: expected a store that can be listed, got {reason}; check the address, your login and that its "
            "package is installed (for gs:// the extra 'gcs')"
        ) from None
    return files


def _no_copies(pattern: str) -> UserError:
    return UserError(f"{pattern}: expected files, got no match; check the glob")


def copy_file(path: Any, local: Path, size: int, way_out: str, sha256: str | None = None) -> None:
    """Copies a file from a store (an epath) to `local`, which has its name when it is whole. UserError where it cannot
    be read or is not of this size and, if given, this checksum; it says the way out."""
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        got, hashed = 0, hashlib.sha256()
        with path.open("rb") as source, open_atomic(local) as f:
            for chunk in chunks(source, COPY_BYTES):
                f.write(chunk)
                got += len(chunk)
                if sha256 is not None:
                    hashed.update(chunk)
            if got != size:
                raise UserError(f"{path}: expected {size} bytes, got {got}: it changed or was cut; {way_out}")
            if sha256 not in (None, hashed.hexdigest()):
                raise UserError(
                    f"{path}: expected sha256 {str(sha256)[:12]}, got {hashed.hexdigest()[:12]}: it is damaged; "
                    f"{way_out}"
                )
    except UserError:
        raise
    except Exception as e:  # as in `download`
        raise UserError(f"{path}: expected to copy it to {local}, got {e}; {way_out}") from None


def chunks(f: IO[bytes], size: int) -> Iterator[bytes]:
    while chunk := f.read(size):
        yield chunk


def _split(pattern: str) -> tuple[str, str]:
    """(folder, glob below it)."""
    scheme, _, rest = pattern.partition("://")
    folders = rest.split("/")
    at = next((i for i, name in enumerate(folders) if glob.has_magic(name)), len(folders) - 1)
    return f"{scheme}://{'/'.join(folders[:at])}", "/".join(folders[at:])


def _staged(cache: Path, root: str) -> Path:
    return cache / root.replace("://", "/")
