"""Seconds from the command to the first finished step, with a prepared store: a new run, and a resumed one.

    python tools/bench/startup.py [--recipe quickstart] [--repeat 3]

Prints each run and the median. The compilation cache is warm after the first run, as it is for a user.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from lm.errors import EXIT_PREEMPTED


def first_step_s(recipe: str, workdir: Path) -> float:
    """Runs the command, returns the seconds until its first new record in metrics.jsonl, and stops it with a save."""
    metrics = workdir / "metrics.jsonl"
    known = _records(metrics)
    began = time.perf_counter()
    args = [sys.executable, "-m", "lm", "train", recipe, "--workdir", str(workdir), "train.log_every=1"]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    while process.poll() is None and _records(metrics) <= known:
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.terminate()
    if process.wait() != EXIT_PREEMPTED:
        raise SystemExit(f"{' '.join(args)} ended with {process.returncode}")
    return seconds


def _records(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, python {platform.python_version()}, {platform.machine()}, recipe {args.recipe}")
    subprocess.run([sys.executable, "-m", "lm", "prepare", args.recipe], check=True)
    times: dict[str, list[float]] = {"new": [], "resumed": []}
    for i in range(args.repeat + 1):
        workdir = Path(tempfile.mkdtemp(prefix="lm-startup-"))
        try:
            run = {"new": first_step_s(args.recipe, workdir)}
            run["resumed"] = first_step_s(args.recipe, workdir)
        finally:
            shutil.rmtree(workdir)
        print(("warm-up  " if i == 0 else f"run {i}    ") + "  ".join(f"{k} {v:.1f} s" for k, v in run.items()))
        if i:
            for k, v in run.items():
                times[k].append(v)
    print(
        "median   " + "  ".join(f"{k} {statistics.median(v):.1f} s" for k, v in times.items()) + f"  (n={args.repeat})"
    )


if __name__ == "__main__":
    main()
