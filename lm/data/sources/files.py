"""Raw files: found by a glob, brought here from an object store, opened whatever they are compressed with.

What is read here is bytes. What they mean is the business of the sources.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import io
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lm.errors import UserError
from lm.files import is_remote, open_atomic

COMPRESSED = (".gz", ".zst")
COPY_BYTES = 1 << 24  # a request of an object store costs some 50 ms
UNREADABLE = (OSError, EOFError, zlib.error)  # what a file that is cut or damaged raises, gzip and zstd included


def pyarrow(module: str = "pyarrow") -> Any:
    """The module. UserError when it is not installed: it is an extra, since most corpora need none of its 120 MB."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            "pyarrow: expected it for .zst, Parquet and Arrow files, got no such package; pip install "
            "'lm-pretraining[arrow]'"
        ) from None


def open_raw(path: str) -> IO[bytes]:
    """The bytes of a file, unpacked where its name ends in .gz or .zst. UserError when it cannot be opened."""
    try:
        if path.endswith(".gz"):
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.endswith(".zst"):
            return io.BufferedReader(pyarrow().input_stream(path, compression="zstd"))
        return open(path, "rb")
    except OSError as e:
        raise UserError(unreadable(path, e)) from None


def unreadable(path: str, error: BaseException) -> str:
    kind = {".gz": "gzip ", ".zst": "zstd "}.get(Path(path).suffix, "")
    return f"{path}: expected a whole {kind}file, got {error}; fetch it again"


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
    """Files that match a glob (`**` included), by name. Of a remote glob: what `download` has put into `cache`.

    refuse_dead_links: UserError for a match that is a link to nothing, which would be text that nobody misses.
    """
    if is_remote(pattern):
        root, inner = _split(pattern)
        return [] if cache is None else _files(str(_staged(cache, root) / inner))
    return _files(pattern, refuse_dead_links)


def download(pattern: str, cache: Path, log: Callable[[str], None]) -> None:
    """Copies what matches a remote glob (`gs://bucket/folder/*.jsonl.gz`) into `cache`, from where workers read it.

    A file of the same size is kept, one that is gone from the store goes. UserError where the store cannot be reached
    or holds no match.
    """
    from etils import epath

    root, inner = _split(pattern)
    target, began = _staged(cache, root), time.monotonic()
    try:
        folder = epath.Path(root)
        files = [p for p in sorted(folder.glob(inner)) if p.is_file()]
        sizes = [p.stat().length for p in files]
    except Exception as e:  # each store has its own: those of TensorFlow are no OSError
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"{pattern}: expected a store that can be listed, got {reason}; check the address, your login and that its "
            "package is installed (for gs:// the extra 'gcs')"
        ) from None
    if not files:
        raise UserError(f"{pattern}: expected files, got no match; check the glob")
    copies = [(path, target / path.relative_to(folder), size) for path, size in zip(files, sizes, strict=True)]
    for gone in set(find(pattern, cache)) - {local for _, local, _ in copies}:
        gone.unlink()
    todo = [(p, local, size) for p, local, size in copies if not local.is_file() or local.stat().st_size != size]
    total = sum(size for _, _, size in todo)
    if todo:
        log(f"{pattern}: copying {len(todo)} of {len(files)} files, {total / 1e6:.1f} MB, to {target}")
    for path, local, size in todo:
        copy_file(path, local, size, "prepare again")
    if todo:
        seconds = time.monotonic() - began
        log(f"{pattern}: copied in {seconds:.0f} s, {total / 1e6 / max(seconds, 1e-3):.1f} MB/s")


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


def _files(pattern: str, refuse_dead_links: bool = False) -> list[Path]:
    found = sorted(set(map(Path, _matches(pattern))))
    for path in found:
        if refuse_dead_links and path.is_symlink() and not path.exists():
            raise UserError(f"{path}: expected a file, got a link to {os.readlink(path)}, where none is; mend the link")
    return [p for p in found if p.is_file()]


def _matches(pattern: str) -> Iterator[str]:
    """Matches as glob.glob(recursive=True) does, but for links to a folder above them: glob follows those round and
    round, each file 40 times, and of two such links never ends."""
    if pattern.rpartition("/")[2] == "**":
        pattern += "/*"
    above, stars, below = f"/{pattern}".partition("/**/")
    if not stars:
        yield from glob.iglob(pattern)  # without `**` glob follows no link round
        return
    roots = glob.iglob(above[1:]) if above[1:] else ["/" if pattern.startswith("/") else ""]
    for root in roots:
        for folder in _folders(root, tuple(map(str, Path(os.path.realpath(root)).parents))):
            yield from _matches(os.path.join(glob.escape(folder), below))


def _folders(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """A folder and all below it, but for hidden ones. above: the real paths of those it is in or was reached by."""
    real = os.path.realpath(folder)
    if real in above or not os.path.isdir(folder or "."):
        return
    yield folder
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:  # as glob
        return
    for name in names:
        if not name.startswith(".") and os.path.isdir(inner := os.path.join(folder, name)):
            yield from _folders(inner, (*above, real))


def _split(pattern: str) -> tuple[str, str]:
    """(folder, glob below it)."""
    scheme, _, rest = pattern.partition("://")
    folders = rest.split("/")
    at = next((i for i, name in enumerate(folders) if glob.has_magic(name)), len(folders) - 1)
    return f"{scheme}://{'/'.join(folders[:at])}", "/".join(folders[at:])


def _staged(cache: Path, root: str) -> Path:
    return cache / root.replace("://", "/")
