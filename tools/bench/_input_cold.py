"""Rows of a store that is not in memory: as of a corpus larger than the memory, at the start of every epoch.

    python tools/bench/input.py --cold

Each round drops the store from the page cache and reads batches at random places: ours, and by a plain memory map as
nanoGPT does. What the disk was asked for is counted by the kernel (ru_inblock), in units of what was wanted.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _input_stores import write_random
from _measure import Spread

from lm.data import Store, Stream
from lm.data.loader.reader import HostReader, identity
from lm.data.loader.tfdata import GROUP
from lm.data.store.tokens import tokens_name

BLOCK = 512  # bytes, of ru_inblock
SEQ_LENS = (1024, 8192)


def measure_cold(folder: Path, gigabytes: float, batch_size: int, rounds: int) -> dict[str, Any]:
    """Batches of as many tokens as `batch_size` rows of the shortest, for each of SEQ_LENS."""
    store = write_random(folder / "cold", int(gigabytes * 2**30) // 2, 1, seed=0)
    tokens = store.path / tokens_name(0)
    with open(tokens, "rb") as f:
        os.fsync(f.fileno())
    out: dict[str, Any] = {"read_ahead_kb": _read_ahead_kb(tokens)}
    for seq_len in SEQ_LENS:
        n_rows = max(1, batch_size * SEQ_LENS[0] // seq_len)
        runs: dict[str, list[tuple[float, float]]] = {"lm: rows as numpy": [], "memory map, a slice a row": []}
        for i in range(rounds):
            for name, read in zip(runs, (_ours(store.path, seq_len, n_rows, i), _map(tokens, seq_len, i)), strict=True):
                runs[name].append(_cold(tokens, read, GROUP * n_rows, seq_len))
        for name, each in runs.items():
            rate, asked = zip(*each, strict=True)
            out[f"{name}, {seq_len} tokens"] = {
                "Mtok_per_wall_s": Spread.of(rate)._asdict(),
                "read_by_wanted": Spread.of(asked)._asdict(),
            }
    return out


def print_cold(found: dict[str, Any]) -> None:
    print(f"the disk reads ahead by {found['read_ahead_kb'] or 'unknown'} kB")
    print(f"{'':42} {'Mtok/s wall':>24} {'bytes read / wanted':>24}")
    for name, r in found.items():
        if name == "read_ahead_kb":
            continue
        rate, asked = Spread(**r["Mtok_per_wall_s"]), Spread(**r["read_by_wanted"])
        print(f"{name:42} {rate.text(2):>24} {asked.text():>24}")


def _read_ahead_kb(path: Path) -> int | None:
    device = os.stat(path).st_dev
    try:
        return int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text())
    except OSError:
        return None


def _cold(path: Path, read: Callable[[int], None], n: int, seq_len: int) -> tuple[float, float]:
    """(Mtoken a second of n rows, bytes that the disk gave by those of the rows)."""
    with open(path, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    blocks, began = resource.getrusage(resource.RUSAGE_SELF).ru_inblock, time.perf_counter()
    read(n)
    seconds = time.perf_counter() - began
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - blocks
    return n * seq_len / 1e6 / seconds, blocks * BLOCK / (n * seq_len * 2)


def _ours(path: Path, seq_len: int, batch_size: int, seed: int) -> Callable[[int], None]:
    def read(n: int) -> None:
        stream = Stream({"cold": Store(path)}, weights=None, seq_len=seq_len, seed=seed)
        reader = HostReader(stream, np.arange(batch_size), batch_size=batch_size, start=0, examples=identity)
        for _ in reader.batches(0, n // batch_size):
            pass

    return read


def _map(path: Path, seq_len: int, seed: int) -> Callable[[int], None]:
    def read(n: int) -> None:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        for at in np.random.default_rng(seed).integers(0, len(data) - seq_len - 1, n):
            data[at : at + seq_len + 1].astype(np.int32)

    return read
