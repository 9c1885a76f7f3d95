"""Measures the input pipeline: Mtoken per CPU second and per wall second, each of our parts beside its peers.

    pip install -e '.[bench]'; python tools/bench/input.py [--json FILE]     # throughput
    python tools/bench/input.py --resume [--json FILE]                       # first batch far in a run, memory
    python tools/bench/input.py --cold [--json FILE]                         # rows of a store that is not in memory

Random tokens in a temporary folder, page cache hot (but for --cold); what a host does before the device transfer. CPU
seconds are of all threads of the process and of the worker processes where a variant has some, and of what is read
ahead. Variants take turns of about a second, and every round reverses their order, so that a busy machine disturbs all
alike. Medians with the least and the greatest; the ratio to nanoGPT's sampling is a median over rounds. Peers that are
not installed are named as such.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _measure
from _input_cold import measure_cold, print_cold
from _input_resume import measure_resume, print_resume
from _input_variants import Corpus, Variant, variants
from _measure import Clock, Spread, Time

BASE = "nanoGPT: memmap sampling"
PACKAGES = ("numpy", "jax", "tensorflow-cpu", "tensorflow", "grain", "array-record", "datasets", "pyarrow")
WARM_UP = 20


class Running:
    """A variant that was started, and what its rounds gave."""

    def __init__(self, variant: Variant, corpus: Corpus, seconds: float):
        self.name, self._batches, self.times = variant.name, variant.make(corpus), list[Time]()
        self._take(1)
        self._clock = Clock(_children() if variant.workers else ())
        once = self._clock.time(lambda: self._take(WARM_UP)).wall / WARM_UP
        self.steps = max(3, round(seconds / once))

    def turn(self) -> None:
        self.times.append(self._clock.time(lambda: self._take(self.steps)))

    def rates(self, batch_tokens: int) -> dict[str, list[float]]:
        done = self.steps * batch_tokens / 1e6
        return {"cpu": [done / t.cpu for t in self.times], "wall": [done / t.wall for t in self.times]}

    def close(self) -> None:
        """Ends its threads: Python may wait for ever for one that reads when it exits."""
        del self._batches

    def _take(self, n: int) -> None:
        for _ in range(n):
            next(self._batches)


def _children() -> Iterator[Any]:
    import psutil

    yield from psutil.Process().children(recursive=True)


def measure(corpus: Corpus, wanted: list[Variant], *, seconds: float, rounds: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    running: list[Running] = []
    try:
        for variant in wanted:
            if lacking := _measure.missing(variant.needs):
                out[variant.name] = {"not installed": "pip install " + " ".join(lacking)}
            else:
                running.append(Running(variant, corpus, seconds))
        for i in range(rounds):
            for each in running[:: -1 if i % 2 else 1]:
                each.turn()
    finally:
        for each in running:
            each.close()
    rates = {each.name: each.rates(corpus.batch_size * corpus.seq_len) for each in running}
    base = rates.get(BASE)
    for each in running:
        mine = rates[each.name]
        ratio = base and [a / b for a, b in zip(mine["cpu"], base["cpu"], strict=True)]
        out[each.name] = {
            "Mtok_per_cpu_s": Spread.of(mine["cpu"])._asdict(),
            "Mtok_per_wall_s": Spread.of(mine["wall"])._asdict(),
            "cpu_ratio_to_nanogpt": ratio and statistics.median(ratio),
            "batches_a_round": each.steps,
        }
    return {variant.name: out[variant.name] for variant in wanted}


def print_rates(found: dict[str, Any]) -> None:
    print(f"{'':42} {'Mtok/CPU-s':>24} {'Mtok/s wall':>24} {'CPU, to nanoGPT':>16}")
    for name, r in found.items():
        if "not installed" in r:
            print(f"{name:42} not installed: {r['not installed']}")
            continue
        cpu, wall = (Spread(**r[k]).text() for k in ("Mtok_per_cpu_s", "Mtok_per_wall_s"))
        ratio = "" if r["cpu_ratio_to_nanogpt"] is None else f"{r['cpu_ratio_to_nanogpt']:.2f}"
        print(f"{name:42} {cpu:>24} {wall:>24} {ratio:>16}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--mtokens", type=int, default=128, help="Mi tokens of one source, and of three together")
    parser.add_argument("--shards", type=int, default=8, help="of each source of the mixture")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a variant's turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", metavar="REGEX", help="variants with this in their name")
    parser.add_argument("--resume", action="store_true", help="the first batch far in a run, and memory, instead")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 4, 100], help="of the stores of --resume")
    parser.add_argument("--cold", action="store_true", help="a store that is not in memory, instead")
    parser.add_argument("--cold-gigabytes", type=float, default=4.0, help="of the store of --cold")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    found = _measure.machine(PACKAGES)
    print(_measure.describe(found))
    folder = Path(tempfile.mkdtemp(prefix="lm-input-"))
    try:
        if args.resume:
            results = measure_resume(folder, args.gigabytes, args.batch_size, args.seq_len, args.rounds)
            print_resume(results)
        elif args.cold:
            results = measure_cold(folder, args.cold_gigabytes, args.batch_size, args.rounds)
            print_cold(results)
        else:
            sizes = dict(batch_size=args.batch_size, seq_len=args.seq_len)
            corpus = Corpus.write(folder, n_tokens=args.mtokens * 2**20, n_shards=args.shards, **sizes)
            wanted = [v for v in variants(args.shards) if re.search(args.only, v.name)]
            print(
                f"{args.batch_size} x {args.seq_len} tokens a batch, {args.mtokens} Mi uint16 tokens; median (least.."
                f"greatest) of {args.rounds} rounds of {args.seconds:g} s"
            )
            results = measure(corpus, wanted, seconds=args.seconds, rounds=args.rounds)
            print_rates(results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["load_at_the_end"] = round(os.getloadavg()[0], 2)
    print(f"load {found['load_at_the_end']:.1f} at the end")
    arguments = {name: value for name, value in vars(args).items() if name != "json"}
    _measure.write_json(args.json, {**found, "arguments": arguments, "results": results})


if __name__ == "__main__":
    main()
