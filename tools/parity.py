"""Measures every family against transformers, prints the table of the README: `python tools/parity.py [--json FILE]`.

Needs the hf extra. The models are those of tests/hf/cases.py: small, random, on the same folder and the same inputs.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from lm import hf  # noqa: E402
from tests.hf import compare  # noqa: E402
from tests.hf.cases import CASES, EACH, GENERATORS, reference  # noqa: E402

SEARCHES = {"greedy": {}, "beam 4": {"num_beams": 4, "length_penalty": 0.7}}


def measure(name: str) -> dict[str, float]:
    """Differences of one case: of outputs, hidden states and loss absolute, of gradients relative to each tensor."""
    with tempfile.TemporaryDirectory() as folder:
        reference(name).save_pretrained(folder)
        model = hf.load(folder)
        outputs, gradients = compare.differences(name, model)
        found = {"logits": max(v for k, v in outputs.items() if "logits" in k), "loss": outputs["loss"]}
        found["states"] = max(v for k, v in outputs.items() if "hidden" in k)
        found["gradients"] = max(gradients.values())
        if name in EACH:
            ours, theirs = compare.losses_of_adamw(name, model)
            found["AdamW"] = float(np.abs(np.array(ours) - theirs).max())
        if name in EACH and name in GENERATORS:
            for how, options in SEARCHES.items():
                ours, theirs = compare.sequences(name, model, **options)
                found[how] = float(ours.shape == theirs.shape and (ours == theirs).all())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write every case's numbers here")
    args = parser.parse_args()
    versions = {p: importlib.metadata.version(p) for p in ("jax", "torch", "transformers")}
    cases, families = {}, collections.defaultdict(list)
    for name, case in CASES.items():
        cases[name] = measure(name)
        families[case.family].append(name)
        print(name, cases[name], file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "cases": cases}, indent=1) + "\n")
    print(", ".join(f"{p} {v}" for p, v in versions.items()))
    print("| family | classes | logits | hidden states | loss | gradients | 6 AdamW steps | greedy, beam 4 |")
    print("|---|---|---|---|---|---|---|---|")
    for family, names in families.items():
        worst = lambda key, names=names: max((cases[n][key] for n in names if key in cases[n]), default=None)
        classes = ", ".join(dict.fromkeys(_short(CASES[n].cls, family) for n in names))
        numbers = " | ".join(f"{worst(k):.0e}" for k in ("logits", "states", "loss", "gradients", "AdamW"))
        equal = [cases[n][how] for n in names for how in SEARCHES if how in cases[n]]
        print(f"| {family} | {classes} | {numbers} | {'' if not equal else 'equal' if all(equal) else 'DIFFERENT'} |")


def _short(cls: str, family: str) -> str:
    return cls.removeprefix(family.removesuffix("Text")).removeprefix("For")


if __name__ == "__main__":
    main()
