"""Trains a recipe on the device at hand and keeps what came of it: tokens/s, MFU, the loss curve, device and versions.

    python tools/bench/recipe.py debug_gpu --workdir runs/debug_gpu [a.b=value ...]

Writes tools/bench/results/<recipe>-<device>.json. Tokens/s and MFU are medians over the log intervals after the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax

import lm
from lm.workdir import versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    began = time.perf_counter()
    result = lm.train(args.recipe, args.workdir, args.overrides)
    seconds = time.perf_counter() - began
    records = [json.loads(line) for line in (Path(args.workdir) / "metrics.jsonl").read_text().splitlines()]
    steady = [r for r in records if r["kind"] == "train"][2:]
    if not steady:
        sys.exit("too few log intervals to measure; give more train.steps or a smaller train.log_every")
    device = jax.devices()[0].device_kind

    def median(name: str) -> float | None:
        values = [r[name] for r in steady if r[name] is not None]
        return statistics.median(values) if values else None

    report = {
        "recipe": Path(args.recipe).stem,
        "overrides": args.overrides,
        "device": device,
        "n_devices": jax.device_count(),
        "versions": versions(),
        "tokens_per_s": median("tokens_per_s"),
        "mfu_full_attention": median("mfu"),
        "mfu_causal": median("mfu_causal"),
        "seconds": seconds,
        "steps": result.step,
        "evaluation": {name: r.record() for name, r in (result.evaluation or {}).items()},
        "loss_curve": [[r["step"], round(r["loss"], 4)] for r in records if r["kind"] == "train"],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{report['recipe']}-{device.replace(' ', '_')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "loss_curve"}, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
