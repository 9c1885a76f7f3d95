"""Seconds to save, verify and restore a checkpoint, beside Orbax's own default and a plain read of the same files.

    python tools/bench/checkpoint.py [--gib 1] [--rounds 5] [--folder DIR]

Each round does every part once. Reads marked cold have the files dropped from the
system's memory first, as after a restart. Random float32, which no compression makes smaller.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lm.checkpoint import Checkpoints, Meta, integrity
from lm.checkpoint.policy import Checkpoint
from lm.training.state import State

META = Meta(config="{}", tokenizer=b"", examples_seen=0, data={}, versions={})
ARRAYS = 16


def make_state(gib: float) -> State:
    """Parameters of `gib` GiB in all, in arrays of one size, and an empty optimizer."""
    rng, n = np.random.default_rng(0), int(gib * 2**30 / 4 / ARRAYS / 1024)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((n, 1024), np.float32)) for i in range(ARRAYS)}
    return State(jnp.int32(1), params, {"count": jnp.int32(1)})


def drop_cached(folder: Path) -> None:
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb", buffering=0) as f:
            while f.read(4 << 20):
                pass


def timed(f: Callable[[], object]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def one_round(state: State, at: Path, parts: dict[str, list[float]]) -> None:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    ours, orbax, step = at / "ours", at / "orbax", at / "ours" / "checkpoints" / "1"

    def save() -> None:
        checkpoints = Checkpoints(ours, Checkpoint())
        checkpoints.save(1, state, META)
        checkpoints.close()

    def save_default() -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(orbax, state.params)

    measured = {
        "save: lm, sealed": lambda: timed(save),
        "save: Orbax's default": lambda: timed(save_default),
        "seal alone": lambda: timed(lambda: integrity.seal(step)),
        "read cold: plain": lambda: (drop_cached(step), timed(lambda: read_all(step)))[1],
        "read cold: verify": lambda: (drop_cached(step), timed(lambda: integrity.damage(step)))[1],
        "verify cached": lambda: timed(lambda: integrity.damage(step)),
        "restore: lm, verified": lambda: timed(lambda: jax.block_until_ready(Checkpoints(ours).restore(1, abstract))),
    }
    for name, measure in measured.items():
        parts.setdefault(name, []).append(measure())
    shutil.rmtree(ours)
    shutil.rmtree(orbax)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure (default: the system's for temporary files)")
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, orbax {ocp.__version__}, {platform.machine()}, {os.cpu_count()} cores, {args.gib} GiB"
    )
    state, parts = make_state(args.gib), dict[str, list[float]]()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for _ in range(args.rounds):
            one_round(state, Path(folder), parts)
    for name, times in parts.items():
        median = statistics.median(times)
        print(f"{name:24} {median:6.2f} s ({min(times):.2f}..{max(times):.2f})  {args.gib / median:5.2f} GiB/s")


if __name__ == "__main__":
    main()
