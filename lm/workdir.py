"""The folder of a run: what its files are called, who may write there, and what wrote them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lm import distributed
from lm.errors import UserError

IMPORTED = "hf"  # folder of a run that was imported: what its checkpoint does not hold of the model's folder
CONFIG_FILE = "config.json"  # in the folder of a run


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Refuses a folder that a live run is using. The lock goes with the process, however it ends, and so do folders
    that were made for it and got nothing else."""
    if not distributed.is_main():
        yield
        return
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "run.lock").open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            pid = f.read().strip() or "unknown"
            raise UserError(
                f"{workdir}: in use by a live run (process {pid}); wait for it, stop it, or take another --workdir"
            ) from None
        f.seek(0)
        f.truncate()
        f.write(f"{os.getpid()}\n")
        f.flush()
        try:
            yield
        finally:
            if made and [path.name for path in workdir.iterdir()] == ["run.lock"]:
                (workdir / "run.lock").unlink()
                with contextlib.suppress(OSError):  # another run is beside it
                    for path in made:
                        path.rmdir()


def versions() -> dict[str, str]:
    """The versions of what numbers depend on, our own first."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("lm-pretraining", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(PackageNotFoundError):  # a checkout on the path is not a distribution
            found[package] = version(package)
    return found
