"""Measures the input pipeline: Mtoken per CPU second and per wall second, against nanoGPT-style memmap sampling.

    python tools/bench/input.py

Random tokens in a temporary folder, page cache hot; what a host does before the device transfer. CPU seconds are of all
threads of the process. Every round measures every variant, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lm.data.loader import HostReader, identity, make_dataset
from lm.data.store import ShardWriter, Store, StoreMeta, write_meta
from lm.data.stream import Stream

VOCAB = 32_000


def write_store(folder: Path, n_tokens: int, n_shards: int, seed: int) -> Store:
    rng, shards = np.random.default_rng(seed), []
    for i in range(n_shards):
        with ShardWriter(folder, i, "<u2") as writer:
            for _ in range(n_tokens // n_shards // 2**20):
                writer.add(rng.integers(3, VOCAB, 2**20 - 1).tolist(), 2**20)
            shards.append(writer.finish())
    meta = StoreMeta(
        dtype="<u2", tokenizer="none", corpus="none", made_from={}, raw=None, counts={}, shards=tuple(shards)
    )
    write_meta(folder, meta)
    return Store(folder)


def nanogpt(store: Store, batch_size: int, seq_len: int, path: Path):
    """get_batch of karpathy/nanoGPT train.py, less torch: int64 inputs and targets by one slice a row."""
    rng = np.random.default_rng(0)
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        at = rng.integers(0, len(data) - seq_len, batch_size)
        x = np.stack([data[i : i + seq_len].astype(np.int64) for i in at])
        y = np.stack([data[i + 1 : i + 1 + seq_len].astype(np.int64) for i in at])
        yield x, y


def numpy_rows(stream: Stream, batch_size: int):
    reader = HostReader(stream, np.arange(batch_size), batch_size=batch_size, start=0, examples=identity)
    step = 0
    while True:
        yield reader(step)
        step += 1


def tf_rows(stream: Stream, batch_size: int, examples):
    reader = HostReader(stream, np.arange(batch_size), batch_size=batch_size, start=0, examples=examples)
    yield from iter(make_dataset(reader, prefetch=2).dataset)


def causal(batch):
    """inputs and targets on the host, as a peer would make them."""
    tokens = batch["tokens"]
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@dataclasses.dataclass
class Rate:
    wall: float
    cpu: float


def measure(batches, steps: int, tokens: int) -> Rate:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(batches)
    done = steps * tokens / 1e6
    return Rate(done / (time.perf_counter() - wall), done / (time.process_time() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--mtokens", type=int, default=128, help="size of each source")
    parser.add_argument("--shards", type=int, default=8, help="of each source of the mixture")
    parser.add_argument("--steps", type=int, default=300, help="batches a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    B, T = args.batch_size, args.seq_len
    with tempfile.TemporaryDirectory() as folder:
        one = write_store(Path(folder, "one"), args.mtokens * 2**20, 1, seed=0)
        three = {c: write_store(Path(folder, c), args.mtokens * 2**20 // 4, args.shards, seed=1) for c in "abc"}
        single = Stream({"one": one}, weights=None, seq_len=T, seed=0)
        mixture = Stream(three, weights={"a": 0.5, "b": 0.3, "c": 0.2}, seq_len=T, seed=0)
        variants = {
            "nanoGPT memmap sampling": nanogpt(one, B, T, Path(folder, "one", "tokens-00000.bin")),
            "numpy reader, 1 source": numpy_rows(single, B),
            f"numpy reader, 3 x {args.shards} shards": numpy_rows(mixture, B),
            "make_loader host part, 1 source": tf_rows(single, B, identity),
            f"make_loader host part, 3 x {args.shards} shards": tf_rows(mixture, B, identity),
            "  with causal on the host, 1 source": tf_rows(single, B, causal),
        }
        for batches in variants.values():
            measure(batches, 20, B * T)
        rates = {name: [] for name in variants}
        for _ in range(args.rounds):
            for name, batches in variants.items():
                rates[name].append(measure(batches, args.steps, B * T))
    print(f"cpu: {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python", end=" ")
    print(platform.python_version(), *(f"{p} {version(p)}" for p in ("numpy", "jax", "tensorflow-cpu")), sep=", ")
    print(f"{B} x {T} tokens a batch, {args.mtokens} Mi uint16 tokens; 20 batches of warm-up, median of {args.rounds}")
    print(f"{'':40} Mtok/cpu-s   Mtok/s wall   cpu ratio to nanoGPT")
    base = statistics.median(r.cpu for r in rates["nanoGPT memmap sampling"])
    for name, rounds in rates.items():
        cpu, wall = statistics.median(r.cpu for r in rounds), statistics.median(r.wall for r in rounds)
        print(f"{name:40} {cpu:10.0f} {wall:13.0f} {cpu / base:15.2f}")


if __name__ == "__main__":
    main()
