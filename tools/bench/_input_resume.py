"""How long a fresh process takes to its first batch, a billion steps into a run, and what memory the next ones take.

    python tools/bench/input.py --resume

The stores are sparse files of the sizes asked for, their pages zeros that the kernel makes up; the corpus is opened as
`lm train` opens it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _measure import Spread, python_sources

STEP, BATCHES = 10**9, 500
PARTS = ("import of lm.data.loader", "import of tensorflow", "open", "stream", "first batch")


def measure_resume(folder: Path, gigabytes: list[float], batch_size: int, seq_len: int, rounds: int) -> dict[str, Any]:
    """A fresh process for each store and round, in turns."""
    from _input_stores import write_sparse

    from lm.data import SentencePiece

    learnt = SentencePiece(kind="bpe", vocab_size=8192).train(python_sources(4 << 20))
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(learnt.to_bytes())
    names = {gb: folder / f"{gb:g}" for gb in gigabytes}
    for gb, path in names.items():
        data = _config(path, tokenizer, batch_size, seq_len)
        of_meta = dict(tokenizer=learnt.fingerprint, made_from=data.corpus.made_from("text"))
        write_sparse(path / "text" / "train", int(gb * 2**30), **of_meta)
        shutil.copy(tokenizer, path)
    runs: dict[float, list[dict]] = {gb: [] for gb in gigabytes}
    for _ in range(rounds):
        for gb, path in names.items():
            args = [str(path), str(tokenizer), str(batch_size), str(seq_len)]
            out = subprocess.run([sys.executable, __file__, *args], stdout=subprocess.PIPE, text=True, check=True)
            runs[gb].append(json.loads(out.stdout.splitlines()[-1]))
    return {f"{gb:g} GB": {k: Spread.of([r[k] for r in each])._asdict() for k in each[0]} for gb, each in runs.items()}


def print_resume(found: dict[str, Any]) -> None:
    print(f"a fresh process, sparse store: seconds to the first batch at step {STEP:,}; then {BATCHES} batches")
    for name, values in found.items():
        print(f"\n{name}")
        for key, value in values.items():
            print(f"  {key:44} {Spread(**value).text(3 if key.endswith(' s') else 1):>28}")


def _config(path: Path, tokenizer: Path, batch_size: int, seq_len: int):
    from lm.data import Data, Text

    return Data(
        path=str(path),
        sources={"text": Text(glob="text/*.txt")},
        tokenizer=str(tokenizer),
        seq_len=seq_len,
        batch_size=batch_size,
        validation_fraction=0.0,
    )


def _resident() -> dict[str, float]:
    """MB of this process that are its own, and that are pages of files, which the kernel takes back when it needs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {"own": kb["RssAnon"] / 1e3, "of files": kb["RssFile"] / 1e3}


def first_batch(path: Path, tokenizer: Path, batch_size: int, seq_len: int) -> dict[str, float]:
    """In a process that has imported nothing yet: seconds of each part, MB of memory after the first batch and how much
    more after BATCHES."""
    times = [time.perf_counter()]
    mark = lambda: times.append(time.perf_counter())
    import numpy as np

    from lm.data import Stream, open_corpus
    from lm.data.loader.reader import HostReader, identity
    from lm.data.loader.tfdata import host_batches
    from lm.data.tf import tensorflow

    mark()
    tensorflow()
    mark()
    data = _config(path, tokenizer, batch_size, seq_len)
    corpus = open_corpus(data)
    mark()
    stream = Stream.of(data, corpus)
    mark()
    rows, start = np.arange(batch_size), STEP * batch_size
    reader = HostReader(stream, rows, batch_size=batch_size, start=start, examples=identity)
    batches = host_batches(reader, prefetch=2)
    try:
        next(batches)
        mark()
        before = _resident()
        for _ in range(BATCHES):
            next(batches)
        after = _resident()
    finally:
        batches.close()  # one that lives on to the end of Python may wait for a reading thread that cannot go on
    seconds = {f"{part}, s": b - a for part, (a, b) in zip(PARTS, itertools.pairwise(times), strict=True)}
    seconds["all but imports, s"] = times[-1] - times[2]
    return seconds | {
        "memory after the first batch, own, MB": before["own"],
        f"growth over {BATCHES} batches, own, MB": after["own"] - before["own"],
        f"growth over {BATCHES} batches, of files, MB": after["of files"] - before["of files"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("path", Path), ("tokenizer", Path), ("batch_size", int), ("seq_len", int)):
        parser.add_argument(name, type=kind)
    args = parser.parse_args()
    print(json.dumps(first_batch(**vars(args))))


if __name__ == "__main__":
    main()
