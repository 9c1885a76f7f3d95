"""The folder of a run: where it is, what its files are called, who may write there, and what wrote them.

    config.json               the resolved config
    metrics.jsonl             a record for each log interval and evaluation
    tensorboard/              the same for TensorBoard
    checkpoints/STEP/         as `lm.checkpoint` writes them
    hf/                       of an imported model: what its checkpoint does not hold of the model's folder
    spike_step_12.json        documents of a batch that needed a look
    run.lock                  held by the live run; in a local folder only

It is a local folder, or an address `gs://bucket/folder` in Google Cloud Storage. Paths are those of `etils.epath`,
which read and write both; `lm/__init__.py` says by which client. Never `resolve()` one: it makes a local path of an
address.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from lm.errors import UserError
from lm.files import check_folder, is_remote, locked, may_write, write_atomic

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/")  # one slash: a Path has dropped the other
CLIENTS = ("gcsfs", "google.cloud.storage")  # of gs://: for paths, and what Orbax asks about buckets


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of a run; `str` of it is the address. Make one with `of`."""

    path: epath.Path

    @classmethod
    def of(cls, address: str | os.PathLike[str] | Workdir, name: str = "") -> Workdir:
        """The folder at a local path or a `gs://bucket/folder`; touches nothing.

        name: of the setting that the address comes from, for the error. UserError for an address that no checkpoint can
        be written to (Orbax knows gs:// alone), and where the packages for it are not installed.
        """
        if isinstance(address, Workdir):
            return address
        text, at = os.fspath(address), f"{name}: " if name else ""
        if not (scheme := SCHEME.match(text)):
            path = os.path.expanduser(text)
            if path.startswith("~"):
                raise UserError(
                    f"{at}{text}: expected ~ or the ~name of a user, got nobody's; write ./{text} for a file"
                )
            return cls(epath.Path(path))
        if not text.startswith("gs://"):
            more = "write it as a string: a Path drops a slash" if scheme[1] == "gs" else "copy it to one of them"
            raise UserError(f"{at}{text}: expected a local folder or gs://bucket/folder, got {scheme[0]}; {more}")
        bucket, _, folder = text.removeprefix("gs://").partition("/")
        if not bucket or not folder.strip("/"):
            raise UserError(f"{at}{text}: expected gs://bucket/folder, got no folder; name one in the bucket")
        if missing := [package for package in CLIENTS if not _is_installed(package)]:
            raise UserError(
                f"{at}{text}: expected {' and '.join(CLIENTS)} for gs://, got no {' and no '.join(missing)}; pip "
                "install 'lm-pretraining[gcs]'"
            )
        return cls(epath.Path(text.rstrip("/")))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_remote(self) -> bool:
        return is_remote(self.path)

    @property
    def config(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> epath.Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    @property
    def imported(self) -> epath.Path:
        return self.path / "hf"

    @property
    def lock(self) -> epath.Path:
        return self.path / "run.lock"

    def report(self, kind: str, step: int) -> epath.Path:
        """Where the documents of a batch are listed: `kind` is what was seen at `step`."""
        return self.path / f"{kind}_step_{step}.json"

    def is_imported(self) -> bool:
        """Says whether it holds a model that was not trained here."""
        self.reach()
        return self.imported.is_dir()

    def has_checkpoints(self) -> bool:
        """Says whether a run has begun to save here; perhaps none is finished yet."""
        self.reach()
        return self.checkpoints.is_dir()

    def is_new(self) -> bool:
        """Says whether nothing is there, or an empty folder."""
        self.reach()
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def read_config(self) -> str | None:
        """The text of the resolved config; None where there is none."""
        self.reach()
        if not self.config.is_file():
            return None
        try:
            return self.config.read_bytes().decode()
        except (UnicodeDecodeError, PermissionError) as e:
            got = "no permission to read it" if isinstance(e, PermissionError) else f"bytes that are no UTF-8 ({e})"
            raise UserError(f"{self.config}: expected the config of a run, got {got}; name another folder") from None

    @contextlib.contextmanager
    def open(self, *, lock: bool = True) -> Iterator[Workdir]:
        """`with Workdir.of(address).open() as workdir:` makes the folder and keeps other runs out until the block ends.

        The lock of a local folder goes with the process, however it ends. A store has no such locks: there nothing
        notices a second run. An error within the block takes a folder with it that was made for it and that is empty
        but for the lock. UserError where a live run has the folder, and where it cannot be made or reached.

        lock: False for all processes of a run but the first, which keeps others out for all of them.
        """
        if self.is_remote:
            self.reach()
            yield self
            return
        folder = Path(self.path)
        self.reach()
        check_folder(folder)
        self._check_writable()
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if lock:
                stack.enter_context(locked(Path(self.lock), refusal=self._in_use))
            try:
                yield self
            except BaseException:
                if made:
                    _remove_empty(made, Path(self.lock))
                raise

    def reach(self) -> None:
        """Raises UserError where the folder is there and may not be looked into, or where no folder can be; of an
        address where the bucket is not there or may not be listed. Other failures pass."""
        if not self.is_remote:
            try:
                os.listdir(self.path)
            except FileNotFoundError:
                pass
            except OSError as e:
                got = "a file, or a path below one" if e.errno == errno.ENOTDIR else e.strerror
                raise UserError(f"{self}: expected the folder of a run, got {got}; name another") from None
            return
        try:
            _list(self.path.parts[2])
        except PermissionError as e:
            raise UserError(
                f"{self}: expected a bucket that may be listed, got {e}; log in, or ask its owner"
            ) from None
        except FileNotFoundError as e:
            raise UserError(f"{self}: expected a bucket, got {e}; make it, or correct the address") from None

    def _check_writable(self) -> None:
        """Raises UserError for a part of the folder that is there and that no run can write."""
        kinds = {self.checkpoints: "folder", self.tensorboard: "folder", self.metrics: "file", self.config: "file"}
        for path, kind in kinds.items():
            if not os.path.lexists(path):
                continue
            if not (os.path.isdir(path) if kind == "folder" else os.path.isfile(path)):
                raise UserError(f"{path}: expected a {kind} of a run, got something else; take another --workdir")
            if not may_write(Path(path)):
                raise UserError(
                    f"{path}: expected to be allowed to write, got no permission; change it, or take another --workdir"
                )

    def _in_use(self, holder: str) -> str:
        return f"{self}: in use by a live run (process {holder}); wait for it, stop it, or take another --workdir"


def write(path: epath.Path, text: str | bytes) -> None:
    """Writes all of `text` under `path`, or nothing: a store shows an object when it is complete."""
    content = text.encode() if isinstance(text, str) else text
    if is_remote(path):
        path.write_bytes(content)
    else:
        write_atomic(Path(path), content)


@contextlib.contextmanager
def read_here(folder: epath.Path) -> Iterator[Path]:
    """The folder itself where it is local, else a copy of it that goes with the block."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        _copy_folder(folder, epath.Path(temporary))
        yield Path(temporary)


@contextlib.contextmanager
def written_here(folder: epath.Path) -> Iterator[Path]:
    """The folder itself, made, where it is local; else one whose files are copied there when the block has ended."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        _copy_folder(epath.Path(temporary), folder)


def _copy_folder(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name, overwrite=True)


def versions() -> dict[str, str]:
    """The versions of what numbers depend on, our own first."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("lm-pretraining", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(PackageNotFoundError):  # a checkout on the path is not a distribution
            found[package] = version(package)
    return found


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package it is in
        return False


def objects(folder: epath.Path) -> dict[str, int]:
    """The objects below a folder in a store: their names, relative to it, and their bytes. One request a thousand.
    OSError for what the client raises."""
    from google.api_core import exceptions
    from google.cloud import storage

    bucket, prefix = folder.parts[2], "/".join(folder.parts[3:]) + "/"
    try:
        found = list(storage.Client().list_blobs(bucket, prefix=prefix))
    except exceptions.GoogleAPICallError as e:
        raise OSError(None, str(e), str(folder)) from e
    return {blob.name.removeprefix(prefix): blob.size for blob in found if not blob.name.endswith("/")}


@functools.cache  # once for each bucket: every look at the folder asks
def _list(bucket: str) -> None:
    """Asks for one object, which takes no more rights than a run does. gcsfs would make a bucket that is not there, and
    takes an empty one whose settings it may not read for none."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    try:
        next(iter(storage.Client().list_blobs(bucket, max_results=1)), None)
    except exceptions.NotFound:
        raise FileNotFoundError(f"none named {bucket!r}") from None
    except (exceptions.Forbidden, exceptions.Unauthorized, GoogleAuthError) as e:
        raise PermissionError(str(e).strip().split("\n")[0]) from None


def _remove_empty(folders: list[Path], lock: Path) -> None:
    """Removes folders, the innermost first, which may hold the lock; not one that has something in it."""
    if [path.name for path in folders[0].iterdir()] == [lock.name]:
        lock.unlink()
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
