"""How tests compile, and `lm` as processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for that many virtual CPU devices and programs that compile quickly, for they run only a few times.

    The emitters that fuse loops through MLIR take four fifths of the time to compile at optimization level 0, and code
    that is split among threads a third of the rest, where every core has a worker already.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_command(recipe: Path, workdir: Path, *more: str, devices: int = 1) -> subprocess.Popen:
    """`lm train` on that many virtual CPU devices."""
    env = os.environ | {"XLA_FLAGS": xla_flags(devices)}
    args = [sys.executable, "-m", "lm", "train", str(recipe), "--workdir", str(workdir), *more]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition: Callable[[], bool], what: str, process: subprocess.Popen) -> None:
    """Waits for it while the process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(f"{what} was not reached: {process.communicate()[0]}")
        time.sleep(0.01)


def until_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    path = workdir / "metrics.jsonl"

    def reached() -> bool:
        return path.exists() and any(json.loads(r)["step"] >= step for r in path.read_text().splitlines()[:-1])

    until(reached, f"step {step}", process)


def until_saved(workdir: Path, process: subprocess.Popen) -> None:
    """A checkpoint is written in the background, under another name, and may be there some steps after its own."""
    folder = workdir / "checkpoints"

    def saved() -> bool:
        return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())

    until(saved, "a first checkpoint", process)
